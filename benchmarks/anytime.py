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
    """Small multiples, one per instance with a gap: excess over perfect balance, both axes logarithmic, as SVG."""
    width, height, margin, columns = 260, 170, 44, 3
    colours = dict(zip(WAYS, ("#1668b8", "#c44e00", "#e0a030", "#7a4fa3", "#5a5a5a"), strict=True))
    lines = ["<style>text{font:10px sans-serif}</style>"]
    for i, (name, ways) in enumerate(rows.items()):
        left, top = (i % columns) * width + margin, (i // columns) * height + 24
        right, bottom = left + width - margin - 14, top + height - 48
        lines.append(f'<text x="{left}" y="{top - 6}">{name}</text>')
        lines.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#999"/>')
        for power in range(-5, 1):
            y = bottom + (power + 5) / 5 * (top - bottom)
            lines.append(f'<text x="{left - 4}" y="{y + 3:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for k, seconds in enumerate(SECONDS):
            x = left + k / (len(SECONDS) - 1) * (right - left)
            lines.append(f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="middle">{seconds:g} s</text>')
        for way, values in ways.items():
            points = [
                (
                    left + k / (len(SECONDS) - 1) * (right - left),
                    bottom + (max(-5.0, min(0.0, np.log10(max(v - 1, 1e-5)))) + 5) / 5 * (top - bottom),
                )
                for k, v in enumerate(values)
                if v is not None
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            # Ours is wide and pale, so that it shows under whatever is as good.
            stroke = 'stroke-width="6" stroke-opacity="0.4"' if way == "hybrid" else 'stroke-width="1.5"'
            lines.append(f'<polyline points="{line}" fill="none" stroke="{colours[way]}" {stroke}/>')
            lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colours[way]}"/>' for x, y in points]
    total = ((len(rows) + columns - 1) // columns) * height + 30
    for k, way in enumerate(WAYS):
        lines.append(f'<text x="{margin + 110 * k}" y="{total - 8}" fill="{colours[way]}">{way}</text>')
    body = "\n".join(lines)
    size = f'width="{columns * width}" height="{total}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect {size} fill="white"/>\n{body}\n</svg>\n')


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
