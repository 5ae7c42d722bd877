"""Bounds that take a solver, or a search of their own: stronger and stronger ones, as time permits."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from moeplan.solvers.exact import configurations
from moeplan.solvers.objective import score as scores
from moeplan.solvers.problem.arrays import Float64
from moeplan.solvers.problem.even_bounds import places_bound
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.judging import rule_of

__all__ = ["stronger_bounds"]


def stronger_bounds(problem: Problem, reached: Float64, deadline: float | None) -> Iterator[Float64]:
    """Stronger and stronger bounds, of equal devices the scenario with the widest gap first; of an even split at once.

    Args:
        problem: The problem.
        reached: float64[scenarios], the largest load per speed that some layout reaches.
        deadline: Time on `time.perf_counter` to end at.

    Yields:
        float64[scenarios], as `plan.bound`.
    """
    capacity, speed = problem.capacity, problem.cluster.speed
    low = problem.lower_bound.copy()
    if rule_of(problem) is SplitRule.EVEN:
        alive, most = capacity > 0, problem.limits.most
        for s, loads in enumerate(problem.loads):
            if deadline is None or time.perf_counter() < deadline:
                low[s] = places_bound(loads, speed[alive], capacity[alive], most, low[s])
        yield scores.relative(problem, low)
        return
    if not configurations.applies(problem.experts, capacity, speed):
        return
    gap = (scores.relative(problem, reached) - scores.bound(problem)) * problem.demand.weights
    for s in np.argsort(-gap, kind="stable"):
        for value in configurations.configuration_bounds(
            problem.loads[s], problem.devices, int(capacity[0]), low[s] * speed[0], reached[s] * speed[0], deadline
        ):
            low[s] = value / speed[0]
            yield scores.relative(problem, low)
