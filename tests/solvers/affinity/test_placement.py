"""Layouts by affinity between layers: optimal on small models, bounded on all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Cluster, Layout, ProblemError
from moeplan.solvers.affinity.placement import AffinityPlan, crossings, place_by_affinity
from moeplan.solvers.problem.arrays import Int32, Int64


def nodes_of(plan: AffinityPlan, cluster: Cluster) -> Int32:
    """int32[layers, experts]: the node of each expert."""
    return np.stack([cluster.node[layout.hosts.device] for layout in plan.layouts])


def fewest(pairs: Int64, seats: list[int], loads: Int64, tolerance: float) -> int:
    """Fewest crossings of all placements whose node loads are within `tolerance`, by enumeration; -1 without any."""
    experts = pairs.shape[1]
    choices = [
        [
            np.array(choice)
            for choice in itertools.product(range(len(seats)), repeat=experts)
            if np.bincount(choice, minlength=len(seats)).tolist() == seats
            and np.bincount(choice, weights=of_layer, minlength=len(seats)).max()
            <= of_layer.sum() / len(seats) * (1 + tolerance)
        ]
        for of_layer in loads
    ]
    best = -1
    for nodes in itertools.product(*choices):
        kept = sum(int(p[a[:, None] == b].sum()) for p, a, b in zip(pairs, nodes, nodes[1:], strict=False))
        best = max(best, kept)
    return -1 if best < 0 else int(pairs.sum()) - best


@pytest.mark.parametrize("seed", range(6))
def test_small_models_are_placed_optimally(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 50, (2, 4, 4)) if seed % 2 else rng.integers(0, 50, (1, 6, 6))
    experts = pairs.shape[1]
    cluster = Cluster.uniform(2, experts // 2, nodes=2)
    loads = rng.integers(40, 60, (len(pairs) + 1, experts))
    for tolerance in (10.0, 0.1):
        best = fewest(pairs, [experts // 2] * 2, loads, tolerance)
        assert best >= 0
        plan = place_by_affinity(pairs, cluster, loads=loads, tolerance=tolerance)
        assert plan.crossing == plan.bound == best  # found, and proven by the ILP
        assert plan.crossing == crossings(pairs, cluster, plan.layouts)
        searched = place_by_affinity(pairs, cluster, loads=loads, tolerance=tolerance, ilp_seconds=0)
        assert searched.bound <= best <= searched.crossing <= best * 1.1


@settings(max_examples=25)
@given(st.integers(2, 4), st.integers(3, 9), st.integers(1, 5), st.data())
def test_the_bound_holds_and_layouts_are_valid(layers: int, experts: int, devices: int, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, devices))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    pairs = rng.integers(0, 9, (layers - 1, experts, experts))
    cluster = Cluster.uniform(devices, -(-experts // devices), nodes=nodes)
    plan = place_by_affinity(pairs, cluster, tolerance=100.0, ilp_seconds=0)
    assert len(plan.layouts) == layers
    assert 0 <= plan.bound <= plan.crossing <= plan.total == pairs.sum()
    for layout in plan.layouts:
        assert (layout.replicas == 1).all()
        used = (layout.slots >= 0).sum(axis=1)
        assert used.max() - used.min() <= 1
    assert plan.crossing <= crossings(pairs, cluster, [Layout.contiguous(experts, cluster.slots)] * layers)


def test_hidden_groups_are_found() -> None:
    # Experts of every layer fall into four groups that tokens never leave, under shuffled names.
    rng = np.random.default_rng(0)
    group = np.stack([rng.permutation(np.repeat(np.arange(4), 16)) for _ in range(5)])
    pairs = np.stack([(a[:, None] == b) * rng.integers(1, 20, (64, 64)) for a, b in itertools.pairwise(group)])
    cluster = Cluster.uniform(16, 4, nodes=4)
    plan = place_by_affinity(pairs, cluster, tolerance=1.0)
    assert plan.crossing == 0
    for here, hidden in zip(nodes_of(plan, cluster), group, strict=True):
        assert len(set(zip(here.tolist(), hidden.tolist(), strict=True))) == 4


def test_a_node_s_load_stays_within_its_share() -> None:
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 100, (3, 32, 32)) ** 2
    loads = rng.integers(10, 100, (4, 32))
    cluster = Cluster.uniform(8, 4, nodes=4)
    plan = place_by_affinity(pairs, cluster, loads=loads, tolerance=0.03)
    for here, of_layer in zip(nodes_of(plan, cluster), loads, strict=True):
        assert np.bincount(here, weights=of_layer).max() <= of_layer.sum() / 4 * 1.03 + 1e-6


def test_the_same_plan_every_time_and_one_layer_alone() -> None:
    pairs = np.random.default_rng(2).integers(0, 9, (2, 12, 12))
    cluster = Cluster.uniform(4, 3, nodes=2)
    plans = [place_by_affinity(pairs, cluster, ilp_seconds=0, seed=3) for _ in range(2)]
    assert plans[0].layouts == plans[1].layouts
    alone = place_by_affinity(np.zeros((0, 12, 12), np.int64), cluster)
    assert (alone.crossing, alone.bound, alone.total, len(alone.layouts)) == (0, 0, 0, 1)


def test_mistakes_are_explained() -> None:
    cluster = Cluster.uniform(2, 2)
    good = np.ones((1, 4, 4), np.int64)
    for pairs, options, field in (
        (np.ones((1, 4, 3), np.int64), {}, "pairs"),
        (-good, {}, "pairs[0, 0, 0]"),
        (np.ones((1, 5, 5), np.int64), {}, "cluster.slots"),
        (good, {"loads": np.ones((1, 4))}, "loads"),
        (good, {"tolerance": -1.0}, "tolerance"),
    ):
        with pytest.raises(ProblemError) as error:
            place_by_affinity(pairs, cluster, **options)
        assert error.value.field == field
