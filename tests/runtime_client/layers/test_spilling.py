"""What is lent beyond a layout: every token computed once, within the spare slots, and loads that become even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime_client import ExpertGroup, ExpertShape, FullyShardedExperts
from moeplan.runtime_client.integrations.planned_replicas import PlannedReplicas
from moeplan.runtime_client.layers.dividing import Division
from moeplan.runtime_client.layers.spilling import Spilling
from moeplan.solvers import Cluster, Demand, ExpertSpec, Layout, Problem, QuotaPlanner, SpillOptions, solve
from moeplan.solvers.problem.errors import InfeasibleError


def of_loads(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    popularity = rng.dirichlet(np.full(experts, rng.choice([0.2, 1.0, 5.0])))
    return rng.multinomial(rng.integers(0, 2_000, ranks), popularity, size=ranks).astype(np.int64)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_every_token_is_computed_once_and_no_rank_does_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, experts, spare = (int(rng.integers(*limits)) for limits in ((1, 6), (1, 12), (0, 4)))
    rule = str(rng.choice(["optimal", "even"]))
    cluster = Cluster.uniform(ranks, -(-experts // ranks) + int(rng.integers(3)), speed=rng.uniform(0.5, 2, ranks))
    layout = solve(Problem(cluster, Demand.of(of_loads(rng, ranks, experts))), policy="hybrid").layout
    division = Division(cluster, ExpertSpec(), rule)
    planner = QuotaPlanner(SpillOptions.uniform(experts, ranks, spare, speed=cluster.speed), ranks)
    counts = of_loads(rng, ranks, experts)
    passes = [Spilling(planner, layout, division).plan(counts, rank) for rank in range(ranks)]

    slots = passes[0].slots
    width = layout.slots.shape[1]
    assert np.array_equal(slots[:, :width], layout.slots)
    assert ((slots[:, width:] >= 0).sum(axis=1) <= spare).all()
    Layout(slots, experts)  # no device holds an expert twice
    sent = np.stack([each.send for each in passes])  # [sources, devices, slots]
    assert np.array_equal(sent.transpose(1, 0, 2), np.stack([each.receive for each in passes]))
    for expert in range(experts):
        assert np.array_equal(sent[:, slots == expert].sum(axis=1), counts[:, expert])
    assert not sent[:, slots < 0].any()
    assert np.array_equal(sent.sum(axis=(0, 2)), passes[0].loads)
    before = division.divide(layout, counts).device_loads()[0] / cluster.speed
    assert (passes[0].loads / cluster.speed).max() <= before.max() * (1 + 1e-9)


def test_loads_that_a_layout_did_not_foresee_become_even() -> None:
    rng = np.random.default_rng(0)
    cluster = Cluster.uniform(8, 5)
    foreseen, counts = (rng.multinomial(40_000, rng.dirichlet(np.full(32, 0.5)), size=8) for _ in range(2))
    layout = solve(Problem(cluster, Demand.of(foreseen))).layout
    division = Division(cluster, ExpertSpec(), "optimal")
    planner = QuotaPlanner(SpillOptions.uniform(32, 8, 2), 8)
    alone = division.divide(layout, counts).device_loads()[0]
    loads = Spilling(planner, layout, division).plan(counts, 0).loads
    assert alone.max() > 1.3 * alone.mean()
    assert loads.max() < 1.001 * loads.mean()


def test_a_layer_lends_by_the_layout_in_force() -> None:
    shape, counts = ExpertShape(4, 3), np.array([[90, 10, 0, 0], [90, 10, 0, 0]])
    planner = QuotaPlanner(SpillOptions.uniform(4, 2, 1), 2)
    group = ExpertGroup(0, 2)
    layer = FullyShardedExperts(shape, 4, group, planner=planner)
    assert layer.device_loads(counts).tolist() == [100, 100]
    slots, send, _ = layer.route(counts)
    assert slots.tolist() == [[0, 1, -1], [2, 3, 0]]
    assert send.sum() == 100
    layer.layout = Layout(np.array([[0, 2], [1, 3]]), 4)
    assert layer.device_loads(counts).tolist() == [100, 100]
    assert layer.route(counts)[0].tolist() == [[0, 2, -1], [1, 3, 0]]
    layer.planner = QuotaPlanner(SpillOptions.uniform(4, 2, 0), 2)
    assert layer.device_loads(counts).tolist() == [180, 20]


def test_refusals() -> None:
    planner = QuotaPlanner(SpillOptions.uniform(4, 3, 1), 3)
    with pytest.raises(ValueError, match=r"planner\.options\.devices = 3: the group has 1 ranks"):
        FullyShardedExperts(ExpertShape(4, 3), 4, ExpertGroup(), planner=planner)
    layer = FullyShardedExperts(ExpertShape(4, 3), 4, ExpertGroup())
    with pytest.raises(ValueError, match=r"planner\.options\.devices = 3: the group has 1 ranks"):
        layer.planner = planner
    with pytest.raises(TypeError, match=r"PlannedReplicas: has no with_home\(home\)"):
        layer.planner = PlannedReplicas(4, 1, 1)  # type: ignore[assignment]
    capped = QuotaPlanner(SpillOptions.uniform(4, 2, 1, token_cap=5), 2)
    layer = FullyShardedExperts(ExpertShape(4, 3), 4, ExpertGroup(0, 2), planner=capped)
    with pytest.raises(InfeasibleError, match="exceeds the cap by"):
        layer.route(np.full((2, 4), 9))
