"""What both kinds of layers follow or refuse when something around them changes: devices, copies, wrappers, ranks."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.expert_groups import make_group
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from moeplan.runtime_client.errors import LayoutMismatchError, MissedPassError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape, split_weights
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.layout import Layout

Launch = Callable[..., list[Any]]
Layer = FullyShardedExperts | ResidentExperts
KINDS = ["sharded", "resident"]
SHAPE, EXPERTS = ExpertShape(6, 5), 4


def make_layer(kind: str, group: ExpertGroup, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Layer:
    """With replicas, so that weights travel and gradients are added up."""
    if kind == "sharded":
        slots = np.array([[(d + c) % EXPERTS for c in range(EXPERTS - 1)] for d in range(group.size)])
        layout = Layout(slots, EXPERTS) if group.size > 1 else None
        return FullyShardedExperts(SHAPE, EXPERTS, group, layout=layout, dtype=dtype, device=device)
    planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 2), group.size)
    return ResidentExperts(SHAPE, EXPERTS, group, planner=planner, dtype=dtype, device=device)


def make_flat(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(EXPERTS, SHAPE.elements, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a rank, most of which choose the first expert."""
    rng = torch.Generator().manual_seed(10 * seed + rank)
    hidden = torch.randn(7 + rank, SHAPE.hidden, generator=rng, dtype=torch.float64)
    scores = torch.randn(7 + rank, EXPERTS, generator=rng, dtype=torch.float64)
    scores[:, 0] += 2
    weight, index = scores.softmax(dim=1).topk(2)
    return hidden, index, weight


def dense(flat: Tensor, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The layer in one process, expert by expert, written apart from the code under test."""
    out = torch.zeros_like(hidden)
    for expert, row in enumerate(flat):
        inner = row[: SHAPE.inner_rows * SHAPE.hidden].view(-1, SHAPE.hidden)
        outer = row[SHAPE.inner_rows * SHAPE.hidden :].view(SHAPE.hidden, SHAPE.width)
        token, choice = torch.where(index == expert)
        gate, up = (hidden[token] @ inner.T).chunk(2, dim=1)
        out = out.index_add(0, token, (functional.silu(gate) * up) @ outer.T * weight[token, choice, None])
    return out


def own_part(layer: Layer, flat: Tensor) -> Tensor:
    """What this rank holds of whole experts."""
    if isinstance(layer, ResidentExperts):
        return flat[layer.homes.owned]
    width, size = layer.shard.shape[1], layer.group.size
    padded = functional.pad(flat, (0, width * size - flat.shape[1]))
    return padded[:, layer.group.rank * width : (layer.group.rank + 1) * width]


def check_exact(layer: Layer, flat: Tensor) -> None:
    """One pass with its gradients against the dense layer."""
    layer.zero_grad()
    flat = flat.clone().requires_grad_()
    for rank in range(layer.group.size):
        batch = make_batch(rank)
        dense(flat, *batch).square().sum().backward()
    hidden, index, weight = make_batch(layer.group.rank)
    output = layer(hidden.requires_grad_(), index, weight)
    output.square().sum().backward()
    torch.testing.assert_close(output, dense(flat, hidden, index, weight), rtol=1e-12, atol=1e-12)
    assert flat.grad is not None
    torch.testing.assert_close(layer.weights.grad, own_part(layer, flat.grad), rtol=1e-12, atol=1e-12)


def move_from_meta(kind: str) -> None:
    layer = make_layer(kind, make_group(), device="meta")
    with pytest.raises(RuntimeError, match="meta device"):
        layer(*make_batch(layer.group.rank))
    layer.to_empty(device="cpu")
    flat = make_flat()
    layer.load_experts(0, flat)
    check_exact(layer, flat)
    layer.float()
    layer.double()  # as `.to` does with any device or type
    check_exact(layer, flat.float().double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_on_the_meta_device_is_exact_once_loaded(ranks: Launch, kind: str) -> None:
    ranks(2, move_from_meta, kind)


def whole(flat: Tensor) -> dict[str, Tensor]:
    """Experts as a fused module's state holds them."""
    inner, outer = split_weights(SHAPE, flat)
    return {"gate_up_proj": inner.clone(), "down_proj": outer.clone()}


def keep_state(kind: str) -> list[str]:
    """A state_dict is right on one rank and refused on several; whole experts can be loaded on any number."""
    layer = make_layer(kind, make_group())
    model = nn.Sequential(nn.Linear(2, 2), layer)
    flat = make_flat()
    model.load_state_dict({f"1.{name}": part for name, part in whole(flat).items()}, strict=False)
    check_exact(layer, flat)
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.down_proj"'):
        model.load_state_dict(model[0].state_dict(prefix="0.") | {"1.gate_up_proj": whole(flat)["gate_up_proj"]})
    other = model[0].state_dict(prefix="0.") | {f"1.{name}": part for name, part in whole(flat).items()}
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"1\.{layer.own}"'):
        model.load_state_dict(other | {f"1.{layer.own}": flat})
    with pytest.raises(RuntimeError, match=r"experts are loaded whole, and 1\.down_proj is not there"):
        model.load_state_dict({"1.gate_up_proj": 2 * whole(flat)["gate_up_proj"]}, strict=False)
    assert model.load_state_dict({}, strict=False).missing_keys[-2:] == ["1.gate_up_proj", "1.down_proj"]
    check_exact(layer, flat)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.down_proj"):
        model.load_state_dict({"1.gate_up_proj": whole(flat)["gate_up_proj"], "1.down_proj": flat}, strict=False)
    if layer.group.size > 1:
        with pytest.raises(RuntimeError) as refused:
            model.state_dict()
        return str(refused.value).splitlines()
    state = model.state_dict()
    for name, part in whole(flat).items():
        torch.testing.assert_close(state[f"1.{name}"], part, rtol=0, atol=0)
        state[f"1.{name}"].mul_(2)  # as some write averages of weights: it is no copy
    check_exact(layer, 2 * flat)
    model.load_state_dict({name: part / 2 for name, part in state.items()})
    check_exact(layer, flat)
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_of_whole_experts_or_refused(ranks: Launch, kind: str) -> None:
    assert ranks(1, keep_state, kind) == [[]]
    for told in ranks(3, keep_state, kind):
        assert "each of 3 ranks" in told[0]
        assert '    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)' in told
        assert "    moeplan.runtime_client.save_pretrained(model, folder)" in told


def test_a_norm_of_results_is_part_of_the_state() -> None:
    layer = make_layer("resident", ExpertGroup())
    layer.finish_by("norm", nn.LayerNorm(SHAPE.hidden))
    model = nn.Sequential(layer)
    state = {name: part + 1 for name, part in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def load_what_is_none(kind: str) -> None:
    layer = make_layer(kind, make_group())
    flat = make_flat()
    layer.load_experts(0, flat)
    for first, wrong in [(0, flat[:, :-1]), (0, flat[:, :1]), (0, flat[:, None]), (1, flat), (-1, flat[:1])]:
        with pytest.raises(ValueError, match=rf"layer 0: load_experts\({first}, .*\[n, {SHAPE.elements}\]"):
            layer.load_experts(first, wrong)
    check_exact(layer, flat)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_none_are_not_loaded(ranks: Launch, kind: str) -> None:
    ranks(2, load_what_is_none, kind)


def go_back_without_gradients(kind: str) -> None:
    """Tokens of some ranks need a gradient, those of others do not, as where a rank without tokens makes empty ones."""
    layer = make_layer(kind, make_group())
    flat = make_flat()
    layer.load_experts(0, flat)
    flat.requires_grad_()
    for rank in range(layer.group.size):
        dense(flat, *make_batch(rank)).square().sum().backward()
    hidden, index, weight = make_batch(layer.group.rank)
    if layer.group.rank == 1:
        hidden.requires_grad_()
    layer(hidden, index, weight).square().sum().backward()
    assert hidden.requires_grad == (layer.group.rank == 1)
    assert flat.grad is not None
    torch.testing.assert_close(layer.weights.grad, own_part(layer, flat.grad), rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        features = hidden * 1
    torch.testing.assert_close(layer(features, index, weight), layer(hidden, index, weight), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_need_no_gradient_go_back_with_those_of_other_ranks(ranks: Launch, kind: str) -> None:
    ranks(3, go_back_without_gradients, kind)


def run_under_autocast(kind: str) -> tuple[dict[str, int], dict[str, int]]:
    """Traffic of a pass and its backward in single precision, and under autocast."""
    layer = make_layer(kind, make_group(), torch.float32)
    flat = make_flat(torch.float32)
    layer.load_experts(0, flat)
    hidden, index, weight = make_batch(layer.group.rank)
    seen, results = [], []
    for enabled in (False, True):
        layer.zero_grad()
        layer.traffic.clear()
        mine = hidden.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(mine, index, weight.float())
        assert output.dtype == torch.float32
        output.square().sum().backward()
        assert mine.grad is not None
        assert layer.weights.grad is not None
        assert layer.weights.grad.dtype == torch.float32
        seen.append(dict(layer.traffic))
        results.append([output.detach(), mine.grad, layer.weights.grad])
    for exact, rounded in zip(*results, strict=True):
        if exact.numel():
            assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.03
    return seen[0], seen[1]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_halves_what_travels(ranks: Launch, kind: str) -> None:
    for single, halved in ranks(2, run_under_autocast, kind):
        assert halved == {purpose: number // 2 for purpose, number in single.items()}
    assert sum(single.values()) > 0


def test_autocast_leaves_double_precision_and_a_chosen_type_alone() -> None:
    for dtype, chosen in [(torch.float64, None), (torch.float32, torch.float32)]:
        layer = FullyShardedExperts(SHAPE, EXPERTS, ExpertGroup(), dtype=dtype, compute_dtype=chosen)
        flat = make_flat(dtype)
        layer.load_experts(0, flat)
        hidden, index, weight = (x if x.dtype == torch.int64 else x.to(dtype) for x in make_batch(0))
        with torch.autocast("cpu", torch.bfloat16):
            actual = layer(hidden, index, weight)
        torch.testing.assert_close(actual, dense(flat, hidden, index, weight))


def test_index_may_be_of_any_integers_and_of_nothing_else() -> None:
    layer = make_layer("sharded", ExpertGroup())
    layer.load_experts(0, make_flat())
    hidden, index, weight = make_batch(0)
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(layer(hidden, index.to(dtype), weight), layer(hidden, index, weight))
    with pytest.raises(ValueError, match=r"index torch.float64 \(7, 2\)"):
        layer(hidden, weight, weight)
    with pytest.raises(ValueError, match=r"weight \(7, 1\) of 7 tokens: must be integers \[tokens, k\]"):
        layer(hidden, index, weight[:, :1])
    with pytest.raises(ValueError, match=rf"layer 0: hidden \(7, 1\): must be \[tokens, {SHAPE.hidden}\]"):
        layer(hidden[:, :1], index, weight)
    with pytest.raises(ValueError, match="of 6 tokens"):
        layer(hidden[1:], index, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_nobody_gave_values_are_not_trained(kind: str) -> None:
    layer = make_layer(kind, ExpertGroup())
    batch = make_batch(0)
    with torch.no_grad():
        assert not layer(*batch).any()
    with pytest.raises(RuntimeError, match=r"layer 0: its experts are zeros.*layer\.load_experts\(first, flat\)"):
        layer(*batch)
    torch.nn.init.normal_(layer.weights)
    layer(*batch).sum().backward()
    assert layer.weights.grad is not None
    assert layer.weights.grad.any()


def test_what_a_layer_is_made_of_is_looked_at() -> None:
    planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, 1, 0), 1)
    made: list[Callable[..., Layer]] = [
        partial(FullyShardedExperts, SHAPE, EXPERTS),
        partial(ResidentExperts, SHAPE, EXPERTS, planner=planner),
    ]
    for make in made:
        with pytest.raises(ValueError, match=r"group = None: must be ExpertGroup; write ExpertGroup\.create\(\)"):
            make(group=None)
    with pytest.raises(ValueError, match=r"shape = 6: must be ExpertShape; write ExpertShape\(hidden, width\)"):
        FullyShardedExperts(6, EXPERTS, ExpertGroup())  # type: ignore[arg-type]
    slots = np.arange(EXPERTS, dtype=np.int32)[None]
    with pytest.raises(ValueError, match=r"layout = .*: must be Layout; write Layout\(slots, experts\)"):
        FullyShardedExperts(SHAPE, EXPERTS, ExpertGroup(), layout=slots)  # type: ignore[arg-type]


def test_a_plan_is_not_put_where_nothing_reads_it() -> None:
    layer, sharded = (make_layer(kind, ExpertGroup()) for kind in ("resident", "sharded"))
    assert isinstance(sharded, FullyShardedExperts)
    for name in ("plan", "layout", "split_rule"):
        with pytest.raises(AttributeError, match=rf"layer 0: {name} = ") as refused:
            setattr(layer, name, getattr(sharded, name))
        assert "PlannerSession(address, job_id, moves.layouts, moves.take, " in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_functions_are_refused_by_name(kind: str) -> None:
    layer = make_layer(kind, ExpertGroup())
    layer.load_experts(0, make_flat())
    hidden, index, weight = make_batch(0)
    with pytest.raises(RuntimeError, match=r"layer 0: torch\.func\.grad.* Write torch\.autograd\.grad"):
        torch.func.grad(lambda given: layer(given, index, weight).sum())(hidden)
    layer(hidden, index, weight)


def add_in_place(kind: str) -> None:
    layer = make_layer(kind, make_group())
    flat = make_flat()
    layer.load_experts(0, flat)
    flat.requires_grad_()
    for rank in range(layer.group.size):
        hidden, index, weight = make_batch(rank)
        (hidden + dense(flat, hidden, index, weight)).square().sum().backward()
    hidden, index, weight = make_batch(layer.group.rank)
    output = layer(hidden.requires_grad_(), index, weight)
    output += hidden
    output.square().sum().backward()
    assert flat.grad is not None
    torch.testing.assert_close(layer.weights.grad, own_part(layer, flat.grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_gives_may_be_changed_in_place(ranks: Launch, kind: str) -> None:
    ranks(2, add_in_place, kind)


class InPlace(torch.optim.SGD):
    """Writes through ``.data``, as older optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.sign(), alpha=-0.05)


ORDERS: list[tuple[int, ...]] = [
    (0, 1, 2),
    (0, 1),
    (2,),
    (0, 2),
    (1, 2),
    (2, 1, 0),
    (1, 0),
    (2, 0),
    (0, 0, 1),
    (0, 1, 2),
]
"""In which layers of a chain run, some of them left out: alike on all ranks."""


def gather_ahead(make: Callable[..., torch.optim.Optimizer], early: bool) -> None:
    """Layers in a chain compute as others that gather nothing ahead, whatever the order and whatever changes them."""
    group, sets = make_group(), []
    for _ in range(2):
        layers = [FullyShardedExperts(SHAPE, EXPERTS, group, dtype=torch.float64) for _ in range(3)]
        for nth, layer in enumerate(layers):
            layer.load_experts(0, make_flat(seed=nth))
        sets.append((layers, make([layer.shard for layer in layers])))
    chain(sets[0][0])
    for step, order in enumerate(ORDERS):
        outputs = []
        for layers, optimizer in sets:
            hidden, index, weight = make_batch(group.rank, step)
            output = hidden
            for place in order:
                output = output + layers[place](output, index, weight)
            outputs.append(output.detach())
            output.square().mean().backward()
            if early and layers is sets[0][0]:
                layers[ORDERS[(step + 1) % len(ORDERS)][0]].prefetch()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_gathered_ahead_are_those_of_the_step(ranks: Launch, fused: bool, early: bool) -> None:
    ranks(2, gather_ahead, partial(torch.optim.AdamW, lr=0.1, fused=fused), early)


def test_weights_gathered_ahead_are_those_of_the_step_where_versions_do_not_tell(ranks: Launch) -> None:
    ranks(2, gather_ahead, InPlace, False)


def differentiate_twice(kind: str) -> list[str]:
    """Gradients of gradients, of a sum too, whose own gradient is constant."""
    group, told = make_group(), []
    for create_graph, of_square in ((False, False), (True, False), (True, True)):
        layer = make_layer(kind, group)
        layer.load_experts(0, make_flat())
        hidden, index, weight = make_batch(group.rank)
        output = layer(hidden.requires_grad_(), index, weight)
        loss = (output.square() if of_square else output).sum()
        try:
            torch.autograd.grad(loss, hidden, create_graph=create_graph)
        except RuntimeError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_are_refused(ranks: Launch, kind: str, size: int) -> None:
    for told in ranks(size, differentiate_twice, kind):
        assert len(told) == 2
        assert all("Leave create_graph out" in each for each in told)


def backward_in_any_order(kind: str, alike: bool) -> str:
    """Two losses of two passes with equal loads, whose backwards ranks run by their sizes, say."""
    group = make_group()
    layer = make_layer(kind, group)
    if isinstance(layer, ResidentExperts):  # no loans, of which gloo would see that they differ
        layer.planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 0), group.size)
    layer.load_experts(0, make_flat())
    hidden, index, weight = make_batch(0)
    losses = [layer(hidden * (1 + group.rank + nth), index, weight).square().sum() for nth in range(2)]
    for loss in losses if alike or group.rank == 0 else reversed(losses):
        loss.backward()
    try:
        layer(hidden, index, weight)
    except LayoutMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_backwards_in_another_order_are_refused(ranks: Launch, kind: str) -> None:
    assert ranks(2, backward_in_any_order, kind, True) == ["", ""]
    for told in ranks(2, backward_in_any_order, kind, False):
        assert "of which passes they have run the backward, and in what order" in told


def copy_layers(kind: str) -> None:
    """A copy computes the same with weights of its own, on the same process groups, beside the original."""
    group = make_group()
    layers = [make_layer(kind, group) for _ in range(2)]
    sharded = [layer for layer in layers if isinstance(layer, FullyShardedExperts)]
    chain(sharded)
    model = nn.ModuleList(layers)
    flat = make_flat()
    for layer in layers:
        layer.load_experts(0, flat)
    check_exact(layers[0], flat)
    output = layers[0](*make_batch(group.rank))  # its backward is still to come
    average = AveragedModel(model, avg_fn=lambda averaged, current, _: (averaged + current) / 2)
    average.update_parameters(model)
    for layer in layers:
        layer.load_experts(0, 3 * flat)
    average.update_parameters(model)
    for averaged in average.module.children():
        assert isinstance(averaged, FullyShardedExperts | ResidentExperts)
        check_exact(averaged, 2 * flat)
    single = copy.deepcopy(layers[1])
    assert single.group is group
    single.load_experts(0, flat)
    check_exact(single, flat)
    check_exact(layers[1], 3 * flat)
    del output


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_averages_of_weights(ranks: Launch, kind: str) -> None:
    ranks(2, copy_layers, kind)


def pickle_layer(kind: str) -> str:
    layer = make_layer(kind, make_group())
    with pytest.raises(TypeError) as refused:
        torch.save(nn.Sequential(layer), io.BytesIO())
    return str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_is_not_pickled(ranks: Launch, kind: str) -> None:
    for told in ranks(2, pickle_layer, kind):
        assert "TrainingState(model, optimizer)" in told


def leave_out(kind: str, how: str) -> str:
    """Ranks 0 and 1 call a layer twice, rank 2 once, and then comes to another, to none, or ends."""
    group = ExpertGroup.create(timeout=timedelta(seconds=4))
    assert group is not None
    first, second = make_layer(kind, group), make_layer(kind, group)
    for layer in (first, second):
        layer.load_experts(0, make_flat())
    first.name = "blocks.3.experts"
    first(*make_batch(group.rank))
    if group.rank == 2 and how == "comes to none":
        time.sleep(10)
        return "pass 2 of blocks.3.experts: ranks [2] have not come to it within 4 s"
    if group.rank == 1:
        time.sleep(1.5)
    with pytest.raises(MissedPassError) as told:
        (second if group.rank == 2 else first)(*make_batch(group.rank))
    return str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_a_rank_leaves_out_is_told_at_once_if_it_comes_to_another(ranks: Launch, kind: str) -> None:
    for told in ranks(3, leave_out, kind, "comes to another"):
        assert "rank 1 in pass 2 of layer 0, rank 2 in pass 1 of layer 1" in told


def test_a_rank_that_does_not_come_is_told_with_layer_and_pass(ranks: Launch) -> None:
    for told in ranks(3, leave_out, "sharded", "comes to none"):
        assert told.startswith("pass 2 of blocks.3.experts: ranks [2] have not come to it within 4 s")


def compute_unalike(kind: str, how: str) -> str:
    group = make_group()
    layer = make_layer(kind, group, torch.float32)
    layer.load_experts(0, make_flat(torch.float32))
    hidden, index, weight = make_batch(group.rank)
    alone = group.rank == 1
    layer.weights.requires_grad_(not (alone and how == "frozen"))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=alone and how == "autocast"),
        torch.set_grad_enabled(not (alone and how == "no_grad")),
        pytest.raises(LayoutMismatchError) as told,
    ):
        layer(hidden.float(), index, weight)
    return str(told.value)


@pytest.mark.parametrize(("kind", "how"), [("sharded", "autocast"), ("resident", "frozen"), ("resident", "no_grad")])
def test_ranks_that_compute_unalike_are_told(ranks: Launch, kind: str, how: str) -> None:
    for told in ranks(2, compute_unalike, kind, how):
        assert "ranks [1]" in told
        assert how in told


def go_back_alone(kind: str) -> str:
    """Rank 1 makes the pass, but does not go back as rank 0 does."""
    group = make_group(timeout=timedelta(seconds=2))
    layer = make_layer(kind, group)
    layer.load_experts(0, make_flat())
    hidden, index, weight = make_batch(group.rank)
    loss = layer(hidden.requires_grad_(), index, weight).square().sum()
    if group.rank == 1:
        time.sleep(6)
        return ""
    with pytest.raises(MissedPassError) as told:
        loss.backward()
    return str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_does_not_go_back_is_told_with_what_was_waited_for(ranks: Launch, kind: str) -> None:
    told, _ = ranks(2, go_back_alone, kind)
    assert "backward: some rank has not come to it in time" in told
    assert "Every rank calls backward() as often as the others" in told


DIES = """
import os, sys, torch, torch.distributed as dist
from moeplan.runtime_client import ExpertGroup, ExpertShape, FullyShardedExperts
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
layer = FullyShardedExperts(ExpertShape(4, 3), 2, ExpertGroup.create())
layer.load_experts(0, torch.rand(2, layer.shape.elements))
for _ in range(2):
    layer(torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    if rank == 1:
        os._exit(0)
"""


def test_a_rank_that_dies_is_told_with_layer_and_pass(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", DIES]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    told = processes[0].communicate(timeout=120)[1].decode()
    processes[1].communicate(timeout=120)
    assert "MissedPassError: pass 2 of layer 0: ranks [1] have gone" in told
