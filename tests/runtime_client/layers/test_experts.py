"""Fully sharded and resident experts against a dense model in one process, in double precision, over gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.expert_groups import load_alike, make_group
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.errors import LayoutMismatchError, RouterError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.lending import LoanBuffer
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.layers.spilling import MovableSpillPlanner
from moeplan.solvers import Cluster, ExpertSpec, LlepPlanner, QuotaPlanner, SpillOptions
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.split_rules import RANK_RULES

Launch = Callable[..., list[Any]]
Layer = FullyShardedExperts | ResidentExperts
TOLERANCE = 1e-12
CLUSTER = Cluster.uniform(3, 1)


def random_layout(rng: np.random.Generator, experts: int, devices: int) -> Layout:
    """Any number of replicas, empty slots in any place; with several devices, often one of them empty."""
    placed = rng.random((devices, experts)) < rng.choice([0.0, 0.3, 0.9])
    usable = devices - int(devices > 1 and rng.random() < 0.3)
    placed[usable:] = False
    placed[rng.integers(usable, size=experts), np.arange(experts)] = True
    width = int(placed.sum(axis=1).max()) + int(rng.integers(2))
    slots = np.full((devices, width), -1, np.int32)
    for device in range(devices):
        held = rng.permutation(np.flatnonzero(placed[device]))
        slots[device, rng.permutation(width)[: len(held)]] = held
    return Layout(slots, experts)


def dense(shape: ExpertShape, flat: Tensor, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The layer in one process, expert by expert, written apart from the code under test."""
    out = torch.zeros_like(hidden)
    cut = shape.inner_rows * shape.hidden
    for expert, row in enumerate(flat):
        inner = row[:cut].view(shape.inner_rows, shape.hidden)
        outer = row[cut:].view(shape.hidden, shape.width)
        token, choice = torch.where(index == expert)
        projected = hidden[token] @ inner.T
        if shape.gated:
            activated = torch.nn.functional.silu(projected[:, : shape.width]) * projected[:, shape.width :]
        else:
            activated = torch.relu(projected)
        out = out.index_add(0, token, activated @ outer.T * weight[token, choice, None])
    return out


@dataclass
class Batch:
    """Tokens of all ranks, cut into those of each."""

    sizes: list[int]
    hidden: Tensor
    index: Tensor
    weight: Tensor
    target: Tensor

    def part(self, rank: int) -> slice:
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))


def random_batch(rng: np.random.Generator, size: int, shape: ExpertShape, experts: int) -> Batch:
    choices = int(rng.integers(1, min(3, experts) + 1))
    sizes = [int(n) for n in rng.integers(0, 24, size) * (rng.random(size) < 0.8)]
    total = sum(sizes)
    popularity = rng.dirichlet(np.full(experts, rng.choice([0.1, 1.0])))
    scores = torch.from_numpy(np.log(popularity + 1e-9) + rng.gumbel(size=(total, experts)))
    return Batch(
        sizes,
        torch.from_numpy(rng.standard_normal((total, shape.hidden))),
        scores.topk(choices, dim=1).indices,
        torch.from_numpy(rng.random((total, choices))),
        torch.from_numpy(rng.standard_normal((total, shape.hidden))),
    )


def close(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max() if expected.numel() else 0.0) <= TOLERANCE * scale


def random_cases(seed: int, size: int, cases: int) -> Iterator[tuple[np.random.Generator, ExpertShape, int]]:
    for case in range(cases):
        rng = np.random.default_rng([seed, size, case])
        gated = bool(rng.random() < 0.5)
        shape = ExpertShape(int(rng.integers(3, 9)), int(rng.integers(2, 7)), gated, "silu" if gated else "relu")
        yield rng, shape, int(rng.integers(1, 8))


def random_planner(rng: np.random.Generator, options: SpillOptions) -> MovableSpillPlanner:
    if rng.random() < 0.5:
        return QuotaPlanner(options, options.devices)
    return LlepPlanner(options, options.devices, min_tokens=1, threshold=1.0)


def make_sharded(
    rng: np.random.Generator, shape: ExpertShape, experts: int, group: ExpertGroup, lends: bool
) -> Sequence[Layer]:
    rule = sorted(RANK_RULES)[int(rng.integers(len(RANK_RULES)))]
    nodes = int(rng.integers(1, group.size + 1))
    cluster = Cluster.uniform(group.size, 1, nodes=nodes, speed=rng.uniform(0.5, 2, group.size))
    options = SpillOptions.uniform(experts, group.size, int(rng.integers(1, 4)), speed=cluster.speed)
    planner = random_planner(rng, options) if lends else None
    reshard = bool(rng.random() < 0.5)
    layers = [
        FullyShardedExperts(
            shape,
            experts,
            group,
            split_rule=rule,
            planner=planner,
            cluster=cluster,
            reshard=reshard,
            dtype=torch.float64,
        )
        for _ in range(2)
    ]
    if rng.random() < 0.7:
        chain(layers)
    return layers


def make_resident(rng: np.random.Generator, shape: ExpertShape, experts: int, group: ExpertGroup) -> Sequence[Layer]:
    """Homes anywhere, so that ranks may own nothing, and planners of both kinds."""
    home = rng.integers(group.size, size=experts)
    options = SpillOptions.uniform(experts, group.size, int(rng.integers(4)), home=home)
    planner = random_planner(rng, options)
    buffer = LoanBuffer()
    return [
        ResidentExperts(shape, experts, group, planner=planner, buffer=buffer, dtype=torch.float64) for _ in range(2)
    ]


def train_and_compare(kind: str, cases: int) -> int:
    """Random pairs of layers through three optimizer steps; the demand changes at each, and so do layouts.

    Returns:
        The bytes that this rank lent or gathered, so that the caller can see that weights did travel.
    """
    group = make_group()
    travelled = 0
    for rng, shape, experts in random_cases(1, group.size, cases):
        layers: Sequence[Layer]
        if kind.startswith("sharded"):
            layers = make_sharded(rng, shape, experts, group, lends=kind == "sharded and lent")
        else:
            layers = make_resident(rng, shape, experts, group)
        reference = torch.from_numpy(rng.standard_normal((2, experts, shape.elements))).requires_grad_()
        for nth, layer in enumerate(layers):
            layer.load_experts(0, reference[nth].detach())
        ours = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=0.01)
        theirs = torch.optim.AdamW([reference], lr=0.01)
        for _ in range(3):
            batch = random_batch(rng, group.size, shape, experts)
            for layer in layers:
                if isinstance(layer, FullyShardedExperts):
                    layer.layout = random_layout(rng, experts, group.size)
            mine = batch.part(group.rank)
            hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
            first = dense(shape, reference[0], hidden, batch.index, weight)
            expected = dense(shape, reference[1], first + hidden, batch.index, weight)
            theirs.zero_grad()
            (expected * batch.target).sum().backward()

            my_hidden, my_weight = (x[mine].clone().requires_grad_() for x in (batch.hidden, batch.weight))
            ours.zero_grad()
            middle = layers[0](my_hidden, batch.index[mine], my_weight) + my_hidden
            actual = layers[1](middle, batch.index[mine], my_weight)
            (actual * batch.target[mine]).sum().backward()

            close(actual, expected[mine])
            close(gradient_of(my_hidden), gradient_of(hidden)[mine])
            close(gradient_of(my_weight), gradient_of(weight)[mine])
            for nth, layer in enumerate(layers):
                compare_weights(layer, gradient_of(next(layer.parameters())), gradient_of(reference)[nth])
            ours.step()
            theirs.step()
            for nth, layer in enumerate(layers):
                compare_weights(layer, next(layer.parameters()), reference[nth])
        travelled += sum(layer.traffic["weights.forward"] for layer in layers)
    return travelled


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def compare_weights(layer: Layer, own: Tensor, flat: Tensor) -> None:
    """This rank's part of the weights, or of their gradients, against the whole."""
    if isinstance(layer, ResidentExperts):
        close(own, flat[layer.homes.owned])
        return
    width, size = layer.shard.shape[1], layer.group.size
    padded = torch.nn.functional.pad(flat, (0, width * size - flat.shape[1]))
    close(own, padded[:, layer.group.rank * width : (layer.group.rank + 1) * width])


@pytest.mark.parametrize("kind", ["sharded", "sharded and lent", "resident"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_outputs_gradients_and_steps_equal_a_dense_model(ranks: Launch, size: int, kind: str) -> None:
    travelled = ranks(size, train_and_compare, kind, 12)
    assert (sum(travelled) > 0) == (size > 1)


def count_traffic() -> list[dict[str, int]]:
    group = make_group()
    shape, experts = ExpertShape(8, 4), 6
    seen = []
    for reshard in (False, True):
        layer = FullyShardedExperts(shape, experts, group, reshard=reshard, dtype=torch.float64)
        load_alike([layer])
        layer.layout = Layout(np.array([[(2 * d + c) % experts for c in range(3)] for d in range(group.size)]), experts)
        batch = random_batch(np.random.default_rng(0), group.size, shape, experts)
        mine = batch.part(group.rank)
        layer(batch.hidden[mine].requires_grad_(), batch.index[mine], batch.weight[mine]).sum().backward()
        seen.append(dict(layer.traffic))
    return seen


def test_traffic_is_slots_times_expert_bytes(ranks: Launch) -> None:
    size = 4
    expert_bytes = 8 * ExpertShape(8, 4).elements
    one_pass = 3 * expert_bytes * (size - 1) // size
    for resident, resharded in ranks(size, count_traffic):
        assert resident["weights.forward"] == resident["gradients"] == one_pass
        assert "weights.backward" not in resident
        assert resharded["weights.forward"] == resharded["weights.backward"] == resharded["gradients"] == one_pass


def recompute(kind: str, use_reentrant: bool, together: bool) -> dict[str, int]:
    """Two layers under activation checkpointing, each for itself or both together, give the plain pass's gradients."""
    group = make_group()
    rng = np.random.default_rng(3)
    shape, experts = ExpertShape(6, 4), 5
    layers: Sequence[Layer]
    planner = QuotaPlanner(SpillOptions.uniform(experts, group.size, 2), group.size)
    if kind.startswith("sharded"):
        lender = planner if kind == "sharded and lent" else None
        sharded = [FullyShardedExperts(shape, experts, group, planner=lender, dtype=torch.float64) for _ in range(2)]
        chain(sharded)
        for first in sharded:
            first.layout = random_layout(rng, experts, group.size)
        layers = sharded
    else:
        buffer = LoanBuffer()
        layers = [
            ResidentExperts(shape, experts, group, planner=planner, buffer=buffer, dtype=torch.float64)
            for _ in range(2)
        ]
    for layer in layers:
        layer.load_experts(0, torch.from_numpy(rng.standard_normal((experts, shape.elements))))
    batch = random_batch(rng, group.size, shape, experts)
    mine = batch.part(group.rank)

    def one(layer: nn.Module, hidden: Tensor) -> Tensor:
        return hidden + layer(hidden, batch.index[mine], batch.weight[mine])

    def both(hidden: Tensor) -> Tensor:
        return one(layers[1], one(layers[0], hidden))

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        hidden = batch.hidden[mine].clone().requires_grad_()
        for layer in layers:
            layer.zero_grad()
            layer.traffic.clear()
        (forward(hidden) * batch.target[mine]).sum().backward()
        return [gradient_of(hidden), *(gradient_of(p).clone() for layer in layers for p in layer.parameters())]

    def checkpointed(hidden: Tensor) -> Tensor:
        if together:
            return checkpoint(both, hidden, use_reentrant=use_reentrant)
        for layer in layers:
            hidden = checkpoint(one, layer, hidden, use_reentrant=use_reentrant)
        return hidden

    plain = gradients(both)
    for actual, expected in zip(gradients(checkpointed), plain, strict=True):
        close(actual, expected)
    return dict(layers[0].traffic)


@pytest.mark.parametrize("kind", ["sharded", "sharded and lent"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_keeps_gradients_and_adds_one_gather(
    ranks: Launch, use_reentrant: bool, together: bool, kind: str
) -> None:
    traffic = ranks(3, recompute, kind, use_reentrant, together)
    assert sum(rank["weights.forward"] for rank in traffic) == 2 * sum(rank["gradients"] for rank in traffic)
    assert all("weights.backward" not in rank for rank in traffic)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_keeps_gradients_of_spilled_experts(
    ranks: Launch, use_reentrant: bool, together: bool
) -> None:
    traffic = ranks(3, recompute, "resident", use_reentrant, together)
    assert sum(rank["gradients"] for rank in traffic) > 0


def interleave() -> None:
    """Two micro-batches in flight with different layouts: each backward uses the layout of its own forward."""
    group = make_group()
    rng = np.random.default_rng(4)
    shape, experts = ExpertShape(6, 4), 5
    layer = FullyShardedExperts(shape, experts, group, dtype=torch.float64)
    flat = torch.from_numpy(rng.standard_normal((experts, shape.elements))).requires_grad_()
    layer.load_experts(0, flat.detach())
    losses = []
    for _ in range(2):
        batch = random_batch(rng, group.size, shape, experts)
        mine = batch.part(group.rank)
        (dense(shape, flat, batch.hidden, batch.index, batch.weight) * batch.target).sum().backward()
        layer.layout = random_layout(rng, experts, group.size)
        out = layer(batch.hidden[mine].requires_grad_(), batch.index[mine], batch.weight[mine])
        losses.append((out * batch.target[mine]).sum())
    layer.layout = random_layout(rng, experts, group.size)
    for loss in losses:
        loss.backward()
    compare_weights(layer, gradient_of(layer.shard), gradient_of(flat))


def test_a_layout_is_frozen_from_forward_to_backward(ranks: Launch) -> None:
    ranks(3, interleave)


def recompute_after_changes(kind: str, use_reentrant: bool, alone: bool, same: bool) -> str:
    """Two passes under activation checkpointing, with changes of what the layer plans by before their backwards.

    Returns:
        What was told where both have the `same` tokens, and empty otherwise.
    """
    group = make_group()
    rng = np.random.default_rng(11)
    shape, experts = ExpertShape(6, 4), 5
    options = SpillOptions.uniform(experts, group.size, 2)
    planners = [LlepPlanner(options, group.size, min_tokens=least, threshold=1.0) for least in (1, 4, 64)]
    layer: Layer
    if kind == "resident":
        layer = ResidentExperts(shape, experts, group, planner=planners[0], dtype=torch.float64)
    else:
        lender = planners[0] if kind == "sharded and lent" else None
        layer = FullyShardedExperts(shape, experts, group, planner=lender, dtype=torch.float64)
    flat = torch.from_numpy(rng.standard_normal((experts, shape.elements))).requires_grad_()
    layer.load_experts(0, flat.detach())

    def change(nth: int) -> None:
        if layer.planner is not None:
            layer.planner = planners[nth]
        if isinstance(layer, FullyShardedExperts):
            rule = sorted(RANK_RULES)[nth]
            layer.plan = PlannedLayer(random_layout(rng, experts, group.size), Division(CLUSTER, ExpertSpec(), rule))

    def block(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        output = layer(hidden, index, weight)
        return output if alone else (hidden + output).sin()  # whose backward comes before that of the layer

    batches = [random_batch(rng, group.size, shape, experts) for _ in range(2 - same)]
    losses = []
    for nth, batch in enumerate(batches * (1 + same)):
        change(nth)
        mine, hidden = batch.part(group.rank), batch.hidden.clone().requires_grad_()
        out = dense(shape, flat, hidden, batch.index, batch.weight)
        ((out if alone else (hidden + out).sin()) * batch.target).sum().backward()
        own = batch.hidden[mine].clone().requires_grad_()
        out = checkpoint(block, own, batch.index[mine], batch.weight[mine], use_reentrant=use_reentrant)
        losses.append(((out * batch.target[mine]).sum(), own, gradient_of(hidden)[mine]))
    change(2)
    for loss, own, expected in losses[::-1]:
        if same:
            with pytest.raises(RuntimeError) as told:
                loss.backward()
            return str(told.value)
        loss.backward(retain_graph=True)
        change(0)
        loss.backward()
        close(gradient_of(own), 2 * expected)
    compare_weights(layer, gradient_of(layer.weights), 2 * gradient_of(flat))
    return ""


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["sharded", "sharded and lent", "resident"])
def test_a_recomputation_is_planned_as_its_forward_was(
    ranks: Launch, kind: str, use_reentrant: bool, alone: bool
) -> None:
    ranks(3, recompute_after_changes, kind, use_reentrant, alone, False)


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_recomputations_that_cannot_be_told_apart_are_refused_on_all_ranks(ranks: Launch, kind: str) -> None:
    told = ranks(3, recompute_after_changes, kind, False, False, True)
    assert told[0] == told[1] == told[2]
    assert "Set layouts and planners between steps" in told[0]


def draw_again(kind: str, use_reentrant: bool, preserve: bool) -> str:
    """A router with noise under activation checkpointing; what the backward told, if anything."""
    group = make_group()
    shape, experts = ExpertShape(6, 4), 5
    planner = QuotaPlanner(SpillOptions.uniform(experts, group.size, 2), group.size)
    layer: Layer
    if kind == "resident":
        layer = ResidentExperts(shape, experts, group, planner=planner, dtype=torch.float64)
    else:
        layer = FullyShardedExperts(shape, experts, group, dtype=torch.float64)
    layer.load_experts(0, torch.randn(experts, shape.elements, dtype=torch.float64))
    torch.manual_seed(group.rank)

    def block(hidden: Tensor) -> Tensor:
        weight, index = torch.randn(len(hidden), experts, dtype=torch.float64).softmax(dim=1).topk(2)
        output: Tensor = layer(hidden, index, weight)
        return output

    hidden = torch.randn(20, shape.hidden, dtype=torch.float64, requires_grad=True)
    output = checkpoint(block, hidden, use_reentrant=use_reentrant, preserve_rng_state=preserve)
    try:
        output.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_a_recomputation_with_other_tokens_is_refused_on_all_ranks(ranks: Launch, kind: str) -> None:
    for told in ranks(2, draw_again, kind, False, False):
        assert "leave preserve_rng_state=True" in told
    assert ranks(2, draw_again, kind, False, True) == ["", ""]
    assert ranks(2, draw_again, kind, True, False) == ["", ""]  # all of it is run again, and the first run forgotten


def stale_prefetch() -> None:
    """A gather started before the optimizer step or the layout change is not used after it."""
    group = make_group()
    rng = np.random.default_rng(5)
    shape, experts = ExpertShape(4, 3), 4
    layer = FullyShardedExperts(shape, experts, group, dtype=torch.float64)
    batch = random_batch(rng, group.size, shape, experts)
    mine = batch.part(group.rank)
    for change in ("weights", "layout"):
        layer.prefetch()
        flat = torch.from_numpy(rng.standard_normal((experts, shape.elements)))
        if change == "weights":
            layer.load_experts(0, flat)
        else:
            layer.load_experts(0, flat)
            layer.prefetch()
            layer.layout = random_layout(rng, experts, group.size)
        with torch.no_grad():
            actual = layer(batch.hidden[mine], batch.index[mine], batch.weight[mine])
        close(actual, dense(shape, flat, batch.hidden, batch.index, batch.weight)[mine])


def test_a_stale_prefetch_is_discarded(ranks: Launch) -> None:
    ranks(2, stale_prefetch)


def bad_router(fault: str) -> list[str]:
    """One rank's router breaks; returns what this rank was told, then shows that the group still works."""
    group = make_group()
    layer = FullyShardedExperts(ExpertShape(4, 3), 4, group)
    load_alike([layer])
    hidden, index, weight = torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    if group.rank == 1:
        if fault == "nan":
            weight[0] = float("nan")
        elif fault == "range":
            index[2] = 4
        else:
            layer.layout = Layout(np.array([[0, 1], [3, 2], [-1, -1]]), 4)
    told = []
    try:
        layer(hidden, index, weight)
    except (RouterError, LayoutMismatchError) as error:
        told.append(str(error))
    layer.layout = Layout.contiguous(4, np.array([2, 2, 2]))
    layer(hidden, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    return told


@pytest.mark.parametrize(
    ("fault", "words"),
    [("nan", "rank 1: 0 choices outside 0..3 and 1 weights"), ("range", "rank 1: 1 choices"), ("layout", r"ranks [1]")],
)
def test_a_fault_of_one_rank_is_reported_on_all_and_does_not_hang(ranks: Launch, fault: str, words: str) -> None:
    for told in ranks(3, bad_router, fault):
        assert len(told) == 1
        assert words in told[0]


def test_refuses_a_layout_that_does_not_fit() -> None:
    layer = FullyShardedExperts(ExpertShape(4, 3), 4, ExpertGroup())
    with pytest.raises(ValueError, match="the group has 1 ranks"):
        layer.layout = Layout.contiguous(4, np.array([2, 2]))
    with pytest.raises(ValueError, match="the layer has 4"):
        layer.layout = Layout.contiguous(5, np.array([5]))
    with pytest.raises(ValueError, match="twice"):
        layer.layout = Layout(np.array([[0, 1, 2, 3, 0]]), 4)


def lend(hot: bool) -> tuple[int, int]:
    """Bytes lent by this rank, and tokens that came to it, with all tokens on one expert or evenly spread."""
    group = make_group()
    planner = QuotaPlanner(SpillOptions.uniform(4, group.size, 1), group.size)
    layer = ResidentExperts(ExpertShape(4, 3), 4, group, planner=planner)
    with torch.no_grad():
        index = torch.zeros(8, 1, dtype=torch.int64) if hot else torch.arange(8)[:, None] % 4
        layer(torch.ones(8, 4), index, torch.ones(8, 1))
    return layer.traffic["weights.forward"], layer.traffic["tokens.forward"]


def test_weights_are_lent_only_where_it_pays(ranks: Launch) -> None:
    expert_bytes = 4 * ExpertShape(4, 3).elements
    assert [weights for weights, _ in ranks(2, lend, False)] == [0, 0]
    # The owner of expert 0 lends it, so that the other rank computes its own tokens, and none travel.
    assert ranks(2, lend, True) == [(expert_bytes, 0), (0, 0)]


def plan_differently(kind: str, what: str) -> str:
    group = make_group()
    other = group.rank == 1
    options = SpillOptions.uniform(4, group.size, 1 + int(other and what == "spare"))
    planner: MovableSpillPlanner = QuotaPlanner(options, group.size, quick=other and what == "search")
    if what == "threshold" or (other and what == "kind"):
        planner = LlepPlanner(options, group.size, threshold=1.0 + int(other))
    layer: Layer
    if kind == "sharded":
        layer = FullyShardedExperts(ExpertShape(4, 3), 4, group, planner=planner)
    else:
        layer = ResidentExperts(ExpertShape(4, 3), 4, group, planner=planner)
    load_alike([layer])
    with pytest.raises(LayoutMismatchError) as caught:
        layer(torch.ones(8, 4), torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1))
    return str(caught.value)


@pytest.mark.parametrize("what", ["spare", "search", "threshold", "kind"])
@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_ranks_whose_planners_differ_do_not_compute(ranks: Launch, kind: str, what: str) -> None:
    told = ranks(2, plan_differently, kind, what)
    assert told[0] == told[1]
    assert "the planner that lends there" in told[0]


def exceed_token_cap() -> str:
    group = make_group()
    planner = QuotaPlanner(SpillOptions.uniform(2, group.size, 1, token_cap=5), group.size)
    layer = ResidentExperts(ExpertShape(4, 3), 2, group, planner=planner)
    load_alike([layer])
    with pytest.raises(InfeasibleError) as caught:
        layer(torch.ones(8, 4), torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1))
    return str(caught.value)


def test_a_token_cap_that_no_plan_keeps_is_reported_on_every_rank(ranks: Launch) -> None:
    told = ranks(2, exceed_token_cap)
    assert told[0] == told[1]
    assert "exceeds the cap by" in told[0]


def test_no_gradient_as_large_as_the_shard_is_written_beside_its_own() -> None:
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32 and out.shape == layer.shard.shape:
                made.extend([str(func)] if out.untyped_storage().nbytes() >= 4 * out.numel() else [])
            return out

    layer = FullyShardedExperts(ExpertShape(8, 16), 4, ExpertGroup(), compute_dtype=torch.bfloat16)
    layer.load_experts(0, torch.randn(4, layer.shape.elements))
    output = layer(torch.randn(5, 8), torch.randint(4, (5, 2)), torch.rand(5, 2))
    with Watch():  # type: ignore[no-untyped-call]
        output.sum().backward()
    assert [name for name in made if "detach" not in name] == ["aten._to_copy.default"]
