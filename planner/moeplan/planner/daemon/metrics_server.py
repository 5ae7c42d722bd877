"""Metrics over HTTP/1.1, for Prometheus: few connections at a time, each answered once and for a short time only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from moeplan.planner.daemon.live_page import LivePage, Request

__all__ = ["MetricsServer"]

CONNECTIONS = 16
"""Connections at a time; who comes later is closed at once."""

CONNECTION_S = 5.0
"""Longest life of one, whatever its client does or does not."""

REQUEST_BYTES = 16_384
"""Longest request."""

BODY_BYTES = 4_096
"""Longest body of one."""


class MetricsServer:
    """Answers with the live page, where there is one, and with metrics. `start` it before use, `stop` it after."""

    def __init__(self, registry: CollectorRegistry, page: LivePage | None = None) -> None:
        self._registry, self._page = registry, page
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
        try:
            with contextlib.suppress(ConnectionError, TimeoutError, EOFError, asyncio.LimitOverrunError):
                events = await self._first(reader, writer)
                if events is not None:
                    await _send_events(events, writer)
        finally:
            writer.transport.abort()  # the answer is out, or its time is over

    async def _first(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncIterator[bytes] | None:
        """Answer a request, in a short time; the events that are to follow, if any."""
        self._open += 1
        try:
            if self._open > CONNECTIONS:
                return None
            async with asyncio.timeout(CONNECTION_S):
                return await self._answer(reader, writer)
        finally:
            self._open -= 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncIterator[bytes] | None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, *_ = [*request[0].split(" "), "", ""]
        accept = [value for name, _, value in (line.partition(":") for line in request[1:]) if name.lower() == "accept"]
        extra: dict[str, str] = {}
        events = None
        answered = None if self._page is None else self._page.answer(await _page_request(request, reader, writer))
        if answered is not None:
            status, kind, body, extra, events = (
                answered.status,
                answered.kind,
                answered.body,
                answered.headers,
                answered.events,
            )
        elif method not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", "text/plain", b"GET /metrics\n"
        elif path.partition("?")[0] not in ("/", "/metrics"):
            status, kind, body = "404 Not Found", "text/plain", b"metrics are at /metrics\n"
        else:
            encode, kind = choose_encoder(accept[0] if accept else "")
            # In a thread, which gives way to streams: writing all of them takes some milliseconds.
            status, body = "200 OK", await asyncio.to_thread(encode, self._registry)
        writer.transport.set_write_buffer_limits(high=0)  # to drain is to have sent all
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *(f"{name}: {value}" for name, value in extra.items())]
        lines += ([] if events else [f"Content-Length: {len(body)}"]) + ["Connection: close", "", ""]
        writer.write("\r\n".join(lines).encode() + (b"" if method == "HEAD" else body))
        await writer.drain()
        if events is not None and method != "HEAD":
            return events
        writer.write_eof()
        while await reader.read(REQUEST_BYTES):  # until the client has all, and closes
            pass
        return None


async def _page_request(request: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    """The parts of a request that the page needs."""
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in request[1:])}
    method, path, *_ = [*request[0].split(" "), "", ""]
    length = headers.get("content-length", "")
    known = length.isascii() and length.isdecimal() and len(length) <= len(str(BODY_BYTES))
    body = b""
    if method == "POST" and known and int(length) <= BODY_BYTES:
        body = await reader.readexactly(int(length))
    return Request(method, path.partition("?")[0], headers, body, writer.get_extra_info("peername")[0])


async def _send_events(events: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
    """Send events until they end, or the client takes none for a while."""
    try:
        async for event in events:
            writer.write(event)
            async with asyncio.timeout(CONNECTION_S):
                await writer.drain()
    finally:
        await events.aclose()  # type: ignore[attr-defined]
