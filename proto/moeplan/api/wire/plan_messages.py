"""Plans of one layer, to and from messages."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moeplan.api.wire.tensors import read_layout, write_array, write_layout
from moeplan.api.wire.times import read_seconds, write_duration
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import split_rule
from moeplan.v1 import problem_pb2

if TYPE_CHECKING:
    from moeplan.solvers import Plan

__all__ = ["read_plan", "write_plan"]

ROUNDING = 1e-6
"""Tolerance by which solvers of models may put a bound above what it bounds."""
_CODES = {reason: problem_pb2.Termination.Value(f"TERMINATION_{reason.name}") for reason in Termination}
_TERMINATIONS = {code: reason for reason, code in _CODES.items()}


def read_plan(message: problem_pb2.Plan, problem: Problem) -> Plan:
    """The plan of a problem, judged here again.

    What is said about the layout does not rest on trust: split, loads, cost and moves are those of `evaluate`. Only the
    bound is taken as it is, since what proves it is the search, which was made elsewhere.

    Raises:
        ProblemError: the layout or the rule does not suit the problem, or the bound is above what the layout reaches.
    """
    from moeplan.solvers import evaluate  # the compiler loads slowly

    layout = read_layout("plan.layout", message.layout, problem.experts)
    judged = evaluate(problem, layout, split_rule("plan.split_rule", message.split_rule))
    if not message.bound <= judged.objective * (1 + ROUNDING):
        raise ProblemError("plan.bound", message.bound, f"is no bound: the plan's layout reaches {judged.objective}")
    return replace(
        judged,
        policy=message.policy,
        bound=max(judged.bound, message.bound),
        seconds=read_seconds(message.solve_time),
        termination=_TERMINATIONS.get(message.termination, Termination.GIVEN),
    )


def write_plan(plan: Plan) -> problem_pb2.Plan:
    """The message of a plan."""
    return problem_pb2.Plan(
        policy=plan.policy,
        layout=write_layout(plan.layout),
        split_rule=plan.split.rule,
        quota=write_array(plan.split.quota),
        cost_s=plan.cost.mean_s,
        imbalance=plan.imbalance.tolist(),
        mean_imbalance=plan.mean_imbalance,
        bound=plan.bound,
        gap=plan.gap,
        objective=plan.objective,
        termination=_CODES[plan.termination],
        moves=None
        if plan.moves is None
        else problem_pb2.Moves(
            expert=plan.moves.expert.tolist(), device=plan.moves.device.tolist(), source=plan.moves.source.tolist()
        ),
        solve_time=write_duration(plan.seconds),
    )
