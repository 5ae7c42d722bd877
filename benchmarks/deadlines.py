"""Deadlines: how late the default policy ends under every kind of limit.

    python benchmarks/deadlines.py [--kinds moves,memory] [--seeds 5] [--out FILE.json]

384 experts on 128 devices of 16 nodes, 4 slots each, 16 scenarios, lognormal loads. Kernels are loaded, and one solve
of each kind has been made before. Time is the wall's, in which other work on the machine shows, and that of the solving
thread's processor, in which it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from moeplan.planner.commands.terminal import show_table
from moeplan.solvers import Cluster, Demand, Problem, ProblemError, SolveParameters, SplitRule, solve, warm_up
from result_file import write_result
from small_problems import KINDS, Limit

EXPERTS, DEVICES, NODES, SLOTS, SCENARIOS = 384, 128, 16, 4, 16
DEADLINES_S = (0.01, 0.02, 0.1, 1.0)


def few_moves(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(KINDS["moves"](problem, rng), max_moves=40)


def by_rule(rule: SplitRule, problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, split_rule=rule)


def speeds(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, cluster=replace(problem.cluster, speed=rng.choice([0.5, 1.0, 1.5], problem.devices)))


RULES = {rule.value: partial(by_rule, rule) for rule in SplitRule if rule is not SplitRule.OPTIMAL}
LIMITS: dict[str, Sequence[Limit]] = {
    **{kind: (limit,) for kind, limit in KINDS.items() if kind not in ("moves", "even")},
    "moves": (few_moves,),
    "unequal speeds": (speeds,),
    "domains and moves": (few_moves, KINDS["domains"]),
    "domains and memory": (KINDS["memory"], KINDS["domains"]),
    "moves and memory": (few_moves, KINDS["memory"]),
    **{rule: (limit,) for rule, limit in RULES.items()},
    **{f"{rule} and domains": (KINDS["domains"], limit) for rule, limit in RULES.items()},
    **{f"{rule} and memory": (KINDS["memory"], limit) for rule, limit in RULES.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", default=",".join(LIMITS), help="kinds of limit, comma-separated")
    parser.add_argument("--seeds", type=int, default=5, help="problems of each kind")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    warm_up()
    rows = [measured(kind, arguments.seeds) for kind in track(arguments.kinds.split(","), transient=True)]
    titles = [title(seconds) for seconds in DEADLINES_S]
    show_table(
        "late by, ms: wall median, wall most, processor most",
        ["limit", "problems", *titles],
        [
            [
                row["kind"],
                str(row["problems"]),
                *(f"{row[f'wall_{t}']:.0f} {row[f'wall_most_{t}']:.0f} {row[f'cpu_most_{t}']:.0f}" for t in titles),
            ]
            for row in rows
        ],
    )
    if arguments.out:
        write_result(arguments.out, rows)


def title(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}ms"


def measured(kind: str, seeds: int) -> dict[str, Any]:
    """A row of the table: milliseconds late, none where a plan came before."""
    problems = [problem for seed in range(seeds) if (problem := problem_of(kind, seed)) is not None]
    row: dict[str, Any] = {"kind": kind, "problems": len(problems)}
    for seconds in DEADLINES_S:
        parameters = SolveParameters(deadline_s=seconds)
        attempt(problems[0], parameters)
        late = np.array([attempt(problem, parameters) for problem in problems]) - seconds
        wall, cpu = np.maximum(late, 0).T * 1e3
        row |= {
            f"wall_{title(seconds)}": float(np.median(wall)),
            f"wall_most_{title(seconds)}": float(wall.max()),
            f"cpu_most_{title(seconds)}": float(cpu.max()),
        }
    return row


def attempt(problem: Problem, parameters: SolveParameters) -> tuple[float, float]:
    """Seconds of a solve, by the wall and of this thread's processor; one that finds no plan takes its time, too."""
    wall, cpu = time.perf_counter(), time.thread_time()
    with contextlib.suppress(ProblemError):
        solve(problem, parameters=parameters)
    return time.perf_counter() - wall, time.thread_time() - cpu


def problem_of(kind: str, seed: int) -> Problem | None:
    """A random problem with a limit of that kind; None where the draw contradicts itself."""
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(4, 1.0, (1, 1, EXPERTS)) * rng.lognormal(0, 0.3, (SCENARIOS, DEVICES, EXPERTS))
    try:
        problem = Problem(Cluster.uniform(DEVICES, SLOTS, nodes=NODES), Demand.of(loads.astype(np.int64)))
        for limit in LIMITS[kind]:
            problem = limit(problem, rng)
    except ProblemError:
        return None
    return problem


if __name__ == "__main__":
    main()
