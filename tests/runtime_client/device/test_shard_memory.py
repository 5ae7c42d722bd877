"""Sharded experts gathered from shared memory on CPUs, against the same layers on gloo: real processes and signals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.runtime_client.device.shared_memory import shared_memory
from tests.runtime_client.device.small_passes import CPU
from tests.support.expert_groups import load_alike, make_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.device.shard_memory import ShardMemory
from moeplan.runtime_client.errors import LayoutMismatchError, MissedPassError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.models.gradients import ExpertGradients
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.layout import Layout

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")

Launch = Callable[..., list[Any]]
Layers = list[FullyShardedExperts]
SHAPE, EXPERTS, CHOICES, TOKENS = ExpertShape(6, 5), 5, 2, 12  # 90 elements: parts of three ranks are padded


def make_layers(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
    reshard: bool = True,
    count: int = 3,
    slots: int = EXPERTS,
    limit: timedelta = timedelta(hours=1),
    timeout: timedelta = timedelta(seconds=30),
) -> tuple[Layers, Layers, ShardMemory]:
    """Layers on gloo, and through shared memory, with equal weights."""
    group = make_group(timeout=timeout)
    memory = ShardMemory(
        group, SHAPE.elements, EXPERTS, slots=slots, device=CPU, dtype=compute, time_limit=limit,
        memory=shared_memory(folder),
    )  # fmt: skip
    kinds = []
    for own in (None, memory):
        layers = [
            FullyShardedExperts(
                SHAPE, EXPERTS, group, reshard=reshard, memory=own, compute_dtype=compute, dtype=dtype
            )
            for _ in range(count)
        ]  # fmt: skip
        load_alike(layers)
        chain(layers)
        kinds.append(layers)
    return kinds[0], kinds[1], memory


def layouts(seed: int, count: int = 3) -> list[Layout]:
    """Any number of replicas in any slots, and empty ones between; one rank may have none."""
    rng, devices = np.random.default_rng(seed), dist.get_world_size()
    made = []
    for _ in range(count):
        placed = rng.random((devices, EXPERTS)) < rng.choice([0.0, 0.4, 0.9])
        placed[rng.integers(devices - int(rng.random() < 0.3), size=EXPERTS), np.arange(EXPERTS)] = True
        slots = np.full((devices, EXPERTS + 1), -1, np.int32)
        for device in range(devices):
            held = rng.permutation(np.flatnonzero(placed[device]))
            slots[device, rng.permutation(EXPERTS + 1)[: len(held)]] = held
        made.append(Layout(slots, EXPERTS))
    return made


def use(layers: Sequence[FullyShardedExperts], seed: int) -> None:
    for layer, layout in zip(layers, layouts(seed, len(layers)), strict=True):
        layer.layout = layout


def batch(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    tokens = (TOKENS, 0, 7)[(seed + dist.get_rank()) % 3]
    hidden, gradient = torch.randn(2, tokens, SHAPE.hidden, generator=random)
    index = torch.randint(EXPERTS, (tokens, CHOICES), generator=random)
    return [hidden, index, torch.rand(tokens, CHOICES, generator=random), gradient]


def forward(layers: Layers, hidden: Tensor, index: Tensor, weight: Tensor, *, recompute: bool = False) -> Tensor:
    for layer in layers:
        if recompute:
            hidden = hidden + checkpoint(layer, hidden, index, weight, use_reentrant=False)
        else:
            hidden = hidden + layer(hidden, index, weight)
    return hidden


def gradients(layers: Layers) -> list[Tensor]:
    """Of the shards, which are cleared."""
    found = [layer.shard.grad for layer in layers]
    for layer in layers:
        layer.shard.grad = None
    return [part for part in found if part is not None]


def answers(layers: Layers, parts: Sequence[Tensor], *, recompute: bool = False) -> list[Tensor]:
    hidden, index, weight, gradient = parts
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = forward(layers, hidden, index, weight, recompute=recompute)
    output.backward(gradient)
    found = [output.detach(), hidden.grad, weight.grad]
    return [part for part in found if part is not None] + gradients(layers)


def assert_same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def traffic(layers: Layers) -> list[dict[str, int]]:
    return [dict(layer.traffic) for layer in layers]


def trains(folder: Path, dtype: torch.dtype, compute: torch.dtype, reshard: bool) -> None:
    """Steps with other weights, layouts and tokens each; two micro-batches in every other one."""
    gloo, own, memory = make_layers(folder, dtype=dtype, compute=compute, reshard=reshard)
    if dtype.itemsize > 2:  # in 16 bits collectives round once before gradients are scaled
        for layers in (gloo, own):
            ExpertGradients(torch.nn.ModuleList(layers))
    optimizers = [torch.optim.SGD([layer.shard for layer in layers], lr=1e-3) for layers in (gloo, own)]
    for step in range(4):
        found = []
        for layers, optimizer in zip((gloo, own), optimizers, strict=True):
            use(layers, step)
            for seed in (10 * step, 10 * step + 1)[: 1 + step % 2]:
                hidden, index, weight, gradient = batch(seed)
                output = forward(layers, hidden.requires_grad_(), index, weight)
                output.backward(gradient)
                found += [output.detach(), *([] if hidden.grad is None else [hidden.grad])]
            found += [layer.shard.grad.clone() for layer in layers if layer.shard.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        half = len(found) // 2
        assert_same(found[:half], found[half:])
    assert traffic(gloo) == traffic(own)
    assert_same([layer.shard for layer in gloo], [layer.shard for layer in own])
    with torch.no_grad():
        parts = batch(5)[:3]
        assert_same([forward(gloo, *parts)], [forward(own, *parts)])
    memory.check()


@pytest.mark.parametrize(
    ("size", "dtype", "compute", "reshard"),
    [
        (2, torch.float32, torch.float32, True),
        (2, torch.float64, torch.float64, False),
        (3, torch.float32, torch.float16, True),  # Triton's interpreter does not round to bfloat16, but cuts off
        pytest.param(3, torch.float16, torch.float16, False, marks=pytest.mark.slow),
    ],
)
def test_training_equals_that_on_collectives_bit_for_bit(
    ranks: Launch, tmp_path: Path, size: int, dtype: torch.dtype, compute: torch.dtype, reshard: bool
) -> None:
    ranks(size, trains, tmp_path, dtype, compute, reshard, timeout_s=200)


def orders(folder: Path) -> None:
    gloo, own, memory = make_layers(folder)
    for layers in (gloo, own):
        use(layers, 1)
    plain = answers(gloo, batch(1))
    for recompute in (False, True):
        assert_same(plain, answers(own, batch(1), recompute=recompute))
    # Micro-batches in flight, each with layouts of its own, whose backward passes come in another order.
    found = []
    for layers in (gloo, own):
        outputs = []
        for seed in range(3):
            use(layers, seed)
            outputs.append(forward(layers, *batch(seed)[:3]))
        use(layers, 7)
        for seed in (1, 0, 2):
            outputs[seed].backward(batch(seed)[3])
        found.append(gradients(layers))
    assert_same(*found)
    # A gathering of weights or layouts that are not used, and a copy of a layer with weights of its own.
    found = []
    for layers in (gloo, own):
        layers[0].prefetch()
        layers[0].load_experts(1, torch.ones(1, SHAPE.elements))
        layers[0].prefetch()
        use(layers, 2)
        copy = deepcopy(layers[1])
        copy.load_experts(0, torch.ones(EXPERTS, SHAPE.elements))
        found.append(answers([layers[0], copy, *layers[1:]], batch(2)))
    assert_same(*found)
    memory.check()


def test_passes_may_overlap_be_recomputed_and_change_layouts(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, orders, tmp_path, timeout_s=200)


def lends(folder: Path, reshard: bool) -> int:
    """Replicas beyond the layouts, in memory behind them, in every pass; how many."""
    gloo, own, memory = make_layers(folder, reshard=reshard, slots=EXPERTS + 2, count=2)
    group = memory.group
    for layers in (gloo, own):
        for layer in layers:
            layer.layout = Layout.contiguous(EXPERTS, np.full(group.size, -(-EXPERTS // group.size), np.int32))
        layers[0].prefetch()  # nothing is lent yet, so it leaves no room, and does not show what may be lent
        for layer in layers:
            layer.planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 2), group.size)
    lent = 0
    for seed in range(2):
        hidden, index, weight, gradient = batch(seed)
        index = index**2 // EXPERTS if seed % 2 else torch.zeros_like(index)
        counts = group.gather_rows(torch.bincount(index.flatten(), minlength=EXPERTS)).numpy()
        lent += own[0].route(counts)[0].shape[1] - own[0].layout.slots.shape[1]
        parts = [hidden, index, weight, gradient]
        for recompute in (False, True):
            assert_same(answers(gloo, parts), answers(own, parts, recompute=recompute))
    memory.check()
    return lent


@pytest.mark.parametrize("reshard", [True, False])
def test_what_is_lent_beyond_layouts_arrives_behind_them(ranks: Launch, tmp_path: Path, reshard: bool) -> None:
    for lent in ranks(2, lends, tmp_path, reshard, timeout_s=200):
        assert lent > 0


def meets(folder: Path) -> list[int]:
    """Meetings for gatherings of forward and backward passes, once weights have changed as autograd does not see."""
    gloo, own, memory = make_layers(folder)
    told = []
    for change in range(3):
        found = []
        for layers in (gloo, own):
            layers[1].shard.data.fill_(change + dist.get_rank() / 8)
            told.append(memory.meetings)
            output = forward(layers, *batch(0)[:3])
            told.append(memory.meetings)
            output.backward(batch(0)[3])
            found.append([output.detach(), *gradients(layers)])
        assert_same(*found)
    return [after - before for before, after in itertools.pairwise(told)]


def test_ranks_meet_for_the_weights_of_each_forward_pass(ranks: Launch, tmp_path: Path) -> None:
    for told in ranks(2, meets, tmp_path):
        first, *others = [n for n in told if n]
        assert first == 3  # one for each layer
        assert others == [4, 4]  # and one, so that nobody reads the weights before


def shows(folder: Path) -> list[int]:
    """The experts that a rank shows for a layout, and once more than that may be gathered."""
    _, own, memory = make_layers(folder, count=1, slots=EXPERTS + 2)
    layer = own[0]
    layer.layout = Layout.contiguous(EXPERTS, np.array([3, 3], np.int32))
    layer._published = memory.open()
    found = []
    options = SpillOptions.uniform(EXPERTS, 2, 2)
    uneven = replace(options, spare=np.array([0, 2], np.int32))  # rank 0 is lent nothing, and lends
    for planner in (None, QuotaPlanner(options, 2), None, QuotaPlanner(uneven, 2)):
        layer._published.rows.fill_(-7.0)
        layer.planner = planner
        layer.prefetch()
        found += (layer._published.rows != -7.0).any(dim=1).nonzero().flatten().tolist()
    layer(*batch(0)[:3])
    return found


def test_ranks_are_shown_what_they_may_gather(ranks: Launch, tmp_path: Path) -> None:
    of_others = {0: [3, 4], 1: [0, 1, 2]}
    for rank, found in enumerate(ranks(2, shows, tmp_path)):
        assert found == 2 * [*of_others[rank], *range(EXPERTS)]


def changes(folder: Path, kind: str) -> bool:
    """What a pass reads may change before a reentrant checkpoint runs it again; on some ranks it was shown already.

    Returns:
        Whether ranks were shown experts anew.
    """
    gloo, own, memory = make_layers(folder, count=1, slots=EXPERTS + 2)
    first = Layout(np.array([[0, 1, 2], [3, 4, -1]], np.int32), EXPERTS)
    others = {"swapped": [[3, 4, -1], [0, 1, 2]], "grown": [[0, 1, 2], [2, 3, 4]]}
    lender = QuotaPlanner(SpillOptions.uniform(EXPERTS, 2, 2), 2)
    found, met = [], 0
    for layers in (gloo, own):
        layers[0].layout = first
        layers[0].planner = lender if kind == "lent no more" else None
        hidden, index, weight, gradient = batch(0)
        hidden.requires_grad_()
        output = checkpoint(layers[0], hidden, index, weight, use_reentrant=True)
        if kind in others:
            layers[0].layout = Layout(np.array(others[kind], np.int32), EXPERTS)
        elif kind == "loaded":
            layers[0].load_experts(0, torch.arange(EXPERTS * SHAPE.elements).view(EXPERTS, -1) / 500)
        else:
            layers[0].planner = lender if kind == "lent" else None
        met = memory.meetings
        output.backward(gradient)
        assert hidden.grad is not None
        found.append([output.detach(), hidden.grad, *gradients(layers)])
    assert_same(*found)
    return memory.meetings > met


@pytest.mark.parametrize("kind", ["swapped", "grown", "lent", "lent no more", "loaded"])
def test_a_reentrant_checkpoint_runs_by_the_layout_of_now(ranks: Launch, tmp_path: Path, kind: str) -> None:
    anew = kind != "lent no more"  # then all had been shown
    assert ranks(2, changes, tmp_path, kind, timeout_s=100) == [anew, anew]


def steps_within(folder: Path) -> None:
    """An optimizer steps within the backward pass, as hooks let it, and the next weights set out at once."""
    gloo, own, _ = make_layers(folder, count=1)
    found = []
    for layers in (gloo, own):
        layer = layers[0]

        def step(shard: Tensor, layer: FullyShardedExperts = layer) -> None:
            assert shard.grad is not None
            shard.data -= shard.grad
            layer.prefetch()

        hook = layer.shard.register_post_accumulate_grad_hook(step)
        forward(layers, *batch(0)[:3]).backward(batch(0)[3])
        hook.remove()
        layer.shard.grad = None
        found.append(answers(layers, batch(1)))
    assert_same(*found)


def test_weights_may_set_out_within_a_backward_pass(ranks: Launch, tmp_path: Path) -> None:
    ranks(2, steps_within, tmp_path)


def rewritten(folder: Path) -> str:
    """Frozen experts that are loaded between a forward pass and its backward, of which autograd says nothing."""
    _, own, _ = make_layers(folder, count=1)
    own[0].shard.requires_grad_(False)
    hidden, index, weight, gradient = batch(0)
    output = own[0](hidden.requires_grad_(), index, weight)
    load_alike(own)
    with pytest.raises(RuntimeError) as caught:
        output.backward(gradient)
    return str(caught.value)


def test_experts_that_change_before_a_backward_pass_are_refused(ranks: Launch, tmp_path: Path) -> None:
    for message in ranks(2, rewritten, tmp_path):
        assert "its experts have changed since the forward pass of this backward" in message


def missing(folder: Path) -> str:
    """Rank 1 comes to a pass too late."""
    _, own, memory = make_layers(folder, count=1, limit=timedelta(milliseconds=0.2))
    own[0]._published = memory.open()
    parts = batch(0)
    if dist.get_rank():
        dist.barrier()  # comes when the other has given up
    own[0].prefetch()
    if not dist.get_rank():
        dist.barrier()
    with pytest.raises(MissedPassError) as caught:
        own[0](*parts[:3])
    with pytest.raises(MissedPassError):
        memory.check()
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named_on_all(ranks: Launch, tmp_path: Path) -> None:
    for message in ranks(2, missing, tmp_path):
        assert "rank 1 has not come in time" in message


def spoilt(folder: Path) -> bool:
    """What a pass under way gives when a rank is missed in it."""
    _, own, memory = make_layers(folder, count=1)
    memory._abort.fill_(1)
    gradient = torch.ones(len(own[0]._placement.experts), memory.group.size * memory.width)
    published, placement = memory.open(), own[0]._placement
    flat, _ = memory.show_and_gather(published, placement, own[0].shard)
    flat.requires_grad_()
    totals: list[Tensor] = []

    def give_back(_: Tensor) -> None:
        rooms = None, memory.room_for(own[0].shard).zero_()
        totals.extend(memory.give_back([gradient], placement, own[0].shard, total=room)[0] for room in rooms)

    flat.register_hook(give_back)
    flat.sum().backward()
    return bool(flat[:, 0].isnan().all() and all(total.isnan().all() for total in totals) and len(totals) == 2)


def test_weights_and_gradients_are_no_numbers_once_a_rank_is_missed(ranks: Launch, tmp_path: Path) -> None:
    assert all(ranks(2, spoilt, tmp_path))


def differs(folder: Path) -> str:
    _, own, _ = make_layers(folder, count=1, limit=timedelta(milliseconds=0.5), timeout=timedelta(seconds=8))
    own[0].prefetch()
    if dist.get_rank():
        own[0].load_experts(0, torch.zeros(1, SHAPE.elements))  # so that it gathers again
        own[0].prefetch()
    with pytest.raises((LayoutMismatchError, MissedPassError)) as caught:
        own[0](*batch(0)[:3])
    return type(caught.value).__name__


def test_weights_that_change_on_one_rank_alone_are_an_error_on_all(ranks: Launch, tmp_path: Path) -> None:
    assert len(set(ranks(2, differs, tmp_path))) == 1


def refusals(folder: Path) -> list[str]:
    group = make_group()
    make: dict[str, Any] = {"slots": 3, "device": CPU, "memory": shared_memory(folder)}
    memory = ShardMemory(group, SHAPE.elements, EXPERTS, **make)
    layer = FullyShardedExperts(SHAPE, EXPERTS, group, memory=memory)
    load_alike([layer])

    def wide() -> None:
        layer.layout = Layout.contiguous(EXPERTS, np.array([4, 1], np.int32))

    def lent() -> None:
        layer.planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 1), group.size)

    said = []
    for act in (
        lambda: ShardMemory(group, SHAPE.elements, EXPERTS, **make | {"slots": 0}),
        lambda: FullyShardedExperts(SHAPE, EXPERTS + 1, group, memory=memory),
        lambda: FullyShardedExperts(ExpertShape(6, 6), EXPERTS, group, memory=memory),
        wide,
        lent,
        lambda: layer(*batch(0)[:3]),
    ):
        with pytest.raises(ValueError) as caught:
            act()
        said.append(str(caught.value))
    return said


def test_what_does_not_fit_the_memory_is_refused_by_name(ranks: Launch, tmp_path: Path) -> None:
    said, _ = ranks(2, refusals, tmp_path)
    expected = ("slots = 0", "experts = 6", "elements = 108", "4 slots on a rank", "slots=4", "dtype = torch.float32")
    for message, words in zip(said, expected, strict=True):
        assert words in message
    with pytest.raises(ValueError, match="group of one rank"):
        ShardMemory(ExpertGroup(), SHAPE.elements, EXPERTS, slots=3, device=CPU)
