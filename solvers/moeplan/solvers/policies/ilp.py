"""The placement problem as an integer program, solved by whichever solver is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moeplan.solvers.construct.repair import table
from moeplan.solvers.exact.model import Effort
from moeplan.solvers.exact.of_problem import whole
from moeplan.solvers.exact.run import require, run
from moeplan.solvers.objective.score import risk
from moeplan.solvers.plan import plan as plans
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.hybrid import hybrid
from moeplan.solvers.policies.registry import ALL_LIMITS, Progress, policy
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.moves import keep_slots
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.split.memory import best_quota

WORK_PER_SECOND = 1_000
"""Candidates of `work_limit` that a deterministic second of a solver counts as."""


def stages(problem: Problem, parameters: SolveParameters) -> Iterator[Progress]:
    """The incumbent, then what the solver made of it."""
    start = time.perf_counter()
    deadline = None if parameters.deadline_s is None else start + parameters.deadline_s
    require(parameters.solver)
    weights = problem.demand.weights
    bound = risk(plans.bound(problem), weights, problem.tail)
    incumbent = hybrid(problem, replace(parameters, work_limit=0, prove=False))
    yield Progress(incumbent, bound)
    before = _objective(problem, incumbent)
    if before <= bound * (1 + parameters.target_gap):
        return
    with_tokens = problem.mean_level > 0
    model = whole(problem, incumbent.slots)
    work = np.inf if deadline is not None else max(1, parameters.work_limit) / WORK_PER_SECOND
    effort = Effort(deadline, work, parameters.threads, parameters.seed, parameters.target_gap)
    answer = run(model, parameters.solver, effort)
    idle = float(weights[~with_tokens].sum()) if problem.tail >= 1 else 0.0  # the model of a tail counts them itself
    bound = max(bound, answer.bound + idle)
    best = incumbent
    if answer.placed is not None:
        slots = table(problem, answer.placed)
        if problem.current is not None:
            keep_slots(problem.current.slots, slots)
        found = Layout(slots, problem.experts)
        best = found if _objective(problem, found) < before else incumbent
    yield Progress(best, min(bound, _objective(problem, best)))


@policy("ilp", source="CP-SAT; HiGHS, CBC by PuLP", split="optimal", honours=ALL_LIMITS, anytime=stages)
def ilp(problem: Problem, parameters: SolveParameters) -> Layout:
    """An exact model over all scenarios, by CP-SAT or PuLP, which may only improve hybrid's construction."""
    *_, last = stages(problem, parameters)
    return last.layout


def _objective(problem: Problem, layout: Layout) -> float:
    """Imbalance under the optimal split, over all scenarios or the worst of them."""
    quota, _, _ = best_quota(problem, layout.slots)
    level = (quota.sum(axis=2) / problem.cluster.speed).max(axis=1)
    return risk(plans.relative(problem, level), problem.demand.weights, problem.tail)
