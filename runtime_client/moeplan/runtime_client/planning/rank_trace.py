"""A rank's part of a trace, where its program has OpenTelemetry set up; without that, nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["RankTrace"]


@dataclass(frozen=True, slots=True)
class RankTrace:
    """The span that the program was in when it made its line to the planner.

    Attributes:
        headers: `traceparent` and `tracestate` (W3C), which put the planner's spans into the same trace.
    """

    headers: tuple[tuple[str, str], ...] = ()
    _context: Any = None

    @classmethod
    def here(cls) -> RankTrace:
        """The span that this thread is in; nobody is in one who has not imported OpenTelemetry."""
        if "opentelemetry.trace" not in sys.modules:
            return cls()
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers)
        return cls(tuple(headers.items()), context.get_current() if headers else None)

    def note(self, name: str, **values: int) -> None:
        """Something that takes no time, as a span of that trace."""
        if self._context is None:
            return
        from opentelemetry import trace

        attributes = {f"moeplan.{key}": value for key, value in values.items()}
        trace.get_tracer("moeplan").start_span(name, self._context, attributes=attributes).end()
