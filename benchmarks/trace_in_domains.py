"""A trace and its devices in link domains, as `TRACE:DEVICES:DOMAINS` names them on the command line."""

from __future__ import annotations

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import SpillOptions

__all__ = ["FORM", "trace_in_domains"]

FORM = "TRACE:DEVICES:DOMAINS"


def trace_in_domains(text: str, spare: int) -> tuple[Trace, SpillOptions]:
    """The trace, and the devices with so many spare slots each."""
    path, devices, domains = text.rsplit(":", 2)
    trace = Trace.open(path)
    return trace, SpillOptions.uniform(trace.experts, int(devices), spare, domain=int(devices) // int(domains))
