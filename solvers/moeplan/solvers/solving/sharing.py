"""One memory budget of replicas shared over layers: which layer gets how many slots per device.

A device holds all layers' replicas in one memory, so slots that one layer does not need serve another. What a layer
gains by a further slot per device is its imbalance with and without, which the policy itself says; the sum over layers
of load-weighted imbalance, the modelled step, is then minimised exactly by dynamic programming over the budget. A
greedy by marginal gain would not be exact, because gains need not fall: below R = D - 1 spare slots one slot may gain
little, and the one that makes perfect balance attainable much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.plan import Plan
from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.errors import InfeasibleError, ProblemError
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.solving.solver import solve

__all__ = ["Shares", "share_slots"]

ENOUGH = 1.0 + 1e-4
"""Imbalance from which further slots are not tried."""


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Slots per device of each layer.

    Attributes:
        slots: int32[layers], slots per device of each layer.
        plans: The plan of each layer with these slots.
        level: Sum over layers of the largest load per speed, averaged over scenarios, tokens.
        even_level: The same with the budget divided evenly.
    """

    slots: Int32
    plans: list[Plan]
    level: float
    even_level: float


def share_slots(
    problems: Sequence[Problem],
    budget: int,
    *,
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
) -> Shares:
    """Divide a budget of slots per device over layers for the least sum of largest loads.

    Args:
        problems: One per layer, on clusters of equal slots per device, which are replaced.
        budget: Slots per device, over all layers together.
        policy: Name of a policy.
        parameters: How hard to try, for every layer and number of slots.

    Raises:
        ProblemError: there is no layer, or see `solve`.
        InfeasibleError: the budget does not hold every expert once.
    """
    if not problems:
        raise ProblemError("problems", "none", "give at least one layer")
    fewest = np.array([-(-p.experts // p.devices) for p in problems])
    if budget < fewest.sum():
        raise InfeasibleError(
            "budget",
            budget,
            f"one replica of each expert needs {fewest.sum()} slots per device over {len(problems)} layers",
        )
    spare = budget - int(fewest.sum())
    curves = [_curve(p, int(least), spare, policy, parameters) for p, least in zip(problems, fewest, strict=True)]
    # best[b]: least sum of the layers so far with at most b spare slots; choice[l][b]: what layer l took.
    best = np.zeros(spare + 1)
    choices = []
    for curve in curves:
        levels = np.array([level for level, _ in curve])
        table = np.full((spare + 1, len(levels)), np.inf)
        for taken, level in enumerate(levels):
            table[taken:, taken] = best[: spare + 1 - taken] + level
        choices.append(table.argmin(axis=1))
        best = table.min(axis=1)
    extra = np.zeros(len(problems), np.int32)
    left = spare
    for i in reversed(range(len(problems))):
        extra[i] = choices[i][left]
        left -= int(extra[i])
    each, odd = divmod(budget, len(problems))
    even = [max(0, each + (i < odd) - int(least)) for i, least in enumerate(fewest)]
    return Shares(
        (fewest + extra).astype(np.int32),
        [curve[n][1] for curve, n in zip(curves, extra, strict=True)],
        float(best[spare]),
        float(sum(curve[min(n, len(curve) - 1)][0] for curve, n in zip(curves, even, strict=True))),
    )


def _curve(
    problem: Problem, fewest: int, spare: int, policy: str, parameters: SolveParameters
) -> list[tuple[float, Plan]]:
    """Level and plan of a layer with 0, 1, .. further slots per device, until more do not help."""
    curve: list[tuple[float, Plan]] = []
    for slots in range(fewest, fewest + spare + 1):
        cluster = replace(problem.cluster, slots=np.full(problem.devices, slots, np.int32))
        plan = solve(replace(problem, cluster=cluster), policy=policy, parameters=parameters)
        mean: Float64 = problem.mean_level
        level = float(problem.demand.weights @ (plan.imbalance * mean))
        curve.append(curve[-1] if curve and curve[-1][0] <= level else (level, plan))
        if plan.mean_imbalance <= ENOUGH or slots >= problem.experts:
            break
    return curve
