"""Layouts for whole models: time and balance of moeplan beside SGLang's planners, on the same loads in the same run.

    python benchmarks/layouts.py [TRACE ...]

SGLang's planners (`deepseek`, `deepseek_vec`) come from the wheel of version 0.5.23, which is downloaded once, without
its dependencies, into a folder outside the repository; only its two pure-torch planner modules are loaded. They plan
with even splits and may put two replicas of an expert on one device; their layouts are judged with the best split as
well, to compare placement alone. All planners are timed from loads to layouts, which is all that SGLang's compute;
splits and proofs come on top. Times are the best of several runs over all layers, one thread each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplan.planner.commands.terminal import show_table
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters
from moeplan.solvers.policies.registry import find
from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.split.flow import optimal_quota
from peers import sglang_planner

REPEATS = 5


@dataclass(frozen=True)
class Size:
    """A model and a cluster: layers, experts, devices, slots per device."""

    layers: int
    experts: int
    devices: int
    slots: int

    def __str__(self) -> str:
        return f"L{self.layers} E{self.experts} D{self.devices} C{self.slots}"


SIZES = [
    Size(58, 256, 32, 9),
    Size(58, 256, 64, 5),
    Size(58, 256, 144, 2),
    Size(94, 128, 16, 9),
    Size(32, 8, 8, 2),
    Size(61, 384, 128, 4),
    Size(1, 32, 1024, 8),
]


def best_time(function: Callable[[], object]) -> tuple[float, Any]:
    """Seconds of the fastest of several runs, and the last result."""
    times = []
    result = None
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def imbalances(slots: Int64, loads: Int64, devices: int) -> tuple[Float64, Float64]:
    """float64[layers]: max/mean with even and with best split, of ``slots[layers, devices, slots]``."""
    even, optimal = [], []
    for layer_slots, load in zip(slots, loads, strict=True):
        share = load / np.maximum(np.bincount(layer_slots[layer_slots >= 0], minlength=len(load)), 1)
        mean = load.sum() / devices
        even.append(np.where(layer_slots >= 0, share[layer_slots], 0).sum(axis=1).max() / mean)
        distinct = np.array([np.where(_first_of_kind(row), row, -1) for row in layer_slots], np.int32)
        quota, _ = optimal_quota(distinct, load[None], np.ones(devices))
        optimal.append(quota.sum(axis=2).max() / mean)
    return np.array(even), np.array(optimal)


def _first_of_kind(row: Int64) -> np.ndarray[Any, np.dtype[np.bool_]]:
    first = np.zeros(len(row), np.bool_)
    first[np.unique(row, return_index=True)[1]] = True
    return first


def benchmark(size: Size, kind: str, loads: Int64) -> list[list[str]]:
    """Rows of the table for one size and one kind of load."""
    import torch

    torch.set_num_threads(1)
    weight = torch.from_numpy(loads)
    slots = size.devices * size.slots
    cluster = Cluster.uniform(size.devices, size.slots)

    hybrid = find("hybrid")

    def ours() -> Int64:
        layouts = []
        for load in loads:
            *_, last = hybrid.search(Problem(cluster, Demand.of(load)), SolveParameters(deadline_s=0.02))
            layouts.append(last.layout.slots)
        return np.stack(layouts)

    def deepseek() -> Int64:
        planner = sglang_planner("deepseek")
        found = planner.rebalance_experts(weight, slots, 1, 1, size.devices, False)[0]
        layouts: Int64 = found.numpy().reshape(len(loads), size.devices, size.slots)
        return layouts

    def deepseek_vec() -> Int64:
        planner = sglang_planner("deepseek_vec")
        found = planner.rebalance_experts(weight[None].float(), slots, size.slots, None, 1, False)[0]
        layouts: Int64 = found.numpy().reshape(len(loads), size.devices, size.slots)
        return layouts

    rows = []
    baseline = 0.0
    for name, run in (("sglang deepseek_vec", deepseek_vec), ("sglang deepseek", deepseek), ("moeplan hybrid", ours)):
        try:
            seconds, layouts = best_time(run)
        except Exception as error:  # a peer that cannot plan this size is reported, not hidden
            rows.append([str(size), kind, name, "-", "-", "-", "-", type(error).__name__])
            continue
        baseline = baseline or seconds
        even, optimal = imbalances(layouts, loads, size.devices)
        rows.append(
            [
                str(size),
                kind,
                name,
                f"{even.mean():.4f}",
                f"{optimal.mean():.4f}",
                f"{optimal.max():.4f}",
                f"{seconds * 1e3:.2f}",
                f"{baseline / seconds:.2f}x",
            ]
        )
    return rows


def main() -> None:
    """Print one table."""
    rng = np.random.default_rng(0)
    rows = []
    for size in SIZES:
        shape = (size.layers, size.experts)
        zipf = rng.permuted(np.tile(np.arange(1, size.experts + 1) ** -0.6, (size.layers, 1)), axis=1)
        for kind, weights in (("lognormal", rng.lognormal(0, 1, shape)), ("zipf 0.6", zipf)):
            loads = (weights / weights.sum(axis=1, keepdims=True) * 1_000_000).astype(np.int64)
            rows += benchmark(size, kind, loads)
    for path in sys.argv[1:]:
        trace = Trace.open(path)
        steps = np.stack(list(trace.read(trace.steps - 10))).sum(axis=(0, 3))
        devices = trace.sources
        size = Size(trace.layers, trace.experts, devices, trace.experts // devices + 1)
        rows += benchmark(size, trace.path.stem, steps)
    show_table(
        "Layouts of all layers from one load vector per layer; imbalance is max/mean per layer",
        ["size", "loads", "planner", "even", "best split", "(worst layer)", "ms", "speed"],
        rows,
    )


if __name__ == "__main__":
    main()
