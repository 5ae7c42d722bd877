"""Daemons behind a shared store, as an operator sees them."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.v1 import admin_pb2

__all__ = ["Server", "read_servers"]


@dataclass(frozen=True, slots=True)
class Server:
    """A daemon.

    Attributes:
        address: By which others reach it.
        version: Of moeplan.
        jobs: That it owns.
        draining: Whether it gives its jobs away and takes none.
    """

    address: str
    version: str
    jobs: int
    draining: bool


def read_servers(response: admin_pb2.ListServersResponse) -> list[Server]:
    """The daemons of an answer."""
    return [Server(found.address, found.version, found.jobs, found.draining) for found in response.servers]
