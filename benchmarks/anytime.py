"""Quality against time: the best imbalance that each way to plan has after 1, 10 and 100 ms, 1 s and 10 s.

    python benchmarks/anytime.py [TRACE ...] [--plot FILE.svg] [--out FILE.json]

Every cell is a run of its own with that deadline, imports and compilation done before, building of models included.
`cold` means that the solver's own placement is judged, `hinted` that it starts from the incumbent; '-' that there was
none in time. A trace contributes its first layer at its last step, with one spare slot per device and with none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, SplitRule, evaluate, solve, warm_up
from moeplan.solvers.exact.model import Effort, Model
from moeplan.solvers.exact.run import run
from moeplan.solvers.problem.arrays import Int64
from result_file import Columns, cells, write_result
from result_table import show_rows

DEADLINES = {"1_ms": 0.001, "10_ms": 0.01, "100_ms": 0.1, "1_s": 1.0, "10_s": 10.0}
"""Seconds, by the names that results have."""
SIZES = ((64, 8, 9), (60, 8, 8), (256, 32, 9), (256, 64, 5), (256, 144, 2), (384, 128, 4))
COLUMNS: Columns = {
    "instance": ("instance", "{}"),
    "planner": ("planner", "{}"),
    **{key: (f"{seconds:g} s", "{:.5f}") for key, seconds in DEADLINES.items()},
}
WAYS = ("hybrid", "cpsat hinted", "cpsat cold", "highs cold", "eplb")

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An instance and its name."""

    name: str
    problem: Problem


def synthetic() -> list[Case]:
    """Every size with zipf 0.6 and lognormal loads."""
    rng = np.random.default_rng(0)
    cases = []
    for experts, devices, slots in SIZES:
        for kind, weight in (
            ("zipf 0.6", np.arange(1, experts + 1) ** -0.6),
            ("lognormal", rng.lognormal(0, 1, experts)),
        ):
            loads: Int64 = (weight / weight.sum() * 1e6).astype(np.int64)
            problem = Problem(Cluster.uniform(devices, slots), Demand.of(loads))
            cases.append(Case(f"E{experts} D{devices} C{slots} {kind}", problem))
    return cases


def recorded(path: str) -> list[Case]:
    """The first layer of a trace's last step."""
    trace = Trace.open(Path(path))
    loads = next(iter(trace.read(trace.steps - 1)))[0].sum(axis=0)
    devices, experts = trace.sources, trace.experts
    cases = []
    for slots in (experts // devices + 1, experts // devices):
        problem = Problem(Cluster.uniform(devices, slots), Demand.of(loads))
        cases.append(Case(f"E{experts} D{devices} C{slots} {trace.path.stem}", problem))
    return cases


def quality(way: str, problem: Problem, seconds: float) -> tuple[float | None, float]:
    """Imbalance within a deadline, and the seconds that it took."""
    start = time.perf_counter()
    if way == "eplb":
        plan = solve(replace(problem, split_rule=SplitRule.OPTIMAL), policy="eplb")
        took = time.perf_counter() - start
        return (plan.mean_imbalance if took <= seconds + 0.02 else None), took
    parameters = SolveParameters(deadline_s=seconds, target_gap=0)
    if way in ("hybrid", "cpsat hinted"):
        plan = solve(problem, policy="hybrid" if way == "hybrid" else "ilp", parameters=parameters)
        return plan.mean_imbalance, time.perf_counter() - start
    # Cold: only the trivial placement is known, and it is not handed to the judge.
    trivial = Layout.contiguous(problem.experts, problem.capacity)
    mean = problem.loads.sum() / problem.devices
    model = Model(
        problem.loads, np.array([1 / mean]), problem.cluster.speed, problem.capacity, trivial.slots, hinted=False
    )
    answer = run(model, way.split()[0], Effort(start + seconds, np.inf))
    took = time.perf_counter() - start
    if answer.placed is None:
        return None, took
    slots = np.full_like(trivial.slots, -1)
    for row, here in zip(slots, answer.placed, strict=True):
        row[: here.sum()] = np.flatnonzero(here)
    return evaluate(problem, Layout(slots, problem.experts)).mean_imbalance, took


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Small multiples, one per instance with a gap: excess over perfect balance, both axes logarithmic."""
    columns = 3
    instances = [rows[i : i + len(WAYS)] for i in range(0, len(rows), len(WAYS))]
    lines = -(-len(instances) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * lines + 0.5), layout="constrained")
    axes = [*figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat]
    for unused in axes[len(instances) :]:
        unused.remove()
    for lowest in axes[: len(instances)][-columns:]:
        lowest.tick_params(labelbottom=True)
    for axis, instance in zip(axes, instances, strict=False):
        for row in instance:
            way = row["planner"]
            points = [(seconds, max(row[key] - 1, 1e-5)) for key, seconds in DEADLINES.items() if row[key] is not None]
            # Ours is wide and pale, so that it shows under whatever is as good.
            style = {"linewidth": 6.0, "alpha": 0.4} if way == "hybrid" else {"linewidth": 1.5, "alpha": 1.0}
            axis.loglog([x for x, _ in points], [y for _, y in points], marker=".", label=way, **style)
        axis.set_title(instance[0]["instance"], fontsize=9)
        axis.grid(alpha=0.3)
        axis.minorticks_off()
    figure.supxlabel("deadline, seconds")
    figure.supylabel("imbalance - 1")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(WAYS))
    figure.savefig(path)


def main() -> None:
    """Print one table, and draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE")
    parser.add_argument("--plot", type=Path, help="SVG file for the curves, one picture for each instance")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    cases = synthetic() + [case for path in arguments.traces for case in recorded(path)]
    warm_up()
    warm = Problem(Cluster.uniform(12, 2), Demand.of(np.arange(20, 0, -1) ** 2))
    for way in WAYS:
        quality(way, warm, 1.0)
    rows: list[Row] = []
    late = 0.0
    for case in cases:
        for way in WAYS:
            row: Row = {"instance": case.name, "planner": way}
            for key, seconds in DEADLINES.items():
                row[key], took = quality(way, case.problem, seconds)
                if way == "hybrid":
                    late = max(late, took - seconds)
            rows.append(row)
            print(*cells(row, COLUMNS), sep=" | ", file=sys.stderr, flush=True)
    show_rows(f"Imbalance after a deadline; hybrid late by at most {late * 1e3:.0f} ms", rows, COLUMNS)
    if arguments.out:
        write_result(arguments.out, rows)
    if arguments.plot:
        plot(arguments.plot, rows)


if __name__ == "__main__":
    main()
