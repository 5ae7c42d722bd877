"""Quality against time: the best imbalance that each way to plan has after 1, 10 and 100 ms, 1 s and 10 s.

    python benchmarks/anytime.py [--plot FILE.svg] [TRACE ...]

Every cell is a run of its own with that deadline, imports and compilation done before, building of models included.
`cold` means that the solver's own placement is judged, `hinted` that it starts from the incumbent; '-' that there was
none in time. A trace contributes its first layer at its last step, with one spare slot per device and with none.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moeplan.planner.commands.terminal import show_table
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, SplitRule, evaluate, solve, warm_up
from moeplan.solvers.exact.model import Effort, Model
from moeplan.solvers.exact.run import run
from moeplan.solvers.problem.arrays import Int64

SECONDS = (0.001, 0.01, 0.1, 1.0, 10.0)
SIZES = ((64, 8, 9), (60, 8, 8), (256, 32, 9), (256, 64, 5), (256, 144, 2), (384, 128, 4))
WAYS = ("hybrid", "cpsat hinted", "cpsat cold", "highs cold", "eplb")


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


def plot(path: Path, rows: dict[str, dict[str, list[float | None]]]) -> None:
    """Small multiples, one per instance with a gap: excess over perfect balance, both axes logarithmic."""
    columns = 3
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis, (name, ways) in zip(axes, rows.items(), strict=False):
        for way, values in ways.items():
            points = [(seconds, max(v - 1, 1e-5)) for seconds, v in zip(SECONDS, values, strict=True) if v is not None]
            # Ours is wide and pale, so that it shows under whatever is as good.
            style = {"linewidth": 6.0, "alpha": 0.4} if way == "hybrid" else {"linewidth": 1.5, "alpha": 1.0}
            axis.loglog([x for x, _ in points], [y for _, y in points], marker=".", label=way, **style)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel("deadline, seconds")
    figure.supylabel("imbalance - 1")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    figure.savefig(path)


def main() -> None:
    """Print one table, and draw it."""
    arguments = sys.argv[1:]
    target = Path(arguments.pop(1)) if arguments[:1] == ["--plot"] else None
    if target:
        arguments.pop(0)
    cases = synthetic() + [case for path in arguments for case in recorded(path)]
    warm_up()
    warm = Problem(Cluster.uniform(12, 2), Demand.of(np.arange(20, 0, -1) ** 2))
    for way in WAYS:
        quality(way, warm, 1.0)
    table, drawn, late = [], {}, 0.0
    for case in cases:
        ways: dict[str, list[float | None]] = {}
        for way in WAYS:
            values = []
            for seconds in SECONDS:
                value, took = quality(way, case.problem, seconds)
                values.append(value)
                if way == "hybrid":
                    late = max(late, took - seconds)
            ways[way] = values
            table.append([case.name, way, *("-" if v is None else f"{v:.5f}" for v in values)])
        drawn[case.name] = ways
        for row in table[-len(WAYS) :]:
            print(*row, sep=" | ", file=sys.stderr, flush=True)
    show_table(
        f"Imbalance after a deadline; hybrid late by at most {late * 1e3:.0f} ms",
        ["instance", "planner", *(f"{s:g} s" for s in SECONDS)],
        table,
    )
    if target:
        plot(target, drawn)


if __name__ == "__main__":
    main()
