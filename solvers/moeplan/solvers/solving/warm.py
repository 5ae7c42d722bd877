"""Loading ahead what the first solve of a process would otherwise load within its deadline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.solving.solver import solve

__all__ = ["warm_up"]


def warm_up() -> None:
    """Load kernels and libraries, about a second where the kernels are compiled already.

    A program that gives deadlines of milliseconds calls it once when it starts.
    """
    tokens = np.random.default_rng(0).geometric(0.01, (2, 4, 12))
    short = SolveParameters(work_limit=100, target_gap=0.0)
    few = Problem(Cluster.uniform(8, 2, nodes=2), Demand.of(tokens))
    plan = solve(few, parameters=short)
    solve(replace(few, current=plan.layout, max_moves=2), parameters=short)
    solve(Problem(Cluster.uniform(4, 4), Demand.of(tokens[:1])))
    solve(Problem(Cluster.uniform(32, 3), Demand.of(np.random.default_rng(0).poisson(9, (2, 1, 60)))), parameters=short)
    solve(few, policy="ilp", parameters=short)
    solve(replace(few, constraints=Constraints(domain=few.cluster.node)), parameters=short)
    for rule in (SplitRule.HOME, SplitRule.LOCAL):
        solve(replace(few, split_rule=rule), parameters=short)
    tight = Problem(Cluster.uniform(12, 2), Demand.of((1_000 / np.arange(1, 21)).astype(np.int64)))
    for rule in (SplitRule.OPTIMAL, SplitRule.EVEN):  # with a step of the stronger bound
        solve(replace(tight, split_rule=rule), parameters=SolveParameters(work_limit=5_000, target_gap=0.0))
