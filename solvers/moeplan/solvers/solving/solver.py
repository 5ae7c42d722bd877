"""From a problem to a plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from moeplan.solvers.exact.run import require
from moeplan.solvers.objective import score
from moeplan.solvers.plan.cost import STEP, CostModel, check_memory, cost
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.plan import Plan
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.policies.registry import Policy, Progress, available_policies, find
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.limits import broken
from moeplan.solvers.problem.moves import moves
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.scalars import instance
from moeplan.solvers.problem.split_rules import SplitRule, split_rule
from moeplan.solvers.split.rules import Split, split

__all__ = ["check_asked", "check_parameters", "evaluate", "plan_of", "solve", "solve_anytime"]

EXACT = 1e-9
"""Relative distance from the bound within which a plan counts as proved: what rounding leaves."""

_PROBLEM = "Problem(cluster, demand)"


def solve(
    problem: Problem,
    *,
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
    model: CostModel = STEP,
) -> Plan:
    """Plan one layer.

    Args:
        problem: What to plan.
        policy: Name of a policy; see `available_policies`.
        parameters: How hard to try.
        model: What the layer's time is made of.

    Raises:
        ProblemError: the policy or the solver does not exist, or the policy cannot honour a constraint that the problem
            sets, or cannot plan for its split rule.
        InfeasibleError: the plan needs more memory than a device has.
    """
    chosen = check_asked(problem, find(policy))
    check_parameters(parameters)
    start = time.perf_counter()
    *_, last = chosen.search(problem, parameters)
    return plan_of(problem, chosen, last, time.perf_counter() - start, parameters, model)


def solve_anytime(
    problem: Problem,
    *,
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
    model: CostModel = STEP,
) -> Iterator[Plan]:
    """Plan one layer, yielding every plan that is better than the one before, or whose bound is.

    The caller may stop at any moment. The last plan is the one that `solve` returns and says why the search ended; the
    others are `Termination.UNFINISHED`. See `solve` for the arguments and errors.
    """
    chosen = check_asked(problem, find(policy))
    check_parameters(parameters)
    start = time.perf_counter()
    best: Plan | None = None
    last: Progress | None = None
    for progress in chosen.search(problem, parameters):
        if last is None or progress.layout is not last.layout or progress.bound > last.bound:
            plan = plan_of(problem, chosen, progress, time.perf_counter() - start, parameters, model)
            if best is None or plan.objective < best.objective or plan.bound > best.bound:
                best = plan
                yield replace(plan, termination=Termination.UNFINISHED)
        last = progress
    assert last is not None, "a policy reports at least once"
    yield plan_of(problem, chosen, last, time.perf_counter() - start, parameters, model)


def evaluate(problem: Problem, layout: Layout, rule: str | None = None, *, model: CostModel = STEP) -> Plan:
    """Judge a layout on a problem's demand.

    Args:
        problem: Demand and limits.
        layout: The layout.
        rule: How tokens are divided; by default as the problem says, or optimally where it does not.
        model: What the layer's time is made of.

    Raises:
        ProblemError: the layout does not suit the problem or breaks a constraint, there is no such rule, or it needs
            the demand by source.
        InfeasibleError: the plan needs more memory than a device has.
    """
    instance("problem", problem, Problem, _PROBLEM)
    instance("layout", layout, Layout, "Layout(slots, experts)")
    asked = split_rule("rule", rule or problem.split_rule or SplitRule.OPTIMAL)
    return _judge(problem, layout, asked, "given", model)


def check_parameters(parameters: SolveParameters) -> None:
    """Check the parameters before any work.

    Raises:
        ProblemError: they are not `SolveParameters`, or their solver does not exist.
    """
    instance("parameters", parameters, SolveParameters, "SolveParameters(...)")
    require(parameters.solver)


def check_asked(problem: Problem, policy: Policy) -> Policy:
    """The policy, if it can do what the problem asks for.

    Raises:
        ProblemError: it cannot honour a constraint, or cannot plan for the split rule.
    """
    instance("problem", problem, Problem, _PROBLEM)
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
    if problem.split_rule is not None and problem.split_rule not in policy.rules:
        able = [other.name for other in available_policies().values() if problem.split_rule in other.rules]
        raise ProblemError(
            "split_rule",
            problem.split_rule,
            f"policy {policy.name} plans for {', '.join(sorted(policy.rules))} only; use {' or '.join(able)}",
        )
    return policy


def plan_of(
    problem: Problem, policy: Policy, progress: Progress, seconds: float, parameters: SolveParameters, model: CostModel
) -> Plan:
    """The plan that a policy's progress stands for."""
    rule = problem.split_rule or policy.split
    plan = _judge(problem, progress.layout, rule, policy.name, model, progress.split)
    bound = max(plan.bound, progress.bound)
    if plan.objective <= bound * (1 + EXACT):
        termination = Termination.PROVED
    elif plan.objective <= bound * (1 + parameters.target_gap):
        termination = Termination.TARGET_GAP
    else:
        termination = progress.termination
    return replace(plan, bound=bound, seconds=seconds, termination=termination)


def _judge(
    problem: Problem, layout: Layout, rule: SplitRule, policy: str, model: CostModel, known: Split | None = None
) -> Plan:
    if (layout.experts, layout.devices) != (problem.experts, problem.devices):
        raise ProblemError(
            "layout",
            f"{layout.experts} experts on {layout.devices} devices",
            f"the problem has {problem.experts} experts on {problem.devices} devices",
        )
    fault = None if problem.limits.none else broken(problem.limits, layout.placed)  # which takes devices x experts
    if fault is not None:
        raise fault
    chosen = split(problem, layout, rule) if known is None else known
    check_memory(problem, layout, chosen)
    values = score.imbalance(problem, chosen.quota)
    return Plan(
        policy=policy,
        layout=layout,
        split=chosen,
        imbalance=values,
        mean_imbalance=float(problem.demand.weights @ values),
        objective=score.objective(problem, values),
        bound=score.objective(problem, score.bound(problem)),
        cost=cost(problem, layout, chosen, model),
        moves=None if problem.current is None else moves(problem.current, layout, problem.cluster),
        seconds=0.0,
        termination=Termination.GIVEN,
    )
