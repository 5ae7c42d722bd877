"""OpenTelemetry traces: what became of ranks' statistics, from the first of a step to the plan that ranks apply.

One span for each look at a job, with a span for each part of it: `statistics`, `solve` (with `queue` and `worker` for
each worker that solves a part), `store`, `send`, `apply`. A rank that sends a `traceparent` (W3C) with its stream has
the looks in its own trace. Off unless asked: then nothing here costs more than to see that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

__all__ = ["JobTraces", "Traces", "part", "passed"]

FLUSH_S = 2.0
"""Longest that the end of the daemon waits for what has not been sent."""

_INSIDE: ContextVar[tuple[Tracer, Context] | None] = ContextVar("inside", default=None)
"""The span that this task is in."""


class Traces:
    """Sends spans to `endpoint`, a collector's http:// or https:// address for OTLP over gRPC; "" for none.

    Raises:
        ModuleNotFoundError: the packages for it are not installed.
    """

    def __init__(self, endpoint: str) -> None:
        self._provider: Any = None
        self._exporter: Any = None
        if not endpoint:
            return
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = Resource({"service.name": "moeplan", "service.version": metadata.version("moeplan")})
        # What OTEL_... variables say of the service, of sampling and of batches wins, as in any program.
        resource = ours.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))

    def of(self, job: str) -> JobTraces:
        """The traces of a job."""
        return JobTraces(job, None if self._provider is None else self._provider.get_tracer("moeplan"))

    async def stop(self) -> None:
        """Send what is left, if that can be done soon."""
        if self._provider is not None:
            # Flushing takes as long as it takes, whatever limit it is given: opentelemetry-python, issue 4568.
            flushed = asyncio.ensure_future(asyncio.to_thread(self._provider.force_flush))
            await asyncio.wait([flushed], timeout=FLUSH_S)
            await asyncio.to_thread(self._exporter.shutdown)  # gives up a collector that is away
            await flushed


@dataclass(slots=True)
class _Sent:
    """A plan on its way to the ranks."""

    version: int
    inside: tuple[Tracer, Context]
    stored_s: float
    sent_s: float
    streams: int = 0


@dataclass
class JobTraces:
    """The traces of one job: a span for each look, in the trace of the lowest rank that brings one."""

    job: str
    tracer: Tracer | None
    _ranks: dict[int, tuple[int, Context]] = field(default_factory=dict)
    _first_s: float | None = None
    _sent: _Sent | None = None

    def joined(self, stream: int, rank: int, headers: Iterable[tuple[str, str | bytes]]) -> None:
        """A stream of a rank begins, with the metadata of its call."""
        if self.tracer is None:
            return
        from opentelemetry.trace import get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(dict(headers))
        if get_current_span(context).get_span_context().is_valid:
            self._ranks[stream] = rank, context

    def left(self, stream: int) -> None:
        """A stream is over."""
        self._ranks.pop(stream, None)

    def reported(self) -> None:
        """Statistics came."""
        if self._first_s is None:
            self._first_s = time.monotonic()

    @contextlib.contextmanager
    def look(self, step: int) -> Iterator[Callable[..., None]]:
        """Look for a plan, from the first statistics since the last look on; gives a function that adds attributes."""
        first_s, self._first_s = self._first_s, None
        if self.tracer is None:
            yield lambda **_: None
            return
        _, parent = min(self._ranks.values(), key=lambda found: found[0], default=(0, None))
        first_s = time.monotonic() if first_s is None else first_s
        span = self.tracer.start_span("moeplan.look", parent, start_time=_wall_ns(first_s))
        with _entered(self.tracer, span):
            span.set_attributes({"moeplan.job": self.job, "moeplan.step": step})
            passed("statistics", first_s)
            yield lambda **values: span.set_attributes(_named(values))

    def stored(self, version: int) -> None:
        """A plan is on disk and goes to the ranks."""
        self._over(superseded=True)
        inside, now = _INSIDE.get(), time.monotonic()
        self._sent = None if inside is None else _Sent(version, inside, now, now)

    def sent(self, version: int) -> None:
        """A stream has a plan."""
        if self._sent is not None and version >= self._sent.version:
            self._sent.sent_s = time.monotonic()
            self._sent.streams += 1

    def applied(self, version: int) -> None:
        """A rank applies a plan."""
        if self._sent is not None and version >= self._sent.version:
            self._over(superseded=version > self._sent.version)

    def _over(self, superseded: bool) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            values = {"version": sent.version}
            _add(sent.inside, "send", sent.stored_s, sent.sent_s, **values, streams=sent.streams)
            _add(sent.inside, "apply", sent.sent_s, time.monotonic(), **values, superseded=superseded)


@contextlib.contextmanager
def part(name: str, **values: Any) -> Iterator[None]:
    """A part of the look that this task is at, and what belongs to it."""
    inside = _INSIDE.get()
    if inside is None:
        yield
        return
    tracer, context = inside
    with _entered(tracer, tracer.start_span(f"moeplan.{name}", context, attributes=_named(values))):
        yield


def passed(name: str, start_s: float, **values: Any) -> None:
    """A part that is over, since `start_s` of `time.monotonic`."""
    inside = _INSIDE.get()
    if inside is not None:
        _add(inside, name, start_s, time.monotonic(), **values)


@contextlib.contextmanager
def _entered(tracer: Tracer, span: Span) -> Iterator[None]:
    from opentelemetry.trace import set_span_in_context, use_span

    token = _INSIDE.set((tracer, set_span_in_context(span)))
    try:
        with use_span(span, end_on_exit=True):  # which marks it where an error leaves it
            yield
    finally:
        _INSIDE.reset(token)


def _add(inside: tuple[Tracer, Context], name: str, start_s: float, end_s: float, **values: Any) -> None:
    tracer, context = inside
    span = tracer.start_span(f"moeplan.{name}", context, attributes=_named(values), start_time=_wall_ns(start_s))
    span.end(_wall_ns(end_s))


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {f"moeplan.{name}": value for name, value in values.items()}


def _wall_ns(monotonic_s: float) -> int:
    """Unix time of a time of `time.monotonic`."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
