"""The exact model of a whole problem."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.solvers.exact.model import Answer, Effort, Model
from moeplan.solvers.exact.run import run
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.errors import InfeasibleError, ProblemError
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["any_layout", "proven_by", "whole"]

SEARCH = 5.0
"""Deterministic seconds that the search for any valid layout may take."""


def whole(problem: Problem, incumbent: Int32 | None) -> Model:
    """The model of all scenarios that have tokens, started from a layout int32[devices, width] if there is one.

    Where none has any, one of them stands for all: the model then asks for any layout.
    """
    mean = problem.mean_level
    with_tokens = np.flatnonzero(mean > 0) if mean.any() else np.zeros(1, np.int64)
    limits, expert = problem.limits, problem.expert
    return Model(
        problem.loads[with_tokens],
        problem.demand.weights[with_tokens] / np.where(mean > 0, mean, 1.0)[with_tokens],
        problem.cluster.speed,
        problem.capacity,
        incumbent,
        None if limits.none else limits,
        problem.cluster.memory_bytes if expert.activation_bytes else None,
        expert.weight_bytes + expert.state_bytes,
        expert.activation_bytes,
        tail=problem.tail,
        even=problem.split_rule is SplitRule.EVEN,
    )


def proven_by(problem: Problem, answer: Answer) -> float:
    """What the answer of `whole` proves: no layout has a smaller objective.

    Scenarios without tokens are not in the model; their imbalance is 1. That of a tail counts them itself.
    """
    return answer.bound + (float(problem.demand.weights[problem.mean_level == 0].sum()) if problem.tail >= 1 else 0.0)


def any_layout(problem: Problem, solver: str, deadline: float | None) -> Int32:
    """A valid layout, int32[devices, width], where simpler ways found none.

    Raises:
        InfeasibleError: there is none.
        ProblemError: none was found with the work allowed.
    """
    from moeplan.solvers.construct.repair import table

    _check_memory(problem)
    anyhow = replace(whole(problem, None), even=False, tail=1.0)  # split and risk are no matter yet
    if anyhow.memory is None:  # nor is the demand, which may be more than a solver's whole numbers hold
        anyhow = replace(anyhow, loads=np.zeros_like(anyhow.loads[:1]), weights=np.ones(1))
    answer = run(anyhow, solver, Effort(deadline, SEARCH))
    if answer.placed is not None:
        return table(problem, answer.placed)
    limits = list(problem.constraints.names)
    if problem.max_moves is not None:
        limits.append("max_moves")
    if problem.cluster.memory_bytes is not None:
        limits.append("cluster.memory_bytes")
    if answer.status == "infeasible":
        raise InfeasibleError("constraints", ", ".join(limits), "no layout satisfies them together; relax one of them")
    raise ProblemError("constraints", ", ".join(limits), "no layout was found in time; allow more time, or relax one")


def _check_memory(problem: Problem) -> None:
    """Refuse what memory cannot hold however replicas and tokens are spread.

    Raises:
        InfeasibleError: one replica of each expert and the activations need more than all devices have together.
    """
    memory, expert = problem.cluster.memory_bytes, problem.expert
    if memory is None:
        return
    has = int(memory[problem.capacity > 0].sum())
    needs = problem.experts * expert.replica_bytes + int(problem.loads.sum(axis=1).max()) * expert.activation_bytes
    if needs > has:
        raise InfeasibleError(
            "cluster.memory_bytes",
            f"{has} bytes on all devices",
            f"one replica of each expert and the activations of {problem.loads.sum(axis=1).max()} tokens need {needs}; "
            "add memory or devices, or plan for fewer tokens",
        )
