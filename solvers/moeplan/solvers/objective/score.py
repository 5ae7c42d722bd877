"""From loads to the number that plans are compared by: imbalance per scenario, then its mean or that of the worst.

Nothing else turns loads into a score: policies, searches, exact models and reports all come here.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.kernel import inner_kernel
from moeplan.solvers.problem.problem import Problem

__all__ = ["bound", "imbalance", "levels", "objective", "relative", "risk", "score", "tail_shares"]


@inner_kernel
def tail_shares(value: Float64, weights: Float64, tail: float, share: Float64) -> float:
    """Conditional value at risk: the mean of `value` over the worst part `tail` of the weight.

    Rockafellar & Uryasev (2000), for finitely many scenarios. A `tail` of 1 gives the mean, one towards 0 the maximum.

    Args:
        value: float64[scenarios].
        weights: float64[scenarios], summing to 1.
        tail: Part of the weight, above 0 and at most 1.
        share: float64[scenarios], overwritten: part of each scenario in that mean, summing to 1.

    Returns:
        The sum of ``share * value``.
    """
    if tail >= 1:
        mean = 0.0
        for s in range(len(value)):
            share[s] = weights[s]
            mean += weights[s] * value[s]
        return mean
    share[:] = -1.0
    left = tail
    risk = 0.0
    for _ in range(len(value)):
        worst = -1
        for s in range(len(value)):
            if share[s] < 0 and (worst < 0 or value[s] > value[worst]):
                worst = s
        part = min(left, weights[worst])
        left -= part
        share[worst] = part / tail
        risk += share[worst] * value[worst]
    return risk


def risk(value: Float64, weights: Float64, tail: float) -> float:
    """Conditional value at risk of `value`; see `tail_shares`."""
    return float(tail_shares(value, weights, tail, np.empty(len(value))))


def levels(problem: Problem, quota: Int64) -> Float64:
    """float64[scenarios]: the largest load per speed of a quota, int64[scenarios, devices, width]."""
    level: Float64 = (quota.sum(axis=2) / problem.cluster.speed).max(axis=1)
    return level


def relative(problem: Problem, level: Float64) -> Float64:
    """float64[scenarios]: a load per speed of each scenario over its mean; 1.0 for a scenario without tokens."""
    mean = problem.mean_level
    return np.divide(level, mean, out=np.ones(len(level)), where=mean > 0)


def imbalance(problem: Problem, quota: Int64) -> Float64:
    """float64[scenarios]: the largest load per speed over the mean, 1.0 for a scenario without tokens."""
    return relative(problem, levels(problem, quota))


def objective(problem: Problem, value: Float64) -> float:
    """The objective of a plan, from the imbalance of each scenario: its mean, or the mean of the worst part `tail`."""
    return risk(value, problem.demand.weights, problem.tail)


def score(problem: Problem, quota: Int64) -> float:
    """The objective of a quota, int64[scenarios, devices, width]."""
    return objective(problem, imbalance(problem, quota))


def bound(problem: Problem) -> Float64:
    """float64[scenarios]: the least imbalance that any layout and split could have; see `bounds`."""
    return relative(problem, problem.lower_bound)
