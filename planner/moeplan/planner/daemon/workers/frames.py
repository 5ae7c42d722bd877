"""Frames between the daemon and its workers: a kind, a length and bytes, over a socket pair."""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # workers do without
    import asyncio

__all__ = ["FORK", "Kind", "read", "receive", "send", "write"]

FORK = struct.Struct("<Q")
"""Between daemon and zygote: a worker's memory limit in bytes one way, its process id the other."""

_HEADER = struct.Struct("<BQ")


class Kind(IntEnum):
    """The kind of a frame. To a worker: a task. From a worker: `PART` before the last answer, `DONE`, or `ERROR`."""

    SOLVE = 1
    """A SolveRequest."""
    ANYTIME = 2
    """A SolveAnytimeRequest."""
    EVALUATE = 3
    """An EvaluateRequest."""
    LAYERS = 4
    """A pickled `jobs.solve.LayersTask`."""
    LOADS = 8
    """A pickled `jobs.loads.LoadsTask`."""
    PART = 5
    """An answer that more follow."""
    DONE = 6
    """The last answer; may be empty after parts."""
    ERROR = 7
    """A pickled exception."""


def send(connection: socket.socket, kind: Kind, payload: bytes) -> None:
    """Send one frame, waiting as long as it takes."""
    connection.sendall(_HEADER.pack(kind, len(payload)) + payload)  # at once: the other side wakes once


def receive(connection: socket.socket) -> tuple[Kind, bytes]:
    """Wait for one frame.

    Raises:
        EOFError: the other side is gone.
    """
    kind, length = _HEADER.unpack(_exactly(connection, _HEADER.size))
    return Kind(kind), bytes(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return buffer


async def read(reader: asyncio.StreamReader) -> tuple[Kind, bytes]:
    """Wait for one frame without blocking the loop.

    Raises:
        EOFError: the other side is gone (asyncio.IncompleteReadError is one).
    """
    kind, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return Kind(kind), await reader.readexactly(length)


async def write(writer: asyncio.StreamWriter, kind: Kind, payload: bytes) -> None:
    """Send one frame without blocking the loop."""
    writer.write(_HEADER.pack(kind, len(payload)) + payload)
    await writer.drain()
