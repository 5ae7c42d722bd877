"""What a plan minimises over scenarios: the mean of their imbalance, or the mean of the worst ones."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["risk", "tail_shares"]


@kernel
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
        share[:] = weights
        return (weights * value).sum()
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
