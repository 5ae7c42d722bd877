"""The answer: a layout, its split, what it costs, how far from optimal it can be, and what must move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.solvers.plan.cost import Cost
from moeplan.solvers.problem.arrays import Float64
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.moves import Moves
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.split.rules import Split

__all__ = ["Plan", "bound", "imbalance", "relative"]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A plan for one layer.

    Attributes:
        policy: Name of the policy that made it.
        layout: Which expert sits in which slot.
        split: How tokens are divided, in each scenario of the demand.
        imbalance: float64[scenarios], largest load per speed over the mean; 1.0 is perfect.
        mean_imbalance: Average of `imbalance` by the weights of the scenarios.
        objective: What the problem asks to be small: `mean_imbalance`, or the mean of the worst part `Problem.tail` of
            the scenarios.
        bound: No layout with these slots has a smaller objective.
        cost: Modelled time.
        moves: Replicas to copy; None where there was no current layout.
        seconds: Time that the policy took.
    """

    policy: str
    layout: Layout
    split: Split
    imbalance: Float64
    mean_imbalance: float
    objective: float
    bound: float
    cost: Cost
    moves: Moves | None
    seconds: float

    @property
    def gap(self) -> float:
        """How far from optimal the plan can be at most: ``objective / bound - 1``."""
        return max(0.0, self.objective / self.bound - 1.0)


def imbalance(problem: Problem, split: Split) -> Float64:
    """float64[scenarios]: largest load per speed over the mean, 1.0 for a scenario without tokens."""
    return relative(problem, (split.device_loads() / problem.cluster.speed).max(axis=1))


def bound(problem: Problem) -> Float64:
    """float64[scenarios]: the least imbalance that any layout and split could have; see `bounds`."""
    return relative(problem, problem.lower_bound)


def relative(problem: Problem, level: Float64) -> Float64:
    """float64[scenarios]: a load per speed of each scenario over its mean; 1.0 for a scenario without tokens."""
    mean = problem.mean_level
    return np.divide(level, mean, out=np.ones(len(level)), where=mean > 0)
