"""Demand of a router: tokens of each expert from each source, in one or several scenarios."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import MAX_TOKENS, Float64, Int64, any_array, floats, integers
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import number

__all__ = ["DRIFT", "Demand"]

DRIFT = 0.2
"""Default `Demand.spread`: experts' loads in the traces of this project change by about as much from step to step."""

LARGE = 1e300
"""Weights beyond it might have no finite sum."""


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Routed (token, expert) pairs of one MoE layer.

    Attributes:
        tokens: int64[scenarios, sources, experts]. A scenario is the demand of one step that the plan should suit;
            a source is the rank whose tokens are routed. One source means that origins are not known.
        weights: float64[scenarios], importance of each scenario, summing to 1.
        spread: How far an expert's tokens may be from a single scenario's, as a standard deviation of their logarithm;
            see `of`. Several scenarios say themselves how far apart they are, and it counts for nothing.

    Raises:
        ProblemError: `tokens` is not an integer array of three dimensions, is empty, holds a negative count, or a
            scenario's total exceeds 2**53; or `spread` is negative or above 1.
    """

    tokens: Int64
    weights: Float64
    spread: float = DRIFT

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "tokens", integers("demand.tokens", self.tokens, ndim=3, low=0, high=MAX_TOKENS))
        if self.tokens.size == 0:
            raise ProblemError("demand.tokens", f"array of shape {self.tokens.shape}", "must not be empty")
        if self.tokens.sum(axis=(1, 2), dtype=np.float64).max() > MAX_TOKENS:
            raise ProblemError("demand.tokens", "a scenario's total", f"must be at most {MAX_TOKENS}")
        weights = floats("demand.weights", self.weights, ndim=1)
        if len(weights) != self.scenarios:
            raise ProblemError(
                "demand.weights", f"{len(weights)} values", f"must have one per scenario ({self.scenarios})"
            )
        if not weights.any():
            raise ProblemError("demand.weights", weights.tolist(), "at least one must be above 0")
        if weights.max() > LARGE:
            weights = weights / weights.max()
        total = weights.sum()
        if abs(total - 1) > len(weights) * np.finfo(np.float64).eps:
            weights = weights / total  # and once only: a demand made of another's weights has the same to the last bit
        weights.flags.writeable = False
        set_(self, "weights", weights)
        if not 0 <= number("demand.spread", self.spread) <= 1:
            raise ProblemError("demand.spread", self.spread, "must be 0 to 1")

    @classmethod
    def of(cls, tokens: npt.ArrayLike, weights: npt.ArrayLike | None = None, *, spread: float = DRIFT) -> Demand:
        """A demand from counts of one, two or three dimensions.

        A layout that is perfect for one load vector and no other is fragile: the next step's loads differ. So where
        there is one scenario, and no layout in force whose replicas would have to move for it, `hybrid` looks among the
        layouts that are as good on it under the best split, to within `SolveParameters.target_gap`, for one that also
        suits loads near it. A plan's imbalance, cost and bound are those of the counts themselves.

        Args:
            tokens: Integers [experts], [sources, experts] or [scenarios, sources, experts].
            weights: One per scenario; equal by default.
            spread: How far loads may be from those of one scenario: the standard deviation of the logarithm of each
                expert's tokens, to which comes what counts of that size vary by chance. 0 plans for the counts only.

        Raises:
            ProblemError: the counts or the spread are invalid.
        """
        array = any_array("demand.tokens", tokens)
        if not 1 <= array.ndim <= 3:
            raise ProblemError("demand.tokens", f"array of shape {array.shape}", "must have 1, 2 or 3 dimensions")
        array = array[(np.newaxis,) * (3 - array.ndim)]
        return cls(array, floats("demand.weights", np.ones(len(array)) if weights is None else weights, ndim=1), spread)

    @property
    def scenarios(self) -> int:
        """Number of scenarios."""
        return self.tokens.shape[0]

    @property
    def sources(self) -> int:
        """Number of sources."""
        return self.tokens.shape[1]

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.tokens.shape[2]

    def loads(self) -> Int64:
        """int64[scenarios, experts]: tokens of each expert from all sources."""
        loads: Int64 = self.tokens.sum(axis=1)
        return loads
