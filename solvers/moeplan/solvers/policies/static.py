"""Expert parallelism as it ships: experts in order, one replica each."""

from __future__ import annotations

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule


@policy("static", source="expert parallelism", split=SplitRule.EVEN)
def static(problem: Problem, parameters: SolveParameters) -> Layout:
    """Experts in order over the devices, one replica each; spare slots stay empty."""
    return Layout.contiguous(problem.experts, problem.capacity)
