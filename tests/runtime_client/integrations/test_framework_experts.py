"""Experts whose weights a framework owns: outputs and gradients are those of one process, whatever is lent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.support.fused_model import EXPERTS, HIDDEN, TOP_K, WIDTH, FusedExperts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.integrations.balancing import Balancer
from moeplan.runtime_client.integrations.framework_experts import FrameworkExperts, FrameworkShards
from moeplan.runtime_client.integrations.planned_replicas import PlannedReplicas
from moeplan.runtime_client.integrations.versions import UnsupportedVersionError, require_version
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights
from moeplan.solvers.problem.layout import Layout

Launch = Callable[..., list[Any]]
TOKENS, STEPS = 24, 3


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Most tokens choose experts 0 and 1."""
    rng = torch.Generator().manual_seed(step)
    scores = torch.rand(TOKENS, EXPERTS, generator=rng) + torch.tensor([1.0, 0.7, 0.2, 0.0])
    weight, index = scores.double().topk(TOP_K)
    return torch.randn(TOKENS, HIDDEN, generator=rng).double(), index, weight


def train(mode: str, planned: Layout | None, checkpointed: bool) -> tuple[tuple[float, float], int]:
    """Each rank trains its own experts as a framework would; the whole module beside it must stay the same."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = FusedExperts().double()
    own = [nn.Parameter(part.detach().chunk(size)[rank].clone()) for part in (whole.gate_up_proj, whole.down_proj)]
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in (own, list(whole.parameters()))]
    balancer = Balancer(mode, spare=1)
    layer = balancer.layer("layer 0", EXPERTS, dist.group.WORLD, ExpertShape(HIDDEN, WIDTH))
    assert isinstance(layer.experts, FrameworkExperts)
    if planned is not None:
        source = layer.experts.source
        assert isinstance(source, PlannedReplicas)
        source.plan_in_force = PlannedLayer(planned, source.plan_in_force.division)
        balancer._planner = "127.0.0.1:1"  # nobody is there

    def run(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        layer.observe(index, training=True)
        return layer.run(own, hidden, index, weight)

    for step in range(STEPS):
        hidden, index, weight = batch(step)
        hidden.requires_grad_()
        expected = whole(hidden, index, weight)
        expected.square().sum().backward()
        mine = [part.detach().chunk(size)[rank].clone().requires_grad_(part.requires_grad) for part in (hidden, weight)]
        arguments = (mine[0], index.chunk(size)[rank], mine[1])
        output = checkpoint(run, *arguments, use_reentrant=False) if checkpointed else run(*arguments)
        torch.testing.assert_close(output, expected.chunk(size)[rank], rtol=0, atol=1e-12)
        output.square().sum().backward()
        assert hidden.grad is not None
        torch.testing.assert_close(mine[0].grad, hidden.grad.chunk(size)[rank], rtol=0, atol=1e-12)
        for part, all_of_it in zip(own, whole.parameters(), strict=True):
            assert all_of_it.grad is not None
            torch.testing.assert_close(part.grad, all_of_it.grad.chunk(size)[rank], rtol=0, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert balancer.counts is not None
    assert balancer.counts.shape == (1, size, EXPERTS)
    assert balancer.counts.sum() == TOKENS * TOP_K
    balancer.abandon()
    return balancer.imbalance, balancer.steps


@pytest.mark.parametrize("checkpointed", [False, True])
def test_spilling_computes_what_one_process_does(ranks: Launch, checkpointed: bool) -> None:
    for (home, computed), steps in ranks(2, train, "spill", None, checkpointed, timeout_s=240):
        assert steps == STEPS - 1  # the last ends with the next pass
        assert home > 1.3
        assert computed == 1


def test_planned_replicas_compute_what_one_process_does(ranks: Launch) -> None:
    """Expert 0 is on both ranks, expert 2 away from home, and expert 3 at home alone."""
    layout = Layout(np.array([[0, 1, 2], [0, 3, -1]]), EXPERTS)
    for (home, computed), _ in ranks(2, train, "planned", layout, True):
        assert computed < home


def train_shards(mode: str, planned: Layout | None) -> tuple[float, float]:
    """Experts that a framework has initialised at home, spread over the ranks: one step is that of the whole module."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = FusedExperts().double()
    at_home = join_weights(whole.gate_up_proj, whole.down_proj).detach().chunk(size)[rank]
    balancer = Balancer(mode, spare=1)
    layer = balancer.layer("layer 0", EXPERTS, dist.group.WORLD, ExpertShape(HIDDEN, WIDTH), at_home)
    shards = layer.experts
    assert isinstance(shards, FrameworkShards)
    assert torch.equal(shards.homes_of(shards.shard), at_home)
    if planned is not None:
        shards.plan_in_force = PlannedLayer(planned, shards.plan_in_force.division)
    hidden, index, weight = batch(0)
    expected = whole(hidden, index, weight)
    expected.square().sum().backward()
    output = shards(hidden.chunk(size)[rank], index.chunk(size)[rank], weight.chunk(size)[rank])
    torch.testing.assert_close(output, expected.chunk(size)[rank], rtol=0, atol=1e-12)
    output.square().sum().backward()
    assert shards.shard.grad is not None
    gradients = [part.grad for part in (whole.gate_up_proj, whole.down_proj)]
    wanted = join_weights(*(gradient for gradient in gradients if gradient is not None)).chunk(size)[rank]
    torch.testing.assert_close(shards.homes_of(shards.shard.grad), wanted, rtol=0, atol=1e-12)
    balancer.abandon()
    home, computed = shards.loads
    return float(home.max() / home.mean()), float(computed.max() / computed.mean())


@pytest.mark.parametrize(
    ("mode", "planned"), [("spill", None), ("planned", Layout(np.array([[0, 1, 2], [0, 3, -1]]), EXPERTS))]
)
def test_shards_compute_what_one_process_does(ranks: Launch, mode: str, planned: Layout | None) -> None:
    for home, computed in ranks(2, train_shards, mode, planned):
        assert computed < home
        assert computed == 1 or mode == "planned"


def test_without_a_plan_experts_stay_at_home() -> None:
    planner = PlannedReplicas(EXPERTS, 2, 1)
    plan = planner.plan(np.arange(8).reshape(2, 4))
    assert plan.replicas == 0
    assert plan.load.tolist() == [10, 18]
    assert (plan.kept == np.arange(8).reshape(2, 4)).all()


def differ() -> None:
    balancer = Balancer("planned", spare=1)
    layer = balancer.layer("layer 0", EXPERTS, dist.group.WORLD, ExpertShape(HIDDEN, WIDTH))
    assert isinstance(layer.experts, FrameworkExperts)
    source = layer.experts.source
    assert isinstance(source, PlannedReplicas)
    if dist.get_rank():
        slots = np.array([[0, 1, 2], [2, 3, -1]])
        source.plan_in_force = PlannedLayer(Layout(slots, EXPERTS), source.plan_in_force.division)
    own = [torch.zeros(2, 2 * WIDTH, HIDDEN), torch.ones(2, HIDDEN, WIDTH) * dist.get_rank()]
    with pytest.raises(RuntimeError, match="layout of ranks"):
        layer.run(own, torch.zeros(1, HIDDEN), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    balancer.abandon()


def test_ranks_with_different_plans_are_told(ranks: Launch) -> None:
    ranks(2, differ)


def test_words_are_three() -> None:
    with pytest.raises(ValueError, match="mode = 'spills': must be one of record, spill, planned"):
        Balancer("spills")


def test_other_versions_are_refused_by_name() -> None:
    assert require_version("numpy", ["1.99", np.__version__.rpartition(".")[0]]) == np.__version__
    with pytest.raises(UnsupportedVersionError, match=r"numpy .* is installed; .* 0\.1\.x: pip install 'numpy==0\.1"):
        require_version("numpy", ["0.1"])
    with pytest.raises(UnsupportedVersionError, match="no-such-framework is not installed"):
        require_version("no-such-framework", ["0.1"])
