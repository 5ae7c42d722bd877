"""Clusters of many devices: experts are divided over blocks so that each is an easy problem of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, solve
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.search.blocks import blocks_of


def drifting(experts: int, scenarios: int) -> Int64:
    """int64[scenarios, 1, experts]: lognormal loads, each scenario apart from the others by a factor of each expert."""
    rng = np.random.default_rng(0)
    loads: Int64 = (1e3 * rng.lognormal(0, 1, experts) * rng.lognormal(0, 0.3, (scenarios, 1, experts))).astype(
        np.int64
    )
    return loads


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_blocks_divide_devices_and_experts_with_spare_slots_for_each(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, experts = rng.integers(1, 80), rng.integers(1, 300)
    slots = rng.integers(0, 12, devices, np.int32)
    slots[0] += max(0, experts - np.minimum(slots, experts).sum() + slots[0])
    speed = rng.choice([np.ones(devices), rng.uniform(0.5, 2, devices)])
    tokens = rng.integers(0, 50, (rng.integers(1, 4), 1, experts))
    if np.minimum(slots, experts).sum() < experts:
        return
    problem = Problem(Cluster(slots, np.zeros(devices, np.int32), speed), Demand.of(tokens))
    blocks = blocks_of(problem, NEVER)
    if blocks:
        assert np.array_equal(np.sort(np.concatenate([d for d, _ in blocks])), np.flatnonzero(problem.capacity))
        assert np.array_equal(np.sort(np.concatenate([e for _, e in blocks])), np.arange(experts))
        for of_block, held in blocks:
            assert 0 < len(held) <= problem.capacity[of_block].sum()


@pytest.mark.parametrize("speeds", [False, True])
def test_many_devices_are_planned_well_with_little_work(speeds: bool) -> None:
    speed = np.random.default_rng(1).uniform(0.5, 1.5, 128) if speeds else np.ones(128)
    cluster = Cluster(np.full(128, 9, np.int32), np.zeros(128, np.int32), speed)
    plan = solve(Problem(cluster, Demand.of(drifting(1024, 4))), parameters=SolveParameters(work_limit=500))
    assert plan.objective < 1.005


def test_blocks_are_for_problems_that_nothing_else_limits() -> None:
    """With few moves, or none, the layout in force stays the start, however many devices there are."""
    cluster = Cluster.uniform(32, 3)
    current = Layout.contiguous(64, cluster.slots)
    problem = Problem(cluster, Demand.of(drifting(64, 2)), current=current, max_moves=3)
    plan = solve(problem, parameters=SolveParameters(work_limit=500))
    assert plan.moves is not None
    assert len(plan.moves) <= 3
