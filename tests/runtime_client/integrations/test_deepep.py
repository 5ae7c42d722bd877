"""Spill plans as the tables of DeepEP's and UltraEP's buffers, on a recorded trace."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.repository import ROOT

from moeplan.runtime_client.integrations.deepep import layout_of, physical_choices, redundancy_mapping, sent_by
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.errors import ProblemError

SLOTS = 2


def trace() -> Int64:
    """[layer-steps, sources, experts] of the repository's trace, at home in order on as many ranks as sources."""
    with np.load(ROOT / "examples/traces/moe-e64-cut.npz") as arrays:
        counts = arrays["counts"].astype(np.int64)
    return counts.reshape(-1, *counts.shape[2:])


def test_every_plan_of_a_trace_goes_there_and_back() -> None:
    every = trace()
    ranks, experts = every.shape[1:]
    options = SpillOptions.uniform(experts, ranks, SLOTS)
    planner = QuotaPlanner(options, ranks)
    for counts in every:
        plan = planner.plan(counts)
        mapping = redundancy_mapping(plan, options)
        assert mapping.shape == (ranks, SLOTS)
        assert mapping.dtype == np.int32
        back = {(int(expert), rank) for rank, row in enumerate(mapping) for expert in row if expert >= 0}
        assert back == set(zip(plan.expert.tolist(), plan.device.tolist(), strict=True))
        layout = layout_of(mapping, experts)
        sent = sum(sent_by(rank, plan, layout) for rank in range(ranks))
        assert (np.asarray(sent).sum(axis=1) == plan.load).all()
    assert plan.imbalance < 1.01


def test_choices_become_those_of_physical_experts() -> None:
    """Every token goes to a slot that holds its expert, and every rank computes what the plan gives it."""
    counts = trace()[0]
    ranks, experts = counts.shape
    options = SpillOptions.uniform(experts, ranks, SLOTS)
    plan = QuotaPlanner(options, ranks).plan(counts)
    layout = layout_of(redundancy_mapping(plan, options), experts)
    rng, load = np.random.default_rng(0), np.zeros(ranks, np.int64)
    for rank in range(ranks):
        index = rng.permutation(np.repeat(np.arange(experts), counts[rank]))[:, None]
        physical = physical_choices(index, sent_by(rank, plan, layout), layout)
        assert (layout.slots.ravel()[physical] == index).all()
        load += np.bincount(physical.ravel() // layout.slots.shape[1], minlength=ranks)
    assert (load == plan.load).all()


def test_what_the_transport_cannot_do_is_refused() -> None:
    counts = np.full((2, 4), 3)
    scattered = SpillOptions.uniform(4, 2, 1, home=[0, 1, 0, 1])
    with pytest.raises(ProblemError, match="must be expert // 2: the transport has no other homes"):
        redundancy_mapping(QuotaPlanner(scattered, 2).plan(counts), scattered)
    domains = SpillOptions.uniform(4, 2, 1, domain=1)
    with pytest.raises(ProblemError, match="one NVLink domain"):
        redundancy_mapping(QuotaPlanner(domains, 2).plan(counts), domains)
    with pytest.raises(ProblemError, match=r"2 ranks.*must divide the number of experts \(5\)"):
        layout_of(np.full((2, 1), -1, np.int32), 5)
    layout = layout_of(np.full((2, 1), -1, np.int32), 4)
    with pytest.raises(ProblemError, match=r"0 tokens of expert 1.*must be 1"):
        physical_choices(np.array([[1]]), np.zeros((2, 3), np.int64), layout)
