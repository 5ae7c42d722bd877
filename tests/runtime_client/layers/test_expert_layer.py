"""What both kinds of layers follow or refuse when something around them changes: devices, copies, wrappers, ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape, split_weights
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.layout import Layout

Launch = Callable[..., list[Any]]
Layer = FullyShardedExperts | ResidentExperts
KINDS = ["sharded", "resident"]
SHAPE, EXPERTS = ExpertShape(6, 5), 4


def make_group() -> ExpertGroup:
    group = ExpertGroup.create()
    assert group is not None
    return group


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
        inner = row[: SHAPE.parts[0]].view(-1, SHAPE.hidden)
        outer = row[SHAPE.parts[0] :].view(SHAPE.hidden, SHAPE.width)
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
        assert 'dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)' in told[-1]
