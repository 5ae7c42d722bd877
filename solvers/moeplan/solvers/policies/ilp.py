"""The placement problem as an integer program, solved by whichever solver is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moeplan.solvers.construct.repair import table
from moeplan.solvers.exact.model import Effort
from moeplan.solvers.exact.of_problem import proven_by, whole
from moeplan.solvers.exact.run import require, run
from moeplan.solvers.objective.score import bound, objective
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.policies.hybrid import hybrid
from moeplan.solvers.policies.registry import ALL_LIMITS, Progress, policy
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.moves import keep_slots
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.judging import score_of

WORK_PER_SECOND = 1_000
"""Candidates of `work_limit` that a deterministic second of a solver counts as."""


SLACK_S = 0.05
"""A solver that ends so shortly before the deadline has ended for it."""


@policy(
    "ilp",
    source="CP-SAT; HiGHS, CBC by PuLP",
    split=SplitRule.OPTIMAL,
    rules=frozenset({SplitRule.OPTIMAL, SplitRule.EVEN}),
    honours=ALL_LIMITS,
)
def ilp(problem: Problem, parameters: SolveParameters) -> Iterator[Progress]:
    """An exact model over all scenarios, by CP-SAT or PuLP, which may only improve hybrid's construction."""
    start = time.perf_counter()
    deadline = None if parameters.deadline_s is None else start + parameters.deadline_s
    require(parameters.solver)
    if problem.split_rule is SplitRule.EVEN and parameters.solver != "cpsat":
        raise ProblemError("parameters.solver", parameters.solver, "an even split has an exact model on cpsat alone")
    proven = objective(problem, bound(problem))
    *_, construction = hybrid(problem, replace(parameters, work_limit=0, prove=False))
    incumbent = construction.layout
    before = score_of(problem, incumbent.slots)
    if np.isfinite(before):  # what does not fit the memory may yet become what does
        yield Progress(incumbent, proven)
    if before <= proven * (1 + parameters.target_gap):
        return
    model = whole(problem, incumbent.slots)
    work = max(1, parameters.candidates) / WORK_PER_SECOND
    effort = Effort(deadline, work, parameters.threads, parameters.seed, parameters.target_gap)
    answer = run(model, parameters.solver, effort)
    proven = max(proven, proven_by(problem, answer))
    best = incumbent
    if answer.placed is not None:
        slots = table(problem, answer.placed)
        if problem.current is not None:
            keep_slots(problem.current.slots, slots)
        found = Layout(slots, problem.experts)
        best = found if score_of(problem, found.slots) < before else incumbent
    late = deadline is not None and time.perf_counter() >= deadline - SLACK_S
    ended = Termination.DEADLINE if late else Termination.WORK_LIMIT
    yield Progress(best, min(proven, score_of(problem, best.slots)), ended)
