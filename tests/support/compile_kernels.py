"""Compiles the kernels that tests use, before files of tests run side by side and each of their processes would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.solvers import (
    Cluster,
    Demand,
    KnownRoutes,
    LlepPlanner,
    Problem,
    ProblemError,
    QuotaPlanner,
    SolveParameters,
    SpillOptions,
    SplitRule,
    available_policies,
    balanced_assignment,
    count_choices,
    place_by_affinity,
    plan_homes,
    plan_known,
    solve,
    warm_up,
)


def main() -> None:
    warm_up()
    rng = np.random.default_rng(0)
    counts = rng.geometric(0.01, (2, 4, 8))
    problem = Problem(Cluster.uniform(4, 3, nodes=2), Demand.of(counts))
    short = SolveParameters(work_limit=50, deadline_s=1.0)
    for policy in available_policies():
        for rule in (None, *SplitRule):
            try:
                plan = solve(replace(problem, split_rule=rule), policy=policy, parameters=short)
                solve(replace(problem, current=plan.layout, split_rule=rule), policy=policy, parameters=short)
            except ProblemError:  # a policy knows some rules
                continue
    options = SpillOptions.uniform(8, 4, 1, domain=2)
    QuotaPlanner(options, 4).plan(counts[0])
    LlepPlanner(options, 4).plan(counts[0])
    plan_homes(Demand.of(counts), options)
    routes = count_choices(list(rng.random((8, 9, 2, 8)).argsort(axis=3)[..., :2]), 8)
    plan_known(KnownRoutes.by_rank(routes, 4, 1), options)
    place_by_affinity(rng.integers(0, 9, (1, 8, 8)), Cluster.uniform(4, 3, nodes=2), ilp_seconds=0.1)
    balanced_assignment(rng.random((8, 8)))


if __name__ == "__main__":
    main()
