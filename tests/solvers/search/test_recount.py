"""Other numbers of replicas: packed anew they are a layout, from which a search finds what it else would not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, SplitRule, solve
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.search.local import Burst
from moeplan.solvers.search.recount import recounted


def lognormal(experts: int, seed: int) -> Int64:
    """int64[experts]: a few experts have most of a million tokens."""
    weight = np.random.default_rng(seed).lognormal(0, 2, experts)
    tokens: Int64 = (weight / weight.sum() * 1_000_000).astype(np.int64)
    return tokens


@pytest.mark.parametrize(("loads", "best_known"), [(2, 1.00928), (4, 1.06003)])
def test_an_even_split_hardly_depends_on_the_seed(loads: int, best_known: float) -> None:
    # Without other numbers of replicas these seeds end at 1.013 to 1.109, and all at 1.161.
    problem = Problem(Cluster.uniform(8, 3), Demand.of(lognormal(16, loads)), split_rule=SplitRule.EVEN)
    for seed in range(6):
        assert solve(problem, parameters=SolveParameters(seed=seed)).objective <= 1.02 * best_known


@settings(max_examples=40)
@given(
    st.sampled_from([(2, 1, 2), (3, 2, 2), (8, 8, 2), (16, 8, 3), (20, 4, 6), (24, 8, 3)]),
    st.integers(1, 20),
    st.integers(0, 2**31),
)
def test_a_layout_with_other_numbers_of_replicas_is_one(shape: tuple[int, int, int], packings: int, seed: int) -> None:
    experts, devices, width = shape
    loads = lognormal(experts, seed).astype(np.float64)
    problem = Problem(Cluster.uniform(devices, width), Demand.of(lognormal(experts, seed)), split_rule=SplitRule.EVEN)
    start = solve(problem, policy="eplb").layout
    burst = Burst(packings, seed, 0.0, 0.0, NEVER)
    before = start.slots.copy()
    found = recounted(start.slots.copy(), loads, problem.capacity, problem.cluster.speed, burst)
    layout = Layout(found, experts)  # refuses an expert without a replica, or with two on a device
    assert (layout.slots >= 0).sum() == (before >= 0).sum()
    assert (layout.placed.sum(axis=1) <= problem.capacity).all()
    again = recounted(before, loads, problem.capacity, problem.cluster.speed, burst)
    np.testing.assert_array_equal(found, again)
