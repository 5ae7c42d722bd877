"""Next step: what a limit of moves costs in balance, beside EPLB and the floor.

    python benchmarks/next_step.py TRACE:DEVICES:SLOTS ... [--offsets 0,10] [--plot FILE.svg] [--out FILE.json]

As `moeplan compare` does, a plan is made from ten steps and judged on the one after them, every 20 steps, from each of
the start offsets, with the best split. The floor is the layout planned from the very step that it is judged on, where
moves are free: what perfect foresight would reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeplan.planner.studies.policies import Row, Setting, compare
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Forecast
from result_file import write_result

LIMITS = (0, 4, 8, 16, 28, 48, None)
WINDOW, EVERY = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="+", metavar="TRACE:DEVICES:SLOTS")
    parser.add_argument("--offsets", default="0,10", help="first steps, comma-separated")
    parser.add_argument("--plot", type=Path, help="SVG file for the curve of moves against imbalance")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    offsets = [int(offset) for offset in arguments.offsets.split(",")]
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    measured: list[dict[str, Any]] = []
    for text in arguments.traces:
        path, devices, slots = text.rsplit(":", 2)
        trace, cluster = Trace.open(path), Cluster.uniform(int(devices), int(slots))
        table = Table("policy", "max moves", "moved", "mean", "p95", "max", "ms/layer", title=f"{text}, from {offsets}")
        figures = [figures_of("eplb", "-", rows(trace, cluster, "eplb", None, offsets))]
        points = []
        for limit in track(LIMITS, path, transient=True):
            found = rows(trace, cluster, "hybrid", limit, offsets)
            figures.append(figures_of("hybrid", "no limit" if limit is None else str(limit), found))
            points.append((100 * moved(found), mean(found, "mean")))
        foreseen = rows(trace, cluster, "hybrid", None, offsets, foresight=True)
        figures.append(figures_of("hybrid", "foresight", foreseen))
        for row in figures:
            show(table, row)
        measured.extend({"trace": Path(text).name, "offsets": offsets, **row} for row in figures)
        Console().print(table)
        lines.append((f"{Path(path).stem}, {devices} x {slots}", sorted(points)))
    if arguments.out:
        write_result(arguments.out, measured)
    if arguments.plot:
        plot(arguments.plot, lines)


def plot(path: Path, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> None:
    """Moves against imbalance, one line for each trace."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (name, points), marker in zip(lines, "osD^v*" * len(lines), strict=False):
        axis.plot(*zip(*points, strict=True), marker=marker, label=name)
    axis.set(title="Moves against imbalance", xlabel="slots moved per re-plan, %", ylabel="next step, max/mean")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)


def rows(
    trace: Trace, cluster: Cluster, policy: str, limit: int | None, offsets: Sequence[int], *, foresight: bool = False
) -> list[Row]:
    """What `compare` found from each offset."""
    setting = Setting(
        cluster,
        range(trace.layers),
        max_moves=limit,
        forecast=Forecast(window_steps=WINDOW),
        every=EVERY,
        foresight=foresight,
    )
    return [row for offset in offsets for row in compare(trace, [policy], replace(setting, first=offset))["policies"]]


def figures_of(policy: str, limit: str, found: Sequence[Row]) -> dict[str, Any]:
    """A row of the table, as numbers."""
    return {
        "policy": policy,
        "max_moves": limit,
        "moved": moved(found),
        "mean": mean(found, "mean"),
        "p95": mean(found, "p95"),
        "max": max(row["next_step"]["optimal"]["max"] for row in found),
        "ms_per_layer": float(np.median([row["plan_ms_per_layer"]["p50"] for row in found])),
    }


def show(table: Table, row: dict[str, Any]) -> None:
    imbalances = [f"{row['mean']:.4f}", f"{row['p95']:.4f}", f"{row['max']:.3f}"]
    table.add_row(row["policy"], row["max_moves"], f"{row['moved']:.1%}", *imbalances, f"{row['ms_per_layer']:.0f}")


def mean(found: Sequence[Row], figure: str) -> float:
    return float(np.mean([row["next_step"]["optimal"][figure] for row in found]))


def moved(found: Sequence[Row]) -> float:
    return float(np.mean([row["moved_fraction"]["mean"] for row in found]))


if __name__ == "__main__":
    main()
