"""From a problem to a plan."""

from __future__ import annotations

import time

from moeplan.solvers import plan as plans
from moeplan.solvers.cost import STEP, CostModel, check_memory, cost
from moeplan.solvers.errors import ProblemError
from moeplan.solvers.layout import Layout
from moeplan.solvers.moves import moves
from moeplan.solvers.parameters import SolveParameters
from moeplan.solvers.plan import Plan
from moeplan.solvers.policy import Policy, find
from moeplan.solvers.problem import Problem
from moeplan.solvers.splits import split

__all__ = ["evaluate", "solve"]


def solve(
    problem: Problem,
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
    *,
    rule: str | None = None,
    model: CostModel = STEP,
) -> Plan:
    """Plan one layer.

    Args:
        problem: What to plan.
        policy: Name of a policy; see `available_policies`.
        parameters: How hard to try.
        rule: Split rule; the policy's own by default.
        model: What the layer's time is made of.

    Raises:
        ProblemError: the policy does not exist, or cannot honour a constraint that the problem sets.
        InfeasibleError: the plan needs more memory than a device has.
    """
    chosen = find(policy)
    _check_honoured(problem, chosen)
    start = time.perf_counter()
    layout = chosen.make(problem, parameters)
    seconds = time.perf_counter() - start
    return evaluate(problem, layout, rule or chosen.split, policy=policy, seconds=seconds, model=model)


def evaluate(
    problem: Problem,
    layout: Layout,
    rule: str = "optimal",
    *,
    policy: str = "given",
    seconds: float = 0.0,
    model: CostModel = STEP,
) -> Plan:
    """Judge a layout on a problem's demand.

    Raises:
        ProblemError: the layout does not suit the problem, or the rule needs the demand by source.
        InfeasibleError: the plan needs more memory than a device has.
    """
    if (layout.experts, layout.devices) != (problem.experts, problem.devices):
        raise ProblemError(
            "layout",
            f"{layout.experts} experts on {layout.devices} devices",
            f"the problem has {problem.experts} experts on {problem.devices} devices",
        )
    chosen = split(problem, layout, rule)
    check_memory(problem, layout, chosen)
    values = plans.imbalance(problem, chosen)
    weights = problem.demand.weights
    return Plan(
        policy=policy,
        layout=layout,
        split=chosen,
        imbalance=values,
        mean_imbalance=float(weights @ values),
        bound=float(weights @ plans.bound(problem)),
        cost=cost(problem, layout, chosen, model),
        moves=None if problem.current is None else moves(problem.current, layout, problem.cluster),
        seconds=seconds,
    )


def _check_honoured(problem: Problem, policy: Policy) -> None:
    if problem.max_moves is not None and "max_moves" not in policy.honours:
        raise ProblemError(
            "max_moves",
            problem.max_moves,
            f"policy {policy.name} re-plans from scratch and cannot limit moves; use hybrid, or drop the limit",
        )
