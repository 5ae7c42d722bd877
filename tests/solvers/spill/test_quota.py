"""`quota`: what every plan keeps, how near to the optimum it is, and that it is the same everywhere."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.spill_cases import Counts, check, skewed

from moeplan.solvers import QuotaPlanner, SpillOptions, SpillPlan, solve_exactly, transfer_tokens
from moeplan.solvers.problem.cluster import Link
from moeplan.solvers.problem.errors import InfeasibleError, ProblemError

T = TypeVar("T")


def plan_of(counts: Counts, options: SpillOptions) -> SpillPlan:
    plan = QuotaPlanner(options, len(counts), dtype=counts.dtype).plan(counts)
    check(plan, counts, options)
    return plan


@st.composite
def instances(draw: st.DrawFn) -> tuple[Counts, SpillOptions]:
    devices = draw(st.integers(1, 9))
    experts = draw(st.integers(1, 24))
    sources = draw(st.sampled_from([1, 2, devices, 2 * devices + 1]))
    integer = st.integers(0, draw(st.sampled_from([1, 5, 1000])))
    counts = np.array(draw(st.lists(integer, min_size=sources * experts, max_size=sources * experts)), np.int64)

    def per_device(values: st.SearchStrategy[T]) -> list[T]:
        return draw(st.lists(values, min_size=devices, max_size=devices))

    options = SpillOptions(
        home=np.array(draw(st.lists(st.integers(0, devices - 1), min_size=experts, max_size=experts))),
        spare=np.array(per_device(st.integers(0, 3))),
        domain=np.array(per_device(st.integers(0, 2))),
        node=np.array(per_device(st.integers(0, 2))),
        speed=np.array(per_device(st.sampled_from([0.5, 1.0, 1.0, 2.0, 0.7]))),
        token_cap=np.array(per_device(st.sampled_from([0, 10, 300, 5000, 2**46]))),
        replica_tokens=draw(st.sampled_from([0, 0, 3])),
        transfer_tokens=draw(st.sampled_from([0.0, 0.0, 2.5])),
        min_tokens=draw(st.sampled_from([1, 1, 4])),
        tolerance=draw(st.sampled_from([0.0, 5e-4, 0.05])),
        threshold=draw(st.sampled_from([1.0, 1.3])),
        tile_rows=draw(st.sampled_from([1, 1, 16])),
    )
    return counts.reshape(sources, experts), options


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(instances())
def test_every_plan_keeps_the_rules(instance: tuple[Counts, SpillOptions]) -> None:
    plan_of(*instance)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(instances())
def test_a_quick_plan_keeps_them_and_the_caps_wherever_another_does(instance: tuple[Counts, SpillOptions]) -> None:
    counts, options = instance
    quick = QuotaPlanner(options, len(counts), dtype=counts.dtype, quick=True)
    plan = quick.plan(counts)
    check(plan, counts, options)
    other = plan_of(counts, options)
    assert plan.shortfall.any() == other.shortfall.any()
    assert plan.makespan >= other.makespan - 1e-9 or plan.shortfall.any()
    assert quick.with_home(options.home).quick


@pytest.mark.parametrize("spare", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_small_instances_reach_the_optimum_of_cp_sat(seed: int, spare: int) -> None:
    options = SpillOptions.uniform(12, 4, spare, tolerance=0.0)
    counts = skewed(seed, 4, 12, 1000)
    exact = solve_exactly(counts, options, time_limit_s=20)
    assert exact.optimal
    plan = plan_of(counts, options)
    assert exact.makespan <= plan.makespan <= 1.003 * exact.makespan
    assert plan.bound <= exact.makespan


def test_cp_sat_starts_from_a_hint_and_knows_what_is_infeasible() -> None:
    options = SpillOptions.uniform(24, 6, 1)
    counts = skewed(4, 6, 24, 2048)
    plan = plan_of(counts, options)
    hinted = solve_exactly(counts, options, time_limit_s=5, hint=plan)
    assert plan.bound <= hinted.bound <= hinted.makespan <= plan.makespan
    assert hinted.share is not None
    np.testing.assert_array_equal(hinted.share.sum(axis=1), counts.sum(axis=0))
    tight = SpillOptions.uniform(8, 4, 2, token_cap=799)
    nothing = solve_exactly(np.full((4, 8), 100), tight, time_limit_s=5)
    assert nothing.infeasible
    assert nothing.share is None


def test_medium_instances_are_not_worse_than_cp_sat_with_a_time_limit() -> None:
    options = SpillOptions.uniform(32, 8, 1)
    counts = skewed(3, 8, 32, 4096, skew=0.7)
    exact = solve_exactly(counts, options, time_limit_s=4)
    assert plan_of(counts, options).makespan <= 1.003 * exact.makespan


@pytest.mark.parametrize("seed", range(4))
def test_caps_minimum_chunks_and_transfers_match_cp_sat(seed: int) -> None:
    options = SpillOptions.uniform(
        10, 5, 2, token_cap=[900, 1200, 1100, 2**40, 1300], replica_tokens=20, transfer_tokens=30.0, min_tokens=50,
        tolerance=0.0,
    )  # fmt: skip
    counts = skewed(seed, 5, 10, 1000, skew=0.6)
    exact = solve_exactly(counts, options, time_limit_s=20)
    assert exact.optimal
    plan = plan_of(counts, options)
    assert not plan.shortfall.any()
    assert plan.bound <= exact.makespan <= plan.makespan <= 1.03 * exact.makespan


def test_unequal_speeds_match_cp_sat() -> None:
    options = SpillOptions.uniform(12, 4, 2, speed=[1.0, 0.5, 2.0, 1.0], tolerance=0.0)
    counts = skewed(1, 4, 12, 1000)
    exact = solve_exactly(counts, options, time_limit_s=20)
    assert exact.optimal
    assert plan_of(counts, options).makespan <= 1.003 * exact.makespan


def test_what_chunks_leave_over_finds_a_place() -> None:
    loads = np.array([[330, 560, 80, 70, 60, 580, 40, 260]])
    options = SpillOptions.uniform(8, 4, 2, min_tokens=145, tolerance=0.0)
    assert solve_exactly(loads, options).makespan == 495
    assert plan_of(loads, options).load.tolist() == [495] * 4


SMALL_KINDS = ("", "m", "s", "t", "c", "mt", "ms", "st", "mc", "tc", "mstc", "msd", "k", "mk", "mtk")


def small_problem(rng: np.random.Generator, kind: str) -> tuple[Counts, SpillOptions]:
    """Up to 10 experts on 2 - 4 devices; m: least tokens, s: speeds, t: transfers, c: caps, d: domains, k: tiles."""
    devices = int(rng.integers(2, 5))
    experts, spare = int(rng.integers(devices, 11)), int(rng.integers(1, 4))
    popularity = rng.permutation(np.arange(1, experts + 1) ** -rng.uniform(0, 1.5))
    counts = rng.multinomial(int(rng.choice([20, 200, 2000])) * devices, popularity / popularity.sum(), size=1)
    mean = counts.sum() / devices
    options = SpillOptions.uniform(
        experts,
        devices,
        spare,
        domain=2 if "d" in kind else None,
        speed=rng.choice([0.5, 1.0, 1.0, 2.0], devices) if "s" in kind else None,
        token_cap=np.ceil(mean * rng.uniform(0.9, 1.8, devices)).astype(np.int64) if "c" in kind else 2**46,
        replica_tokens=int(mean * rng.uniform(0, 0.1)) if "c" in kind else 0,
        transfer_tokens=round(mean * rng.uniform(0.01, 0.3), 1) if "t" in kind else 0.0,
        min_tokens=1 + int(mean * rng.uniform(0.02, 0.6)) if "m" in kind else 1,
        tolerance=0.0,
        tile_rows=1 + int(mean * rng.uniform(0, 0.1)) if "k" in kind else 1,
    )
    return counts, options


def test_small_problems_of_every_kind_are_within_a_hundredth_of_cp_sat() -> None:
    ratios = []
    for kind in SMALL_KINDS:
        rng = np.random.default_rng(list(kind.encode()))
        for _ in range(10):
            counts, options = small_problem(rng, kind)
            plan = plan_of(counts, options)
            exact = solve_exactly(counts, options, time_limit_s=2, hint=plan)
            assert plan.shortfall.any() == exact.infeasible
            if not exact.infeasible:
                assert plan.bound <= exact.makespan * (1 + 2e-4)  # the model rounds speeds
                ratios.append(plan.makespan / exact.makespan)
    assert len(ratios) >= 140
    assert np.quantile(ratios, 0.99) <= 1.01


def test_transfers_that_any_plan_needs_are_in_the_bound() -> None:
    counts = np.array([[400, 0, 0, 0]])
    plan = plan_of(counts, SpillOptions.uniform(4, 4, 1, transfer_tokens=40.0, tolerance=0.0))
    assert plan.makespan == 130.0 == pytest.approx(plan.bound)  # three transfers of 40 beside 400 tokens, on 4 devices


@pytest.mark.parametrize("skew", [0.3, 0.8, 1.2])
def test_two_spare_slots_balance_almost_perfectly(skew: float) -> None:
    counts = skewed(0, 32, 256, 16384, skew)
    plan = plan_of(counts, SpillOptions.uniform(256, 32, 2))
    assert plan.imbalance <= 1.0015


def test_one_expert_with_all_tokens_is_spread_over_every_slot() -> None:
    counts = np.zeros((8, 16), np.int64)
    counts[:, 5] = 1000
    plan = plan_of(counts, SpillOptions.uniform(16, 8, 1))
    assert plan.load.tolist() == [1000] * 8
    assert plan.replicas == 7


def test_one_token_zero_tokens_and_equal_loads_need_no_replica() -> None:
    options = SpillOptions.uniform(8, 4, 2)
    one = np.zeros((4, 8), np.int64)
    one[2, 3] = 1
    for counts in (one, np.zeros((4, 8), np.int64), np.full((4, 8), 7)):
        plan = plan_of(counts, options)
        assert plan.replicas == 0
        np.testing.assert_array_equal(plan.kept, counts)
    assert plan_of(np.zeros((4, 8), np.int64), options).imbalance == 1.0


def test_one_device_or_no_spare_slot_leaves_everything_at_home() -> None:
    for options in (SpillOptions.uniform(8, 1, 3), SpillOptions.uniform(8, 4, 0)):
        counts = skewed(0, 4, 8, 100)
        plan = plan_of(counts, options)
        assert plan.replicas == 0
        assert plan.makespan == plan.bound


def test_experts_that_devices_do_not_divide() -> None:
    options = SpillOptions.uniform(10, 4, 2)
    assert np.bincount(options.home).tolist() == [3, 3, 2, 2]
    assert plan_of(skewed(0, 4, 10, 5000), options).imbalance <= 1.001


def test_a_hot_domain_cannot_leave_itself() -> None:
    options = SpillOptions.uniform(16, 8, 4, domain=4)
    counts = np.full((8, 16), 10)
    counts[:, :8] = 90
    plan = plan_of(counts, options)
    assert plan.imbalance == plan.bound / plan.balanced == pytest.approx(1.8)


def test_spilling_waits_for_the_threshold() -> None:
    counts = np.full((4, 4), 100)
    counts[:, 0] = 120
    assert plan_of(counts, SpillOptions.uniform(4, 4, 1, threshold=1.3)).replicas == 0
    assert plan_of(counts, SpillOptions.uniform(4, 4, 1)).replicas > 0


def test_a_looser_tolerance_needs_fewer_replicas() -> None:
    counts = skewed(2, 32, 128, 8192, skew=0.8)
    replicas = [
        plan_of(counts, SpillOptions.uniform(128, 32, 2, tolerance=tolerance)).replicas
        for tolerance in (5e-4, 0.05, 0.3)
    ]
    assert replicas[0] > replicas[1] > replicas[2]


def test_a_transfer_that_costs_more_than_it_saves_is_not_made() -> None:
    counts = np.full((4, 4), 100)
    counts[:, 0] = 150
    assert plan_of(counts, SpillOptions.uniform(4, 4, 1, transfer_tokens=150.0)).replicas > 0
    assert plan_of(counts, SpillOptions.uniform(4, 4, 1, transfer_tokens=201.0)).replicas == 0
    seconds = transfer_tokens(weight_bytes=100, link=Link(50.0, latency_s=1.0), seconds_per_token=0.5)
    assert seconds == 6.0


def test_caps_that_cannot_hold_are_reported_with_the_shortfall() -> None:
    counts = np.full((4, 8), 100)
    plan = plan_of(counts, SpillOptions.uniform(8, 4, 2, token_cap=[700, 2**40, 2**40, 2**40]))
    assert not plan.shortfall.any()
    assert plan.load[0] == 700
    tight = plan_of(counts, SpillOptions.uniform(8, 4, 2, token_cap=[700, 800, 800, 800]))
    assert tight.shortfall.sum() == 100
    device = int(np.argmax(tight.shortfall))
    with pytest.raises(InfeasibleError, match=rf"token_cap\[{device}\].*100 tokens"):
        tight.require_feasible()


def test_sources_prefer_their_own_device_then_their_node() -> None:
    counts = np.zeros((4, 4), np.int64)
    counts[:, 0] = [100, 100, 100, 100]
    options = SpillOptions.uniform(4, 4, 1, node=2, tolerance=0.0)
    plan = plan_of(counts, options)
    assert plan.load.tolist() == [100, 100, 100, 100]
    assert plan.remote_tokens(options.source_device(4), options.home) == 0

    counts[:, 0] = [0, 200, 0, 200]
    plan = plan_of(counts, options)
    for source, node in ((1, 0), (3, 1)):
        sent = plan.sent[source, options.node[plan.device] == node].sum()
        at_home = plan.kept[source, 0] if node == 0 else 0
        assert sent + at_home == 200


def test_layers_of_a_batch_are_planned_as_if_alone() -> None:
    options = SpillOptions.uniform(24, 6, 1)
    batch = np.stack([skewed(seed, 6, 24, 2000) for seed in range(5)])
    together = QuotaPlanner(options, 6, layers=5).plan_layers(batch)
    for counts, plan in zip(batch, together, strict=True):
        check(plan, counts, options)
        alone = plan_of(counts, options)
        for name in ("expert", "device", "quota", "sent", "kept"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(alone, name))


def test_a_copy_survives_the_next_call_and_int32_counts_give_the_same_plan() -> None:
    options = SpillOptions.uniform(24, 6, 1)
    planner = QuotaPlanner(options, 6)
    counts = skewed(0, 6, 24, 2000)
    lasting = planner.plan(counts).copy()
    planner.plan(skewed(1, 6, 24, 2000))
    check(lasting, counts, options)
    narrow = QuotaPlanner(options, 6, dtype=np.int32).plan(counts.astype(np.int32))
    np.testing.assert_array_equal(narrow.sent, lasting.sent)
    np.testing.assert_array_equal(narrow.kept, lasting.kept)


def test_copies_of_a_planner_plan_for_themselves() -> None:
    options = SpillOptions.uniform(24, 6, 1)
    planner = QuotaPlanner(options, 6)
    planner.plan(skewed(0, 6, 24, 2000))
    counts = skewed(1, 6, 24, 2000)
    for copied in (copy.deepcopy(planner), pickle.loads(pickle.dumps(planner))):
        check(copied.plan(counts), counts, options)
        np.testing.assert_array_equal(copied.plan(counts).kept, planner.plan(counts).kept)


def test_replicas_get_whole_tiles_where_products_compute_whole_tiles() -> None:
    counts = np.array([[200, 50, 1, 1]])  # four tiles and one at the first device, two at the second
    options = SpillOptions.uniform(4, 2, 1, tile_rows=64, tolerance=0.0)
    plan = plan_of(counts, options)
    assert plan.quota.tolist() == [64]
    assert plan.load.tolist() == [186, 66]
    assert plan.makespan == plan.bound == 256
    assert solve_exactly(counts, options).makespan == 256
    assert plan_of(counts, replace(options, tile_rows=1)).makespan == 126


_DIGEST = """
import hashlib, numpy as np
from moeplan.solvers import QuotaPlanner, SpillOptions
rng = np.random.default_rng(7)
options = SpillOptions.uniform(64, 16, 1, domain=8)
searching = SpillOptions.uniform(64, 16, 2, domain=8, min_tokens=10**5, transfer_tokens=1e5, tile_rows=64)
digest = hashlib.sha256()
for planner in (QuotaPlanner(options, 16), QuotaPlanner(searching, 16)):
    for _ in range(50):
        plan = planner.plan(rng.integers(0, 1000, (16, 64)) ** 2)
        for array in (plan.expert, plan.device, plan.quota, plan.sent, plan.kept):
            digest.update(array.tobytes())
print(digest.hexdigest())
"""


def test_every_process_finds_the_same_plan() -> None:
    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", _DIGEST], capture_output=True, text=True, check=True, timeout=120
        ).stdout

    assert run() == run()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros((3, 8), np.int64), "shape"),
        (np.zeros((4, 8), np.float64), "float64"),
        (np.full((4, 8), -1), "at least 0"),
        (np.full((4, 8), 2**45), "total"),
    ],
)
def test_invalid_counts_are_refused(counts: Counts, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        QuotaPlanner(SpillOptions.uniform(8, 4, 1), 4).plan(counts)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"spare": -1}, "spill.spare"),
        ({"domain": 0}, "spill.domain"),
        ({"speed": [1.0, 0.0, 1.0, 1.0]}, "spill.speed"),
        ({"home": [0, 1, 2, 4, 0, 0, 0, 0]}, "spill.home"),
        ({"token_cap": -5}, "spill.token_cap"),
        ({"tolerance": -0.1}, "spill.tolerance"),
        ({"threshold": 0.5}, "spill.threshold"),
        ({"min_tokens": 0}, "spill.min_tokens"),
        ({"tile_rows": 0}, "spill.tile_rows"),
    ],
)
def test_invalid_options_are_refused(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ProblemError) as error:
        SpillOptions.uniform(**({"experts": 8, "devices": 4, "spare": 1} | arguments))  # type: ignore[arg-type]
    assert error.value.field.startswith(field)
