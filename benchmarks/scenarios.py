"""How many scenarios a window deserves: the next step, when it is planned for few of them or for many.

    python benchmarks/scenarios.py TRACE:DEVICES:SLOTS:MOVES ... [--counts 24,48] [--offsets 0] [--out FILE.json]

As `moeplan compare` does, a plan is made from ten steps with a limit of moves and judged on the one after them with the
best split, every 20 steps, in every layer. A seed is of the draws of the scenarios and of the search. One plan differs
from another seed's by more than from another count's, so all seeds stand in the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters, SplitRule, Widening, evaluate, solve, widened
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.layout import Layout
from result_file import write_result

WINDOW, EVERY = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="+", metavar="TRACE:DEVICES:SLOTS:MOVES")
    parser.add_argument("--counts", type=integers, default=(16, 24, 32, 48, 64), help="numbers of scenarios")
    parser.add_argument("--offsets", type=integers, default=(0,), help="first steps, comma-separated")
    parser.add_argument("--seeds", type=integers, default=(0, 1, 2))
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    measured = []
    for text in arguments.traces:
        path, devices, slots, moves = text.rsplit(":", 3)
        trace, cluster = Trace.open(path), Cluster.uniform(int(devices), int(slots))
        runs = [(count, seed) for count in arguments.counts for seed in arguments.seeds]
        found: dict[int, list[np.ndarray[Any, np.dtype[np.float64]]]] = {}
        for count, seed in track(runs, trace.path.name, transient=True):
            how = Widening(scenarios=count, seed=seed)
            steps = [
                follow(trace, cluster, int(moves), partial(widened, widening=how), seed, offset)
                for offset in arguments.offsets
            ]
            found.setdefault(count, []).append(np.concatenate(steps))
        for count, of_seeds in found.items():
            measured.append({"trace": trace.path.stem, "max_moves": int(moves), "scenarios": count, **row(of_seeds)})
            Console().print(measured[-1])
    if arguments.out:
        write_result(arguments.out, measured)


def integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def follow(
    trace: Trace,
    cluster: Cluster,
    moves: int,
    coming: Callable[[Int64], Demand],
    seed: int,
    first: int,
    tail: float = 1.0,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64[layer-steps, 4]: imbalance planned for and of the next step, part of the slots moved, seconds.

    Args:
        trace: What is planned and judged on, layer by layer in each step.
        cluster: Devices and slots.
        moves: Limit of a re-plan.
        coming: From a window int64[steps, sources, experts] to the demand to plan for.
        seed: Seed of the search.
        first: Step that the first window begins with.
        tail: Part of the scenarios that plans are for, the worst ones.
    """
    found = []
    current: list[Layout | None] = [None] * trace.layers
    for window in trace.windows(WINDOW, EVERY, first, range(trace.layers)):
        for layer in range(trace.layers):
            limited = None if current[layer] is None else moves
            demand = coming(window.history[:, layer])
            problem = Problem(cluster, demand, current=current[layer], max_moves=limited, tail=tail)
            plan = solve(problem, parameters=SolveParameters(seed=seed))
            after = replace(problem, demand=Demand.of(window.next[layer]), current=None, max_moves=None, tail=1.0)
            judged = evaluate(after, plan.layout, SplitRule.OPTIMAL).mean_imbalance
            moved = np.nan if plan.moves is None else len(plan.moves) / cluster.total_slots  # the first plan is free
            found.append([plan.mean_imbalance, judged, moved, plan.seconds])
            current[layer] = plan.layout
    return np.array(found)


def row(of_seeds: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> dict[str, Any]:
    """Means over all layer-steps, and that of the next step by seed."""
    together = np.concatenate(of_seeds)
    means = [float(each[:, 1].mean()) for each in of_seeds]
    return {
        "layer_steps": len(of_seeds[0]),
        "seeds": len(of_seeds),
        "fitted": float(together[:, 0].mean()),
        "next_step": float(together[:, 1].mean()),
        "next_step_least": min(means),
        "next_step_most": max(means),
        "error": float(np.stack(of_seeds)[..., 1].mean(axis=0).std(ddof=1) / np.sqrt(len(of_seeds[0]))),
        "moved": float(np.nanmean(together[:, 2])),
        "plan_ms": float(np.median(together[:, 3]) * 1e3),
    }


if __name__ == "__main__":
    main()
