"""Ranks execute the split that a plan was costed by: every token of every (source, replica) pair is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tests.support.expert_groups import load_alike
from tests.support.instances import random_layout
from torch import Tensor

from moeplan.runtime_client.errors import LayoutMismatchError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers import sharded
from moeplan.runtime_client.layers.dividing import Division
from moeplan.runtime_client.layers.feed_forward import ExpertShape, feed_forward
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.solvers import Cluster, Demand, ExpertSpec, Layout, Problem, ProblemError, evaluate
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.split_rules import RANK_RULES, SplitRule
from moeplan.solvers.split.rules import routes

Launch = Callable[..., list[Any]]

RANKS, EXPERTS, TOKENS, CASES = 4, 6, 40, 3
SHAPE = ExpertShape(RANKS, 3)
LIMITED = ExpertSpec(weight_bytes=100, activation_bytes=10)


def machines(limited: bool) -> Cluster:
    """Two nodes of two ranks, no two equally fast; with little memory on one, if `limited`."""
    memory = [10_000, 10_000, 1_000, 10_000] if limited else None
    return Cluster.uniform(RANKS, 3, nodes=2, speed=[1.0, 2.0, 1.5, 0.5], memory_bytes=memory)


def choices(rank: int) -> Tensor:
    """int64[tokens, 2]: each rank has other favourites."""
    taste = np.random.default_rng(rank).dirichlet(np.full(EXPERTS, 0.6)) + 1e-3
    rng = np.random.default_rng(100 + rank)
    return torch.from_numpy(
        np.stack([rng.choice(EXPERTS, 2, replace=False, p=taste / taste.sum()) for _ in range(TOKENS)])
    )


def demand() -> Int64:
    """int64[ranks, experts]."""
    return np.stack([np.bincount(choices(rank).flatten().numpy(), minlength=EXPERTS) for rank in range(RANKS)])


def cases(limited: bool) -> list[tuple[Problem, Layout]]:
    problem = Problem(machines(limited), Demand.of(demand()), LIMITED if limited else ExpertSpec())
    return [(problem, random_layout(problem, seed)) for seed in ([1] if limited else range(CASES))]


def tokens_that_arrive(rule: str, limited: bool) -> list[list[list[int]]]:
    """Of each case and filled slot of this rank: tokens of each source, as the rows that arrive say."""
    group = ExpertGroup.create()
    assert group is not None
    counted = []

    def look(shape: ExpertShape, flat: Tensor, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        sources = np.split(rows.argmax(dim=1).numpy(), np.cumsum(sizes)[:-1])  # a token's vector names its source
        counted.append([np.bincount(part, minlength=RANKS).tolist() for part in sources])
        return feed_forward(shape, flat, rows, sizes)

    problem, _ = cases(limited)[0]
    layer = FullyShardedExperts(SHAPE, EXPERTS, group, split_rule=rule, cluster=problem.cluster, expert=problem.expert)
    load_alike([layer])
    with patch.object(sharded, "feed_forward", look):
        for _, layout in cases(limited):
            layer.layout = layout
            index = choices(group.rank)
            hidden = torch.zeros(TOKENS, RANKS)
            hidden[:, group.rank] = 1.0
            layer(hidden, index, torch.ones(index.shape))
    return counted


@pytest.mark.parametrize("limited", [False, True], ids=["plenty", "little memory"])
@pytest.mark.parametrize("rule", sorted(RANK_RULES))
def test_ranks_send_what_the_plan_was_costed_by(ranks: Launch, rule: SplitRule, limited: bool) -> None:
    if limited and rule is not SplitRule.OPTIMAL:
        pytest.skip("only the optimal split is limited by memory; others are refused where they do not fit")
    found = ranks(RANKS, tokens_that_arrive, str(rule), limited)
    for case, (problem, layout) in enumerate(cases(limited)):
        plan = evaluate(replace(problem, split_rule=rule), layout)
        assert plan.split.rule is rule
        (planned,) = routes(problem, layout, plan.split)
        hosts = layout.hosts
        for replica, (device, slot) in enumerate(zip(hosts.device, hosts.slot, strict=True)):
            filled = np.flatnonzero(layout.slots[device] >= 0).tolist()
            assert found[device][case][filled.index(slot)] == planned[:, replica].tolist()


def test_memory_changes_what_ranks_send() -> None:
    ((limited, layout),) = cases(limited=True)
    free = evaluate(Problem(machines(limited=False), limited.demand), layout)
    assert (evaluate(limited, layout).split.quota != free.split.quota).any()


def differ() -> str:
    group = ExpertGroup.create()
    assert group is not None
    layer = FullyShardedExperts(SHAPE, EXPERTS, group)
    load_alike([layer])
    layer.split_rule = SplitRule.EVEN if group.rank == 1 else SplitRule.OPTIMAL
    with pytest.raises(LayoutMismatchError) as caught:
        layer(torch.ones(3, RANKS), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    return str(caught.value)


def test_ranks_that_divide_differently_are_told(ranks: Launch) -> None:
    assert all("ranks [1]" in told for told in ranks(2, differ))


def test_a_rule_that_ranks_cannot_afford_is_refused() -> None:
    with pytest.raises(ProblemError, match="split_rule = local: takes too long for ranks"):
        FullyShardedExperts(SHAPE, EXPERTS, ExpertGroup(), split_rule="local")
    with pytest.raises(ProblemError, match="must be one of even, lite, optimal, home"):
        FullyShardedExperts(SHAPE, EXPERTS, ExpertGroup(), split_rule="fair")


def test_divisions_by_other_costs_of_experts_differ_where_memory_is_limited() -> None:
    costs = [ExpertSpec(weight_bytes=100, activation_bytes=size) for size in (1, 20)]
    for limited in (False, True):
        told = {Division(machines(limited), cost, SplitRule.OPTIMAL).fingerprint for cost in costs}
        assert len(told) == 1 + limited
