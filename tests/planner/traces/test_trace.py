"""Reading traces: streams, windows, and the judging of policies."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moeplan.planner.studies.policies import Setting, compare
from moeplan.planner.traces import trace as traces
from moeplan.planner.traces.summary import describe
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Forecast, ForecastMethod, SplitRule

COUNTS = np.random.default_rng(1).integers(0, 500, (23, 3, 4, 16)).astype(np.uint16)


@pytest.mark.parametrize("compressed", [True, False])
def test_windows_and_the_step_after(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "trace.npz"
    (np.savez_compressed if compressed else np.savez)(path, counts=COUNTS, first_step=np.int64(7))
    trace = Trace.open(path)
    assert (trace.steps, trace.layers, trace.sources, trace.experts, trace.first_step) == (23, 3, 4, 16, 7)
    windows = list(trace.windows(5, 6))
    assert [window.step for window in windows] == [5, 11, 17]
    assert trace.window_count(5, 6) == 3
    for window in windows:
        assert (window.history == COUNTS[window.step - 5 : window.step]).all()
        assert (window.next == COUNTS[window.step]).all()
    for window in trace.windows(5, 6, layers=[2, 0]):
        assert (window.history == COUNTS[window.step - 5 : window.step, [2, 0]]).all()
        assert (window.next == COUNTS[window.step, [2, 0]]).all()
    for layer, steps in zip([2, 0], trace.by_layer([2, 0], 3, 9), strict=True):
        assert (steps == COUNTS[3:9, layer]).all()
    assert (np.stack(list(trace.read(20))) == COUNTS[20:]).all()


def test_a_trace_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    counts = np.zeros((400, 4, 32, 256), np.uint16)  # 26 MB
    np.savez_compressed(path, counts=counts)
    step = counts[0].size * 8
    del counts
    tracemalloc.start()
    describe(Trace.open(path))
    for _ in Trace.open(path).windows(3, 50):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 14 * step


def test_describe(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    counts = np.zeros((2, 1, 1, 4), np.int64)
    counts[0, 0, 0] = [6, 2, 0, 0]
    counts[1, 0, 0] = [2, 6, 0, 0]
    np.savez(path, counts=counts)
    (layer,) = describe(Trace.open(path))["per_layer"]
    assert layer == {"layer": 0, "tokens": 8, "hottest": 3, "idle": 2, "change": 0.5}


def test_policies_are_judged_on_the_step_after(tmp_path: Path) -> None:
    # The load jumps from experts 0 and 1 to expert 3: static's imbalance is known before and after.
    np.savez(tmp_path / "trace.npz", counts=np.array([[[[6, 6, 0, 0]]], [[[0, 0, 0, 12]]]]))
    setting = Setting(Cluster.uniform(2, 2), layers=[0], forecast=Forecast(window_steps=1))
    (row,) = compare(Trace.open(tmp_path / "trace.npz"), ["static"], setting)["policies"]
    assert row["fitted"]["mean"] == 2
    assert row["next_step"]["even"]["mean"] == 2
    assert row["gap_to_bound"]["mean"] == 1
    assert row["moved_fraction"]["mean"] == 0


def test_windows_larger_than_memory_are_compared_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).integers(0, 500, (41, 8, 8, 64)).astype(np.uint16)
    np.savez(tmp_path / "trace.npz", counts=counts)
    trace = Trace.open(tmp_path / "trace.npz")
    window = 40 * counts[0].size * 8  # 1.3 MB
    mean = Forecast(ForecastMethod.MEAN, window_steps=40)  # scenarios take memory of their own
    setting = Setting(Cluster.uniform(8, 9), range(8), forecast=mean, split_rule=SplitRule.EVEN)
    (at_once,) = compare(trace, ["eplb"], setting)["policies"]
    monkeypatch.setattr(traces, "MOST_BYTES", window // 4)
    tracemalloc.start()
    (in_passes,) = compare(trace, ["eplb"], setting)["policies"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert in_passes["next_step"] == at_once["next_step"]
    assert in_passes["fitted"] == at_once["fitted"]
    assert peak < window
