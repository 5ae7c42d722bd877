"""From a problem to a plan."""

from __future__ import annotations

import time
from collections.abc import Iterator

from moeplan.solvers.objective.score import risk
from moeplan.solvers.plan import plan as plans
from moeplan.solvers.plan.cost import STEP, CostModel, check_memory, cost
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.plan import Plan
from moeplan.solvers.policies.registry import Policy, Progress, available_policies, find
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.limits import broken
from moeplan.solvers.problem.moves import moves
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.split.rules import split

__all__ = ["check_honoured", "evaluate", "solve", "solve_anytime"]


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
    check_honoured(problem, chosen)
    start = time.perf_counter()
    bound = None
    if chosen.anytime is None:
        layout = chosen.make(problem, parameters)
    else:
        for progress in chosen.anytime(problem, parameters):
            layout, bound = progress.layout, progress.bound
    seconds = time.perf_counter() - start
    return evaluate(problem, layout, rule or chosen.split, policy=policy, seconds=seconds, model=model, bound=bound)


def solve_anytime(
    problem: Problem,
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
    *,
    rule: str | None = None,
    model: CostModel = STEP,
) -> Iterator[Plan]:
    """Plan one layer, yielding every plan that is better than the one before, or whose bound is.

    The caller may stop at any moment; the last plan is the one that `solve` returns. See `solve` for the arguments and
    errors.
    """
    chosen = find(policy)
    check_honoured(problem, chosen)
    start = time.perf_counter()
    if chosen.anytime is None:
        yield solve(problem, policy, parameters, rule=rule, model=model)
        return
    best: Plan | None = None
    last: Progress | None = None
    for progress in chosen.anytime(problem, parameters):
        if last is not None and progress.layout is last.layout and progress.bound <= last.bound:
            continue
        last = progress
        seconds = time.perf_counter() - start
        plan = evaluate(
            problem,
            progress.layout,
            rule or chosen.split,
            policy=policy,
            seconds=seconds,
            model=model,
            bound=progress.bound,
        )
        if best is None or plan.objective < best.objective or plan.bound > best.bound:
            best = plan
            yield plan


def evaluate(
    problem: Problem,
    layout: Layout,
    rule: str = "optimal",
    *,
    policy: str = "given",
    seconds: float = 0.0,
    model: CostModel = STEP,
    bound: float | None = None,
) -> Plan:
    """Judge a layout on a problem's demand. A `bound` on its objective that is known already is reported if stronger.

    Raises:
        ProblemError: the layout does not suit the problem or breaks a constraint, or the rule needs the demand by
            source.
        InfeasibleError: the plan needs more memory than a device has.
    """
    if (layout.experts, layout.devices) != (problem.experts, problem.devices):
        raise ProblemError(
            "layout",
            f"{layout.experts} experts on {layout.devices} devices",
            f"the problem has {problem.experts} experts on {problem.devices} devices",
        )
    fault = broken(problem.limits, layout.placed)
    if fault is not None:
        raise fault
    chosen = split(problem, layout, rule)
    check_memory(problem, layout, chosen)
    values = plans.imbalance(problem, chosen)
    weights, tail = problem.demand.weights, problem.tail
    return Plan(
        policy=policy,
        layout=layout,
        split=chosen,
        imbalance=values,
        mean_imbalance=float(weights @ values),
        objective=risk(values, weights, tail),
        bound=max(risk(plans.bound(problem), weights, tail), bound or 0.0),
        cost=cost(problem, layout, chosen, model),
        moves=None if problem.current is None else moves(problem.current, layout, problem.cluster),
        seconds=seconds,
    )


def check_honoured(problem: Problem, policy: Policy) -> None:
    """Refuse a problem with a constraint that the policy cannot honour.

    Raises:
        ProblemError: it has one.
    """
    if problem.max_moves is not None and "max_moves" not in policy.honours:
        raise ProblemError(
            "max_moves",
            problem.max_moves,
            f"policy {policy.name} re-plans from scratch and cannot limit moves; use hybrid, or drop the limit",
        )
    for name in problem.constraints.names:
        if name not in policy.honours:
            able = [other.name for other in available_policies().values() if name in other.honours]
            raise ProblemError(
                f"constraints.{name}",
                "set",
                f"policy {policy.name} cannot honour it; use {' or '.join(able)}, or drop the limit",
            )
