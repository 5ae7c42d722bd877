"""Small problems of every kind of limit: how often the default policy misses the optimum, and by how much.

    python benchmarks/small_problems.py [--count 2000] [--kinds moves,memory] [--out FILE.json]

Up to 10 experts on 4 devices, with unequal slots and, every other time, unequal speeds; default parameters. A plan that
proves itself is taken at its word. The optimum of others is that of the exact model, given more work; where even that
proves none, its best plan counts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from moeplan.planner.commands.terminal import show_table
from moeplan.solvers import (
    Cluster,
    Constraints,
    Demand,
    ExpertSpec,
    Layout,
    Problem,
    SolveParameters,
    SplitRule,
    Termination,
    solve,
)
from moeplan.solvers.problem.errors import ProblemError
from result_file import write_result

TOLERANCE = 2e-4
"""A plan this much above the optimum is as good: twice the default gap, as both may stop at it."""

REFERENCE = SolveParameters(work_limit=20_000)

Limit = Callable[[Problem, np.random.Generator], Problem]
"""Adds a limit to a random problem."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=2_000, help="problems of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of limit, comma-separated")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON, written after each kind")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor() as pool:
        for kind in arguments.kinds.split(","):
            rows.append(measured(kind, arguments.count, pool))
            if arguments.out:
                write_result(arguments.out, rows)
    show_table(
        "hybrid against the exact model",
        ["limit", "problems", "missed", "part", "worst", "seed of the worst"],
        [
            [
                row["kind"],
                str(row["problems"]),
                str(row["missed"]),
                f"{row['missed'] / row['problems']:.2%}",
                f"{row['worst']:.3%}",
                str(row["worst_seed"]),
            ]
            for row in rows
        ],
    )


def measured(kind: str, count: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """A row of the table, of the first ``count`` seeds whose draw does not contradict itself."""
    excess: dict[int, float] = {}
    seeds = itertools.count()
    with Progress(transient=True) as progress:
        task = progress.add_task(kind, total=count)
        while len(excess) < count:
            drawn = list(itertools.islice(seeds, count - len(excess)))
            for seed, found in zip(drawn, pool.map(partial(excess_of, kind), drawn), strict=True):
                if found is not None:
                    excess[seed] = found
                    progress.advance(task)
    worst_seed = max(excess, key=excess.__getitem__)
    missed = sum(found > TOLERANCE for found in excess.values())
    return {"kind": kind, "problems": count, "missed": missed, "worst": excess[worst_seed], "worst_seed": worst_seed}


def excess_of(kind: str, seed: int) -> float | None:
    """How far the default policy's plan is above the optimum; None where the draw contradicts itself."""
    try:
        problem = problem_of(kind, seed)
        plan = solve(problem)
    except ProblemError:
        return None
    if plan.termination in (Termination.PROVED, Termination.TARGET_GAP):
        return 0.0
    return max(0.0, plan.objective / solve(problem, policy="ilp", parameters=REFERENCE).objective - 1)


def problem_of(kind: str, seed: int) -> Problem:
    """A random problem with a limit of that kind."""
    rng = np.random.default_rng(seed)
    devices, experts, scenarios = int(rng.integers(2, 5)), int(rng.integers(2, 11)), int(rng.integers(1, 4))
    slots = rng.integers(1, 5, devices)
    while np.minimum(slots, experts).sum() < experts:
        slots = slots + 1
    speed = rng.choice([0.5, 1.0, 1.5, 2.0, 3.7], devices) if seed % 2 else np.ones(devices)
    node = np.arange(devices) * min(2, devices) // devices
    loads = rng.lognormal(4, rng.choice([0.3, 1.0, 2.0]), (scenarios, 1, experts)).astype(np.int64)
    return KINDS[kind](Problem(Cluster(slots.astype(np.int32), node.astype(np.int32), speed), Demand.of(loads)), rng)


def in_force(problem: Problem, rng: np.random.Generator) -> Problem:
    """With a random layout in force: one replica of each expert, and others in about half of the further slots."""
    slots = np.full((problem.devices, int(problem.cluster.slots.max())), -1, np.int32)
    used = np.zeros(problem.devices, np.int64)
    for expert in rng.permutation(problem.experts):
        device = rng.choice(np.flatnonzero(used < problem.capacity))
        slots[device, used[device]] = expert
        used[device] += 1
    for device in range(problem.devices):
        absent = rng.permutation(np.setdiff1d(np.arange(problem.experts), slots[device]))
        further = absent[: rng.integers(0, problem.capacity[device] - used[device] + 1)]
        slots[device, used[device] : used[device] + len(further)] = further
    return replace(problem, current=Layout(slots, problem.experts))


def moves(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(in_force(problem, rng), max_moves=int(rng.integers(0, 5)))


def failed(problem: Problem, rng: np.random.Generator) -> Problem:
    return moves(problem, rng).without([int(rng.integers(problem.devices))])


def pairs(problem: Problem, rng: np.random.Generator) -> Problem:
    drawn = rng.permutation(problem.experts * problem.devices)
    every = np.stack([drawn // problem.devices, drawn % problem.devices], axis=1).astype(np.int32)
    return replace(problem, constraints=Constraints(forbidden=every[:3], pinned=every[3:5]))


def domains(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, constraints=Constraints(domain=problem.cluster.node))


def groups(problem: Problem, rng: np.random.Generator) -> Problem:
    size = [g for g in range(2, problem.experts + 1) if problem.experts % g == 0]
    return replace(problem, groups=int(rng.choice(size)), constraints=Constraints(groups_on_node=True))


def min_tokens(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, constraints=Constraints(min_tokens=int(problem.mean_load.max() / rng.uniform(1, 4))))


def device_moves(problem: Problem, rng: np.random.Generator) -> Problem:
    limited = Constraints(device_move_bytes=int(rng.integers(0, 3)))
    return replace(in_force(problem, rng), expert=ExpertSpec(weight_bytes=1), constraints=limited)


def node_moves(problem: Problem, rng: np.random.Generator) -> Problem:
    limited = Constraints(node_move_bytes=int(rng.integers(0, 3)))
    return replace(in_force(problem, rng), expert=ExpertSpec(weight_bytes=1), constraints=limited)


def memory(problem: Problem, rng: np.random.Generator) -> Problem:
    most = int(problem.loads.sum(axis=1).max())
    weight = max(1, most // 20)
    each = int((problem.experts * weight + most) / problem.devices * rng.uniform(1.1, 2.0))
    cluster = replace(problem.cluster, memory_bytes=np.full(problem.devices, each))
    return replace(problem, cluster=cluster, expert=ExpertSpec(weight_bytes=weight, activation_bytes=1))


def tail(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, tail=float(rng.choice([0.2, 0.5])))


def even(problem: Problem, rng: np.random.Generator) -> Problem:
    demand = replace(problem.demand, tokens=12 * problem.demand.tokens)  # whole shares for up to four replicas
    return replace(problem, demand=demand, split_rule=SplitRule.EVEN)


KINDS: dict[str, Limit] = {
    "none": lambda problem, rng: problem,
    **{limit.__name__: limit for limit in (moves, failed, pairs, domains, groups, min_tokens)},
    **{limit.__name__: limit for limit in (device_moves, node_moves, memory, tail, even)},
}

if __name__ == "__main__":
    main()
