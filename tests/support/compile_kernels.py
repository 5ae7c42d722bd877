"""Compiles the kernels that tests use, before files of tests run side by side and each of their processes would."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from moeplan.runtime_client.device.layout_plans import LayoutPlans
from moeplan.runtime_client.device.mailbox import Mailbox
from moeplan.runtime_client.device.quota_plans import QuotaPlans
from moeplan.runtime_client.device.routes import Numbering
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

RANDOM = np.random.default_rng(0)
COUNTS = RANDOM.geometric(0.01, (2, 4, 8))


def search() -> None:
    """Layouts."""
    warm_up()
    problem = Problem(Cluster.uniform(4, 3, nodes=2), Demand.of(COUNTS))
    short = SolveParameters(work_limit=50, deadline_s=1.0)
    for policy in available_policies():
        for rule in (None, *SplitRule):
            try:
                plan = solve(replace(problem, split_rule=rule), policy=policy, parameters=short)
                solve(replace(problem, current=plan.layout, split_rule=rule), policy=policy, parameters=short)
            except ProblemError:  # a policy knows some rules
                continue


def spill() -> None:
    """Plans of one step's counts, and what is built on them."""
    options = SpillOptions.uniform(8, 4, 1, domain=2)
    QuotaPlanner(options, 4).plan(COUNTS[0])
    LlepPlanner(options, 4).plan(COUNTS[0])
    for planning in (
        QuotaPlans(SpillOptions.uniform(8, 4, 1), Numbering(0, 64, -1, 16)),
        LayoutPlans(8, 4, 3, Numbering(0, 64, -1, 16), torch.device("cpu")),
    ):
        Mailbox(planning, torch.device("cpu")).close()
    plan_homes(Demand.of(COUNTS), options)
    routes = count_choices(list(RANDOM.random((8, 9, 2, 8)).argsort(axis=3)[..., :2]), 8)
    plan_known(KnownRoutes.by_rank(routes, 4, 1), options)
    place_by_affinity(RANDOM.integers(0, 9, (1, 8, 8)), Cluster.uniform(4, 3, nodes=2), ilp_seconds=0.1)
    balanced_assignment(RANDOM.random((8, 8)))


def main() -> None:
    with ProcessPoolExecutor(2) as pool:  # these two share few kernels
        for part in [pool.submit(each) for each in (search, spill)]:
            part.result()


if __name__ == "__main__":
    main()
