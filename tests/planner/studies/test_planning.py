"""Planning from a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.planner.studies.evaluating import verdict
from moeplan.planner.studies.planning import PlanRequest, plan_trace
from moeplan.planner.traces import trace
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, evaluate


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
    monkeypatch.setattr(trace, "MOST_BYTES", 1)  # a pass per layer
    for one, other in zip(at_once, plan_trace(request), strict=True):
        assert one.layer == other.layer
        assert one.plan.layout == other.plan.layout
        assert (one.window, one.next_step) == (other.window, other.next_step)


@pytest.mark.parametrize(("until", "judged"), [(7, 7), (None, 7)])
def test_a_verdict_needs_no_further_reading(tmp_path: Path, until: int | None, judged: int) -> None:
    counts = np.random.default_rng(0).integers(1, 99, (8, 1, 4, 8))
    path = tmp_path / "trace.npz"
    np.savez(path, counts=counts)
    cluster = Cluster.uniform(4, 2)
    request = PlanRequest(
        Trace.open(path),
        [0],
        cluster,
        parameters=SolveParameters(work_limit=100),
        until=until,
        current={0: Layout.contiguous(8, cluster.slots)},
    )
    planned = plan_trace(request)
    path.unlink()
    found = verdict(request, planned)
    step = Problem(cluster, Demand.of(counts[judged, 0]))
    assert found["seconds"] == evaluate(step, request.current[0]).cost.mean_s
    assert (found["layers"][0]["next_step"] is None) == (until is None)
