"""Layouts for whole models: time and balance of moeplan beside SGLang's planners, on the same loads in the same run.

    python benchmarks/layouts.py [TRACE ...] [--out FILE.json]

SGLang's planners (`deepseek`, `deepseek_vec`) come from the wheel of version 0.5.23, which is downloaded once, without
its dependencies, into a folder outside the repository; only its two pure-torch planner modules are loaded. They plan
with even splits and may put two replicas of an expert on one device; their layouts are judged with the best split as
well, to compare placement alone. `hybrid` plans for these loads alone, as they do; `widened` is its default: it looks
for a layout that is as good on them and suits loads near them, too. All are timed from loads to layouts, which is all
that SGLang's compute; ours check the problem, bound it and divide its tokens, too. Times are the best of several runs
over all layers, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.commands.terminal import show_table
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters
from moeplan.solvers.policies.registry import find
from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.split.flow import optimal_quota
from peers import sglang_planner
from result_file import Columns, cells, write_result

REPEATS = 5
COLUMNS: Columns = {
    "even": ("even", "{:.4f}"),
    "best_split": ("best split", "{:.4f}"),
    "worst_layer": ("(worst layer)", "{:.4f}"),
    "ms": ("ms", "{:.2f}"),
    "speed": ("speed", "{:.2f}x"),
}

Figures = dict[str, float | str | None]


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


def benchmark(size: Size, loads: Int64) -> dict[str, Figures]:
    """Figures of every planner for one size and one kind of load; of one that fails, the error's name."""
    import torch

    torch.set_num_threads(1)
    weight = torch.from_numpy(loads)
    slots = size.devices * size.slots
    cluster = Cluster.uniform(size.devices, size.slots)

    hybrid = find("hybrid")

    def ours(**spread: float) -> Int64:
        layouts = []
        for load in loads:
            demand = Demand.of(load, **spread)
            *_, last = hybrid.search(Problem(cluster, demand), SolveParameters(deadline_s=0.02))
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

    found: dict[str, Figures] = {}
    baseline = 0.0
    planners: dict[str, Callable[[], Int64]] = {
        "sglang deepseek_vec": deepseek_vec,
        "sglang deepseek": deepseek,
        "moeplan hybrid": partial(ours, spread=0.0),
        "moeplan widened": ours,
    }
    for name, run in planners.items():
        try:
            seconds, layouts = best_time(run)
        except Exception as error:  # a peer that cannot plan this size is reported, not hidden
            found[name] = {**dict.fromkeys(COLUMNS), "error": type(error).__name__}
            continue
        baseline = baseline or seconds
        even, optimal = imbalances(layouts, loads, size.devices)
        found[name] = {
            "even": float(even.mean()),
            "best_split": float(optimal.mean()),
            "worst_layer": float(optimal.max()),
            "ms": seconds * 1e3,
            "speed": baseline / seconds,
        }
    return found


def with_error(figures: Figures) -> list[str]:
    """A planner's figures as shown; where it failed, the error stands in the last column."""
    shown = cells(figures, COLUMNS)
    return [*shown[:-1], str(figures.get("error", shown[-1]))]


def in_one_row(size: str, kind: str, found: dict[str, Figures]) -> dict[str, Any]:
    """All planners' figures side by side, named by planner: `hybrid_ms`."""
    figures = {f"{name.split()[-1]}_{key}": value for name, figures in found.items() for key, value in figures.items()}
    return {"size": size, "loads": kind, **figures}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    measured: list[tuple[str, str, dict[str, Figures]]] = []
    for size in SIZES:
        shape = (size.layers, size.experts)
        zipf = rng.permuted(np.tile(np.arange(1, size.experts + 1) ** -0.6, (size.layers, 1)), axis=1)
        for kind, weights in (("lognormal", rng.lognormal(0, 1, shape)), ("zipf 0.6", zipf)):
            loads = (weights / weights.sum(axis=1, keepdims=True) * 1_000_000).astype(np.int64)
            measured.append((str(size), kind, benchmark(size, loads)))
    for path in arguments.traces:
        trace = Trace.open(path)
        steps = np.stack(list(trace.read(trace.steps - 10))).sum(axis=(0, 3))
        devices = trace.sources
        size = Size(trace.layers, trace.experts, devices, trace.experts // devices + 1)
        measured.append((str(size), trace.path.stem, benchmark(size, steps)))
    show_table(
        "Layouts of all layers from one load vector per layer; imbalance is max/mean per layer",
        ["size", "loads", "planner", *(title for title, _ in COLUMNS.values())],
        [[size, kind, name, *with_error(figures)] for size, kind, found in measured for name, figures in found.items()],
    )
    if arguments.out:
        write_result(arguments.out, [in_one_row(*each) for each in measured])


if __name__ == "__main__":
    main()
