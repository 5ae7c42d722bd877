"""The answer: a layout, its split, what it costs, how far from optimal it can be, and what must move."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.solvers.plan.cost import Cost
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.problem.arrays import Float64
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.moves import Moves
from moeplan.solvers.split.rules import Split

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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
        termination: Why it ended.
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
    termination: Termination

    @property
    def gap(self) -> float:
        """The most by which the plan can exceed the optimum: ``objective / bound - 1``."""
        return max(0.0, self.objective / self.bound - 1.0)

    def __repr__(self) -> str:
        moved = "" if self.moves is None else f", {len(self.moves)} moves"
        return (
            f"Plan({self.policy}: {self.layout.experts} experts on {self.layout.devices} devices, "
            f"{self.split.rule} split, imbalance {self.mean_imbalance:.4f}, gap {self.gap:.2%}{moved}; "
            f"{self.termination})"
        )
