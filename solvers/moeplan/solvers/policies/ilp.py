"""The placement problem as an integer program, solved by whichever solver is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moeplan.solvers import plan as plans
from moeplan.solvers.flow import optimal_quota
from moeplan.solvers.ilp.model import Effort, Model
from moeplan.solvers.ilp.run import require, run
from moeplan.solvers.layout import EMPTY, Layout
from moeplan.solvers.moves import keep_slots
from moeplan.solvers.parameters import SolveParameters
from moeplan.solvers.policies.hybrid import hybrid
from moeplan.solvers.policy import Progress, policy
from moeplan.solvers.problem import Problem

WORK_PER_SECOND = 1_000
"""Candidates of `work_limit` that a deterministic second of a solver counts as."""


def stages(problem: Problem, parameters: SolveParameters) -> Iterator[Progress]:
    """The incumbent, then what the solver made of it."""
    start = time.perf_counter()
    deadline = None if parameters.deadline_s is None else start + parameters.deadline_s
    require(parameters.solver)
    weights = problem.demand.weights
    bound = float(weights @ plans.bound(problem))
    incumbent = hybrid(problem, replace(parameters, work_limit=0, prove=False))
    yield Progress(incumbent, bound)
    before = _imbalance(problem, incumbent)
    if before <= bound * (1 + parameters.target_gap):
        return
    mean = problem.loads.sum(axis=1) / problem.cluster.speed.sum()
    with_tokens = mean > 0
    held = problem.current.placed if problem.current is not None and problem.max_moves is not None else None
    model = Model(
        problem.loads[with_tokens],
        weights[with_tokens] / mean[with_tokens],
        problem.cluster.speed,
        problem.capacity,
        incumbent.slots,
        held,
        problem.max_moves or 0,
    )
    work = np.inf if deadline is not None else max(1, parameters.work_limit) / WORK_PER_SECOND
    effort = Effort(deadline, work, parameters.threads, parameters.seed, parameters.target_gap)
    answer = run(model, parameters.solver, effort)
    bound = max(bound, answer.bound + float(weights[~with_tokens].sum()))
    best = incumbent
    if answer.placed is not None:
        slots = np.full_like(incumbent.slots, EMPTY)
        for d, row in enumerate(answer.placed):
            experts = np.flatnonzero(row)
            slots[d, : len(experts)] = experts
        if problem.current is not None:
            keep_slots(problem.current.slots, slots)
        found = Layout(slots, problem.experts)
        best = found if _imbalance(problem, found) < before else incumbent
    yield Progress(best, min(bound, _imbalance(problem, best)))


@policy("ilp", source="CP-SAT; HiGHS, CBC by PuLP", split="optimal", honours=("max_moves",), anytime=stages)
def ilp(problem: Problem, parameters: SolveParameters) -> Layout:
    """An exact model over all scenarios, by CP-SAT or PuLP, which may only improve hybrid's construction."""
    *_, last = stages(problem, parameters)
    return last.layout


def _imbalance(problem: Problem, layout: Layout) -> float:
    """Scenario-averaged imbalance under the optimal split."""
    quota, _ = optimal_quota(layout.slots, problem.loads, problem.cluster.speed)
    level = (quota.sum(axis=2) / problem.cluster.speed).max(axis=1)
    return float(problem.demand.weights @ plans.relative(problem, level))
