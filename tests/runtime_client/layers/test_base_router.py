"""The BASE router on real ranks: equal counts, the largest sum, and no fault of one rank that the others wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.expert_groups import make_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.errors import RouterError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.base_router import BaseRouter
from moeplan.solvers.routing.balanced_assignment import optimal_assignment

Launch = Callable[..., list[Any]]
HIDDEN = 6


def make_router(experts: int, group: ExpertGroup, **options: Any) -> BaseRouter:
    torch.manual_seed(0)
    return BaseRouter(HIDDEN, experts, group, dtype=torch.float64, **options)


def sequences(tokens: int, rank: int) -> Tensor:
    """Tokens that resemble each other, as those of one text do."""
    random = torch.Generator().manual_seed(rank)
    topic = torch.randn(HIDDEN, generator=random, dtype=torch.float64)
    return topic + 0.5 * torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64)


def route(experts: int, tokens: list[int]) -> tuple[list[int], list[int], float]:
    """Experts chosen for this rank's tokens in training and in evaluation, and the sum of affinities in training."""
    group = make_group()
    router = make_router(experts, group)
    hidden = sequences(tokens[group.rank], group.rank)
    index, weight = router(hidden)
    affinity = hidden @ router.centroids.detach().T
    chosen = affinity.gather(1, index)
    assert torch.equal(weight, torch.sigmoid(chosen))
    greedy, _ = router.eval()(hidden)
    assert torch.equal(greedy[:, 0], affinity.argmax(dim=1))
    return index[:, 0].tolist(), greedy[:, 0].tolist(), float(chosen.sum())


@pytest.mark.parametrize(
    ("experts", "tokens"),
    [(4, [37]), (8, [3]), (1, [5]), (4, [0]), (4, [40, 40]), (3, [0, 50, 7]), (5, [1, 0, 2]), (7, [30, 31, 32, 33])],
)
def test_counts_are_equal_in_training(ranks: Launch, experts: int, tokens: list[int]) -> None:
    answers = ranks(len(tokens), route, experts, tokens)
    counts = np.bincount([expert for index, _, _ in answers for expert in index], minlength=experts)
    assert counts.sum() == sum(tokens)
    assert counts.max() - counts.min() <= len(tokens)


def test_the_sum_of_affinities_is_near_the_optimum_of_all_ranks(ranks: Launch) -> None:
    tokens = [80, 60, 100]
    answers = ranks(3, route, 4, tokens)
    affinity = (
        torch.cat([sequences(n, rank) for rank, n in enumerate(tokens)])
        @ make_router(4, ExpertGroup()).centroids.detach().T
    )
    optimum = optimal_assignment(affinity.numpy()).value
    even = float(affinity.sum()) / 4  # what an assignment that ignores affinities gets
    assert sum(value for _, _, value in answers) > even + 0.8 * (optimum - even)


def test_one_rank_finds_the_optimum() -> None:
    hidden = sequences(50, 1)
    for exact in (False, True):
        router = make_router(4, ExpertGroup(), **({"assign": optimal_assignment} if exact else {}))
        affinity = hidden @ router.centroids.detach().T
        value = float(affinity.gather(1, router(hidden)[0]).sum())
        optimum = optimal_assignment(affinity.numpy()).value
        spread = float(affinity.max() - affinity.min())
        assert value <= optimum + 1e-9
        assert value >= optimum - (1e-9 if exact else 1e-3 * spread * 54)


def break_one() -> str:
    group = make_group()
    router = make_router(4, group)
    hidden = sequences(9, group.rank)
    if group.rank == 1:
        hidden[2, 3] = float("nan")
    with pytest.raises(RouterError) as caught:
        router(hidden)
    router(sequences(9, group.rank))
    return str(caught.value)


def test_affinities_that_are_not_finite_are_reported_on_all_ranks(ranks: Launch) -> None:
    for told in ranks(3, break_one):
        assert "rank 1: 4 are not finite" in told


def recompute(use_reentrant: bool) -> None:
    group = make_group()
    router = make_router(4, group)

    def layer(hidden: Tensor) -> Tensor:
        index, weight = router(hidden)
        return weight * hidden * (1 + index)

    gradients = []
    for checkpointed in (False, True):
        hidden = sequences(30, group.rank).requires_grad_()
        torch.manual_seed(group.rank)
        router.zero_grad()
        output = checkpoint(layer, hidden, use_reentrant=use_reentrant) if checkpointed else layer(hidden)
        torch.randperm(5)  # whatever draws random numbers in between
        output.sum().backward()
        assert router.centroids.grad is not None
        gradients.append((hidden.grad, router.centroids.grad.clone()))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_assignment(ranks: Launch, use_reentrant: bool) -> None:
    ranks(2, recompute, use_reentrant)
