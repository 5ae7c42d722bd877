"""Planning the layers of a model together, under one deadline.

Every layer's search runs in steps of a few milliseconds, and the next step goes to the layer that can gain most by it:
the one with the widest gap to its bound, counted less the longer it has not improved. So layers that are perfect after
their first construction cost nothing, and hard ones share what is left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.plan import Plan, relative
from moeplan.solvers.policies.registry import Progress, find
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.solving.solver import check_honoured, evaluate, solve
from moeplan.solvers.split.memory import best_quota

__all__ = ["solve_layers"]


def solve_layers(
    problems: Sequence[Problem],
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
    *,
    processes: Executor | None = None,
    shares: int = 1,
) -> list[Plan]:
    """Plan several layers; `parameters.deadline_s` is for all of them, its other limits for each.

    Without a deadline the plans are those of `solve`, layer by layer.

    Args:
        problems: One per layer.
        policy: Name of a policy.
        parameters: How hard to try.
        processes: Workers to spread layers over, such as a `ProcessPoolExecutor` that is warm already, because starting
            a process takes longer than most deadlines; None to stay in this one.
        shares: How many workers to use; layers are dealt out in turn.

    Raises:
        ProblemError: see `solve`.
    """
    if processes is None or shares <= 1:
        return _solve_share(list(problems), policy, parameters)
    dealt = [list(problems[i::shares]) for i in range(shares)]
    answers = [processes.submit(_solve_share, share, policy, parameters) for share in dealt]
    plans: list[Plan | None] = [None] * len(problems)
    for i, answer in enumerate(answers):
        plans[i::shares] = answer.result()
    return [plan for plan in plans if plan is not None]


@dataclass(slots=True)
class _Layer:
    """One layer's search."""

    problem: Problem
    search: Iterator[Progress] | None = None
    last: Progress | None = None
    imbalance: float = np.inf
    idle: int = 0
    seconds: float = 0.0

    def advance(self) -> bool:
        """Take one step; whether there was one."""
        assert self.search is not None
        start = time.perf_counter()
        progress = next(self.search, None)
        self.seconds += time.perf_counter() - start
        if progress is None:
            return False
        if self.last is None or progress.layout is not self.last.layout:
            quota, _, _ = best_quota(self.problem, progress.layout.slots)
            level = (quota.sum(axis=2) / self.problem.cluster.speed).max(axis=1)
            self.imbalance = float(self.problem.demand.weights @ relative(self.problem, level))
            self.idle = 0
        else:
            self.idle += 1
        self.last = progress
        return True

    @property
    def hope(self) -> float:
        """What a further step may gain."""
        if self.last is None:
            return np.inf
        return max(0.0, self.imbalance / self.last.bound - 1) / (1 + self.idle)


def _solve_share(problems: list[Problem], policy: str, parameters: SolveParameters) -> list[Plan]:
    chosen = find(policy)
    if parameters.deadline_s is None or chosen.anytime is None:
        return [solve(problem, policy, parameters) for problem in problems]
    deadline = time.perf_counter() + parameters.deadline_s
    layers = []
    for problem in problems:
        check_honoured(problem, chosen)
        layers.append(_Layer(problem))
    queue = [(-layer.hope, i) for i, layer in enumerate(layers)]
    heapq.heapify(queue)
    while queue:
        late = time.perf_counter() >= deadline
        _, i = heapq.heappop(queue)
        if late and layers[i].last is not None:
            continue  # only a layer without any plan may still take its first step
        if layers[i].last is None:  # a search knows the time from its first step
            left = replace(parameters, deadline_s=max(1e-3, deadline - time.perf_counter()))
            layers[i].search = chosen.anytime(layers[i].problem, left)
        if layers[i].advance():
            heapq.heappush(queue, (-layers[i].hope, i))
    plans = []
    for layer in layers:
        assert layer.last is not None
        plan = evaluate(
            layer.problem,
            layer.last.layout,
            chosen.split,
            policy=policy,
            seconds=layer.seconds,
            bound=layer.last.bound,
        )
        plans.append(plan)
    return plans
