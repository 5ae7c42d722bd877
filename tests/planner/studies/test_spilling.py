"""`compare --known-counts`: the figures that it reports."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeplan.planner.studies.spilling import compare_known_counts
from moeplan.solvers import ProblemError, QuotaPlanner, SpillOptions


def trace(steps: int = 4, layers: int = 2, sources: int = 4, experts: int = 10) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(5)
    popularity = rng.dirichlet(np.full(experts, 0.5), (steps, layers, 1))
    return rng.multinomial(2000, np.broadcast_to(popularity, (steps, layers, sources, experts)))


def test_report_of_each_policy() -> None:
    counts = trace()
    options = SpillOptions.uniform(10, 4, 1)
    report: Any = compare_known_counts(counts, options, every=2)
    assert json.loads(json.dumps(report)) == report
    static, llep, quota = report["policies"]
    assert [p["policy"] for p in (static, llep, quota)] == ["static", "llep", "quota"]

    home = np.repeat(np.arange(4), [3, 3, 2, 2])
    chosen = counts[::2].sum(axis=2).reshape(-1, 10)
    loads = np.stack([np.bincount(home, weights=w, minlength=4) for w in chosen])
    assert static["imbalance"]["mean"] == pytest.approx((loads.max(axis=1) / loads.mean(axis=1)).mean())
    assert static["replicas"] == {"mean": 0.0, "max": 0}
    local = sum(counts[::2, :, s, home == s].sum() for s in range(4))
    assert static["remote_fraction"]["mean"] == pytest.approx(1 - local / counts[::2].sum())

    planner = QuotaPlanner(options, 4)
    expected = [planner.plan(layer).imbalance for step in counts[::2] for layer in step]
    assert quota["imbalance"]["max"] == max(expected)
    assert quota["imbalance"]["mean"] < static["imbalance"]["mean"]
    assert quota["replicas"]["max"] <= 4
    assert llep["imbalance"]["mean"] < static["imbalance"]["mean"]
    assert 0 < quota["us_per_call"]["p50"] <= quota["us_per_call"]["p99"]


def test_remote_fraction_needs_sources() -> None:
    counts = trace().sum(axis=2, keepdims=True)
    report: Any = compare_known_counts(counts, SpillOptions.uniform(10, 4, 1), ["quota"])
    assert report["policies"][0]["remote_fraction"] == {"mean": None}


def test_invalid_requests_are_refused() -> None:
    options = SpillOptions.uniform(10, 4, 1)
    with pytest.raises(ProblemError, match="must be one of static, llep, quota"):
        compare_known_counts(trace(), options, ["best"])
    with pytest.raises(ProblemError, match="every"):
        compare_known_counts(trace(), options, every=0)
    with pytest.raises(ProblemError, match="the trace has 10"):
        compare_known_counts(trace(), SpillOptions.uniform(12, 4, 1))
    with pytest.raises(ProblemError, match=r"integers .layers, sources, experts"):
        compare_known_counts(trace()[0], options)


def test_one_step_is_held_at_a_time() -> None:
    (step,) = trace(steps=1, layers=8, sources=32, experts=64)
    options = SpillOptions.uniform(64, 4, 1)
    compare_known_counts([step], options, ["quota"])  # compiles
    tracemalloc.start()
    compare_known_counts((step.copy() for _ in range(100)), options, ["quota"], every=10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * step.nbytes
