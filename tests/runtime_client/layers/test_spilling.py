"""What is lent beyond a layout: every token computed once, within the spare slots, and loads that become even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime_client import (
    ExpertGroup,
    ExpertShape,
    FullyShardedExperts,
    HomeMoves,
    PlannedLayer,
    ResidentExperts,
)
from moeplan.runtime_client.integrations.planned_replicas import PlannedReplicas
from moeplan.runtime_client.layers.dividing import Division
from moeplan.runtime_client.layers.spilling import Spilling
from moeplan.solvers import (
    Cluster,
    Demand,
    ExpertSpec,
    Layout,
    LlepPlanner,
    Problem,
    QuotaPlanner,
    SpillOptions,
    solve,
)
from moeplan.solvers.problem.errors import InfeasibleError


def of_loads(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    popularity = rng.dirichlet(np.full(experts, rng.choice([0.2, 1.0, 5.0])))
    return rng.multinomial(rng.integers(0, 2_000, ranks), popularity, size=ranks).astype(np.int64)


@settings(max_examples=100)
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


def test_a_planner_of_other_speeds_than_the_cluster_is_refused() -> None:
    group, shape = ExpertGroup(0, 2), ExpertShape(4, 3)
    cluster = Cluster.uniform(2, 2, speed=[1, 3])
    equal = QuotaPlanner(SpillOptions.uniform(4, 2, 1), 2)
    own = QuotaPlanner(SpillOptions.uniform(4, 2, 1, speed=cluster.speed * 2), 2)  # speeds are relative
    with pytest.raises(
        ValueError, match=r"planner\.options\.speed = \[1\.0, 1\.0\]: .* cluster\.speed = \[1\.0, 3\.0\]"
    ):
        FullyShardedExperts(shape, 4, group, planner=equal, cluster=cluster)
    layer = FullyShardedExperts(shape, 4, group, planner=own, cluster=cluster)
    with pytest.raises(ValueError, match=r"SpillOptions\.uniform\(experts, 2, spare, speed=cluster\.speed\)"):
        layer.planner = equal
    with pytest.raises(ValueError, match=r"PlannerSession\(cluster=\)"):
        layer.plan = PlannedLayer(layer.layout, Division(Cluster.uniform(2, 2), ExpertSpec(), "optimal"))
    assert layer.plan.division.cluster is cluster
    layer.planner = None
    # Without a cluster the planner's speeds are those of the ranks.
    alone = FullyShardedExperts(shape, 4, group, planner=own, layout=Layout(np.array([[0, 1, 2], [2, 3, 0]]), 4))
    assert alone.device_loads(np.full((2, 4), 10)).tolist() == [20, 60]


@pytest.mark.parametrize("kind", [FullyShardedExperts, ResidentExperts])
def test_a_planner_that_cannot_plan_passes_is_refused_by_what_was_given(
    kind: type[FullyShardedExperts] | type[ResidentExperts],
) -> None:
    group, shape, options = ExpertGroup(0, 2), ExpertShape(4, 3), SpillOptions.uniform(4, 2, 1)
    layer = kind(shape, 4, group)
    for planner, told in (
        (QuotaPlanner(options, 4), r"planner\.sources = 4: the group has 2 ranks.* write QuotaPlanner\(options, 2\)"),
        (LlepPlanner(options, 1), r"planner\.sources = 1: .* write LlepPlanner\(options, 2\)"),
        (QuotaPlanner(options, 2, dtype=np.int32), r"planner\.dtype = int32: .* write QuotaPlanner\(options, 2\)"),
    ):
        with pytest.raises(ValueError, match=told):
            kind(shape, 4, group, planner=planner)
        with pytest.raises(ValueError, match=told):
            layer.planner = planner


def test_a_planner_of_other_homes_is_refused() -> None:
    layer = ResidentExperts(ExpertShape(4, 3), 4, ExpertGroup(0, 2))
    other = QuotaPlanner(SpillOptions.uniform(4, 2, 1, home=[0, 1, 0, 1]), 2)
    with pytest.raises(
        ValueError, match=r"planner\.options\.home differs .* planner\.with_home\(layer\.planner\.options\.home\)"
    ):
        layer.planner = other
    layer.planner = other.with_home(layer.planner.options.home)
    assert layer.planner.options.home.tolist() == [0, 0, 1, 1]
    fixed = ResidentExperts(ExpertShape(4, 3), 4, ExpertGroup(), planner=PlannedReplicas(4, 1, 1))
    with pytest.raises(TypeError, match=r"PlannedReplicas: has no with_home\(home\)"):
        HomeMoves([fixed])
