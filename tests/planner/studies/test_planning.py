"""Planning from a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.planner.studies import planning
from moeplan.planner.studies.planning import PlanRequest, plan_trace
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, SolveParameters


def test_a_window_that_is_read_in_passes_gives_the_same_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).integers(1, 99, (8, 3, 4, 8))
    np.savez(tmp_path / "trace.npz", counts=counts)
    request = PlanRequest(
        Trace.open(tmp_path / "trace.npz"),
        [0, 2],
        Cluster.uniform(4, 3),
        parameters=SolveParameters(work_limit=100),
        until=7,
    )
    at_once = plan_trace(request)
    monkeypatch.setattr(planning, "MOST_BYTES", 1)  # a pass per layer
    for one, other in zip(at_once, plan_trace(request), strict=True):
        assert one.layer == other.layer
        assert one.plan.layout == other.plan.layout
        assert (one.window, one.next_step) == (other.window, other.next_step)
