"""Scale: time and memory of the default policy against experts, devices, scenarios and layers.

    python benchmarks/scale.py [--axes experts,layers] [--plot FILE.svg] [--out FILE.json]

Along each axis the size doubles and all else stays. Every point is a process of its own that has loaded its kernels;
time is its processor time, which other work on the machine disturbs least: until the first plan within 1 % of the final
one, and until that one, at the default limit of work. Memory is what the solves add to the peak of the process. The
slope of a line is the power with which it grows, by least squares over its upper half: below, fixed costs hide it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

from moeplan.planner.commands.terminal import show_table
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters, solve_anytime, warm_up
from result_file import write_result

NEAR = 1.01
"""A plan at most this much above the final one counts as arrived."""

AXES: dict[str, tuple[str, tuple[int, ...], Callable[[int], tuple[int, int, int, int, int]]]] = {
    "experts": (
        "32 devices, 1 spare slot each, 4 scenarios",
        (64, 128, 256, 512, 1024, 2048),
        lambda n: (n, 32, 4, 1, 1),
    ),
    "devices": (
        "1,024 experts, 1 spare slot each, 4 scenarios",
        (8, 16, 32, 64, 128, 256),
        lambda n: (1024, n, 4, 1, 1),
    ),
    "scenarios": (
        "256 experts, 32 devices, 1 spare slot each",
        (1, 2, 4, 8, 16, 32, 64, 128),
        lambda n: (256, 32, n, 1, 1),
    ),
    "layers": (
        "64 experts, 16 devices, 1 spare slot each, 4 scenarios",
        (1, 2, 4, 8, 16, 32),
        lambda n: (64, 16, 4, n, 1),
    ),
}
"""Each axis: what stays, the sizes, and experts, devices, scenarios, layers and spare slots of a device at a size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--axes", default=",".join(AXES), help="axes, comma-separated")
    parser.add_argument("--plot", type=Path, help="SVG file for the curves")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    rows = [row for axis in arguments.axes.split(",") for row in measured(axis)]
    show_table(
        "hybrid, default limit of work",
        ["axis", "size", "near, s", "final, s", "memory, MiB", "imbalance"],
        [
            [row["axis"], str(row["size"]), *(f"{row[name]:.3g}" for name in FIGURES), f"{row['final']:.4f}"]
            for row in rows
        ],
    )
    slopes = [slope for axis in arguments.axes.split(",") for slope in slopes_of(axis, rows)]
    show_table(
        "slopes",
        ["axis", "near", "final"],
        [[row["axis"], *(f"{row[name]:.2f}" for name in TIMES)] for row in slopes],
    )
    if arguments.out:
        write_result(arguments.out, [*rows, *slopes])
    if arguments.plot:
        plot(arguments.plot, rows)


TIMES = ("near_s", "final_s")
FIGURES = (*TIMES, "memory_mib")


def measured(axis: str) -> list[dict[str, Any]]:
    """A row for each size of an axis, each from a process of its own."""
    rows = []
    for size in track(AXES[axis][1], axis, transient=True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(
                {"kind": "size", "axis": axis, "size": size, **pool.submit(point, *AXES[axis][2](size)).result()}
            )
    return rows


def point(experts: int, devices: int, scenarios: int, layers: int, spare: int) -> dict[str, float]:
    """Time and memory of one size, over all layers."""
    warm_up()
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 1, (layers, 1, experts))
    loads = (base * rng.lognormal(0, 0.3, (layers, scenarios, experts)) * 1_000).astype(np.int64)
    cluster = Cluster.uniform(devices, experts // devices + spare)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    near = final = 0.0
    imbalance = []
    for of_layer in loads:
        start = time.process_time()
        found = [
            (time.process_time() - start, plan.objective)
            for plan in solve_anytime(Problem(cluster, Demand.of(of_layer[:, None])), parameters=SolveParameters())
        ]
        imbalance.append(found[-1][1])
        near += next(seconds for seconds, objective in found if objective <= found[-1][1] * NEAR)
        final += found[-1][0]
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"near_s": near, "final_s": final, "memory_mib": added / 1024, "final": float(np.mean(imbalance))}


def slopes_of(axis: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The powers with which an axis' figures grow, over the upper half of its sizes."""
    of_axis = [row for row in rows if row["axis"] == axis]
    upper = of_axis[len(of_axis) // 2 - 1 :]
    sizes = np.log([row["size"] for row in upper])
    fitted = {name: float(np.polyfit(sizes, np.log([max(row[name], 1e-6) for row in upper]), 1)[0]) for name in TIMES}
    return [{"kind": "slope", "axis": axis, "stays": AXES[axis][0], **fitted}] if len(upper) > 1 else []


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """One panel for each axis: seconds until near and until final, both axes logarithmic."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3.2 * len(axes), 3), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False).flat
    for panel, axis in zip(panels, axes, strict=True):
        points = [row for row in rows if row["axis"] == axis]
        for name, label, marker in (("near_s", "within 1 %", "o"), ("final_s", "final plan", "s")):
            panel.loglog([row["size"] for row in points], [row[name] for row in points], marker=marker, label=label)
        panel.set(title=axis, xlabel=f"{axis}\n{AXES[axis][0]}")
        panel.xaxis.label.set_size(7)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("processor seconds")
    panels[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
