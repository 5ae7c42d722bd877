"""Loading a policy's kernels before a clock starts."""

from __future__ import annotations

import numpy as np

from moeplan.solvers import Cluster, Demand, Problem, SolveParameters, solve, warm_up
from moeplan.solvers.policies.registry import find

__all__ = ["load_kernels"]


def load_kernels(*policies: str) -> None:
    """Load, or compile, the kernels of policies: a moment where they are compiled already, a minute where not.

    Raises:
        ProblemError: there is no such policy.
    """
    for policy in policies:
        find(policy)
    warm_up()
    tokens = np.random.default_rng(0).geometric(0.01, (2, 4, 12))
    problem = Problem(Cluster.uniform(8, 2, nodes=2), Demand.of(tokens))
    for policy in policies:
        solve(problem, policy=policy, parameters=SolveParameters(work_limit=100))
