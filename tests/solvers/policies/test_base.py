"""The policy `base`: layouts as linear assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeplan.solvers import Cluster, Demand, Layout, Problem, solve
from moeplan.solvers.plan.cost import traffic


def remote(problem: Problem, layout: Layout) -> int:
    """Tokens that cross nodes, all scenarios together."""
    plan_traffic = traffic(problem, layout, solve(problem, policy="base").split)
    return int(plan_traffic[:, problem.cluster.node[:, None] != problem.cluster.node].sum())


def test_one_slot_per_device_is_placed_where_least_is_sent() -> None:
    # One round: an assignment problem, whose optimum enumeration gives.
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(0, 100, (4, 4))
        problem = Problem(Cluster.uniform(4, 1, nodes=4), Demand.of(tokens))
        layout = solve(problem, policy="base").layout
        stays = tokens[np.arange(4), layout.slots[:, 0]].sum()
        assert stays == max(tokens[np.arange(4), order].sum() for order in itertools.permutations(range(4)))


def test_experts_live_on_the_node_that_asks_for_them() -> None:
    tokens = np.kron(np.eye(2, dtype=int), np.full((4, 4), 100)) + 1  # sources 0-3 want experts 0-3, 4-7 the others
    problem = Problem(Cluster.uniform(8, 1, nodes=2), Demand.of(tokens))
    layout = solve(problem, policy="base").layout
    assert set(layout.slots[:4, 0]) == set(range(4))
    assert remote(problem, layout) == 2 * 4 * 4


def test_equal_loads_move_nothing() -> None:
    rng = np.random.default_rng(1)
    current = Layout(rng.permutation(24).reshape(8, 3).astype(np.int32), 24)
    plan = solve(Problem(Cluster.uniform(8, 3), Demand.of(np.full(24, 7)), current=current), policy="base")
    assert plan.moves is not None
    assert len(plan.moves) == 0
    assert plan.mean_imbalance == 1


def test_fewer_moves_than_packing_anew() -> None:
    rng = np.random.default_rng(2)
    loads = rng.integers(50, 150, 64)
    cluster = Cluster.uniform(8, 9)
    current = solve(Problem(cluster, Demand.of(loads)), policy="base").layout
    drifted = Problem(cluster, Demand.of(loads + rng.integers(-10, 10, 64)), current=current)
    ours, packed = solve(drifted, policy="base").moves, solve(drifted, policy="eplb").moves
    assert ours is not None
    assert packed is not None
    assert len(ours) < len(packed) / 2


def test_a_hot_expert_gets_a_replica_on_every_device() -> None:
    plan = solve(Problem(Cluster.uniform(4, 2), Demand.of([900, 30, 30, 30])), policy="base")
    assert plan.layout.replicas[0] == 4
    assert plan.mean_imbalance == pytest.approx(248 / 247.5)
