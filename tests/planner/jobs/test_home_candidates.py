"""Homes that a job's worker offers: what a move must gain, and what it leaves as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeplan.api.jobs import Forecast, JobSpec, Payback, Replan
from moeplan.planner.jobs.home_candidates import home_candidate
from moeplan.planner.jobs.job_plan import Candidate, decide, initial_plan
from moeplan.planner.jobs.outlook import LayerOutlook
from moeplan.solvers import Cluster, ExpertSpec, Layout, Link

DEVICES, EXPERTS, TOKENS = 8, 32, 4_000
SHARE = 0.9 ** np.arange(EXPERTS)
WINDOW = tuple(
    np.random.default_rng([2, step]).multinomial(TOKENS // DEVICES, SHARE / SHARE.sum(), DEVICES) for step in range(4)
)


def job(**fields: Any) -> JobSpec:
    values: dict[str, Any] = {
        "cluster": Cluster.uniform(DEVICES, 5, nodes=4, inter_node=Link(1e9)),
        "expert": ExpertSpec(weight_bytes=10**6, state_bytes=3 * 10**6, seconds_per_token=1e-6),
        "spill_slots": 2,
        "forecast": Forecast(window_steps=4),
    }
    return JobSpec(layers=1, experts=EXPERTS, **(values | fields))


def candidate(spec: JobSpec) -> Candidate:
    return home_candidate(0, LayerOutlook(spec, WINDOW, spec.initial[0]))


def moved(spec: JobSpec, found: Candidate) -> int:
    return int((found.layout.slots != spec.initial[0].slots).sum())


def test_homes_balance_nodes_and_stay_where_they_need_not_move() -> None:
    spec = job()
    found = candidate(spec)
    assert found.imbalance < 1.05 < 1.5 < found.imbalance_before
    # Slots of those that stay are as they were, and of each expert there is one replica.
    assert 0 < moved(spec, found) < EXPERTS
    assert np.array_equal(np.sort(found.layout.slots[found.layout.slots >= 0]), np.arange(EXPERTS))
    assert np.array_equal(found.layout.slots < 0, spec.initial[0].slots < 0)
    assert found.cost_s == pytest.approx(found.imbalance * TOKENS / DEVICES * 1e-6, rel=0.1)


def test_a_limit_of_moves_holds() -> None:
    spec = job(max_moves=4)
    assert moved(spec, candidate(spec)) == 4


def test_moves_pay_for_weights_and_optimizer_state() -> None:
    """An expert takes 4 ms over the slow link, so moving saves nothing within some steps of half a millisecond."""
    soon, late = (job(replan=Replan(payback=Payback(horizon))) for horizon in (2, 1_000))
    assert not moved(soon, candidate(soon))
    found = candidate(late)
    decision, layers = decide(late, initial_plan(late, 1, 0), [found], step=4, window_steps=4)
    assert decision.reason.value == "gain_pays"
    arrivals = np.bincount(np.nonzero(found.layout.slots != late.initial[0].slots)[0])
    assert decision.move_cost_s == pytest.approx(arrivals.max() * 4e-3)
    assert layers[0].moved_replicas == moved(late, found)


def test_ranks_without_memory_for_tokens_get_fewer() -> None:
    expert = ExpertSpec(weight_bytes=10, state_bytes=30, activation_bytes=1)
    # Room for 600 tokens on the first node's ranks, and for all there are on the others.
    memory = np.array([4 * 40 + 600] * 2 + [10**6] * 6)
    spec = job(cluster=Cluster.uniform(DEVICES, 5, nodes=4, memory_bytes=memory), expert=expert)
    found = candidate(spec)
    home = found.layout.hosts.device
    loads = np.bincount(home, np.sum(WINDOW, axis=(0, 1)) / 4, minlength=DEVICES)
    assert loads[:2].sum() <= 2 * 600


def test_groups_stay_in_one_node() -> None:
    spec = job(groups=8)
    nodes = spec.cluster.node[candidate(spec).layout.hosts.device].reshape(8, 4)
    assert (nodes == nodes[:, :1]).all()


def test_the_layout_in_force_has_one_replica_of_each() -> None:
    twice = Layout(np.array([[*range(d * 4, d * 4 + 4), (d * 4 + 4) % EXPERTS] for d in range(DEVICES)]), EXPERTS)
    with pytest.raises(ValueError, match="40 replicas: must be one per expert"):
        job(initial=(twice,))
