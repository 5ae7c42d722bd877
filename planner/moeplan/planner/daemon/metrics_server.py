"""Metrics over HTTP/1.1, for Prometheus: few connections at a time, each answered once and for a short time only."""

from __future__ import annotations

import asyncio
import contextlib

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

__all__ = ["MetricsServer"]

CONNECTIONS = 16
"""Connections at a time; who comes later is closed at once."""

CONNECTION_S = 5.0
"""Longest life of one, whatever its client does or does not."""

REQUEST_BYTES = 16_384
"""Longest request."""


class MetricsServer:
    """Answers every GET with the metrics of a registry. `start` it before use, `stop` it after."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which the system chooses for 0.

        Raises:
            OSError: the address cannot be had.
            OverflowError: the port is none.
        """
        self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= CONNECTIONS:
                with contextlib.suppress(ConnectionError, TimeoutError, EOFError, asyncio.LimitOverrunError):
                    async with asyncio.timeout(CONNECTION_S):
                        await self._answer(reader, writer)
        finally:
            self._open -= 1
            writer.transport.abort()  # the answer is out, or its time is over

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, *_ = [*request[0].split(" "), "", ""]
        accept = [value for name, _, value in (line.partition(":") for line in request[1:]) if name.lower() == "accept"]
        if method not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", "text/plain", b"GET /metrics\n"
        elif path.partition("?")[0] not in ("/", "/metrics"):
            status, kind, body = "404 Not Found", "text/plain", b"metrics are at /metrics\n"
        else:
            encode, kind = choose_encoder(accept[0] if accept else "")
            status, body = "200 OK", encode(self._registry)
        writer.transport.set_write_buffer_limits(high=0)  # to drain is to have sent all
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + (b"" if method == "HEAD" else body))
        await writer.drain()
        writer.write_eof()
        while await reader.read(REQUEST_BYTES):  # until the client has all, and closes
            pass
