"""Experts of an existing model, replaced by ours with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.layers.feed_forward import ExpertShape, activation_name, join_weights
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.models.gradients import expert_parameters

__all__ = ["replace_experts"]

L_co = TypeVar("L_co", bound=FullyShardedExperts | ResidentExperts, covariant=True)
L = TypeVar("L", bound=FullyShardedExperts | ResidentExperts)


class MakeExperts(Protocol[L_co]):
    """What makes a layer: one of our classes with its other arguments already given, for instance by ``partial``."""

    def __call__(self, shape: ExpertShape, experts: int, *, dtype: torch.dtype, device: torch.device) -> L_co: ...


def replace_experts(model: nn.Module, make: MakeExperts[L]) -> dict[str, L]:
    """Replace every fused experts module of a model, in place; its router and the rest stay as they are.

    It knows experts modules by their parameters, ``gate_up_proj`` [experts, 2 * width, hidden] and ``down_proj``
    [experts, hidden, width], and by the call ``experts(hidden, index, weight)``: those of Mixtral, Qwen3-MoE, OLMoE,
    DeepSeek-V3 and others in transformers 5. Fully sharded layers are chained in the order of the model's modules.

    Every rank holds the same weights before, and its part of them after. On the meta device there is nothing to take
    over: call ``to_empty`` and load a checkpoint with `TrainingState` afterwards. Frozen experts stay frozen.

    Before training make an `ExpertGradients`, which says how gradients of experts go with those of the rest.

    Args:
        model: The model, for instance ``AutoModelForCausalLM.from_pretrained(...)``.
        make: Makes a layer, for instance ``partial(FullyShardedExperts, group=group)``.

    Returns:
        The new layers by their names in the model, in its order.

    Raises:
        ValueError: the model has no such module, or one with biases, transposed weights or an unknown activation, of
            which only some weights are frozen, or inside an adapter.
    """
    found = {name: module for name, module in model.named_modules() if _is_fused(module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__}: has no module with parameters gate_up_proj and down_proj of three dimensions; "
            "call FullyShardedExperts or ResidentExperts from the model's own MoE block instead"
        )
    shapes = {name: _shape_of(name, module) for name, module in found.items()}
    layers: dict[str, L] = {}
    for name, shape in shapes.items():
        module = found.pop(name)
        inner, outer = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
        layer = make(shape, len(inner), dtype=inner.dtype, device=inner.device)
        if not inner.is_meta:
            for expert in range(len(inner)):  # one by one: never two copies of a layer
                layer.load_experts(expert, join_weights(inner[expert, None].detach(), outer[expert, None].detach()))
        layer.train(module.training)
        layer.weights.requires_grad_(inner.requires_grad)
        layer.name = name
        owner, _, attribute = name.rpartition(".")
        block = model.get_submodule(owner)
        setattr(block, attribute, layer)
        layer.watch(block)
        layers[name] = layer
    chain([layer for layer in layers.values() if isinstance(layer, FullyShardedExperts)])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(expert_parameters(model)))
    return layers


def _is_fused(module: nn.Module) -> bool:
    weights = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)


def _shape_of(name: str, module: nn.Module) -> ExpertShape:
    others = [key for key, _ in module.named_parameters() if key not in ("gate_up_proj", "down_proj")]
    if others:
        raise ValueError(
            f"{name} ({type(module).__name__}): has parameters {', '.join(others)}; only weights are known"
        )
    if name.endswith("base_layer"):
        raise ValueError(
            f"{name} ({type(module).__name__}): is wrapped by an adapter, which reaches into it; adapters of experts "
            "are not supported, so leave gate_up_proj and down_proj out of target_parameters"
        )
    inner, outer = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    if inner.requires_grad != outer.requires_grad:
        raise ValueError(
            f"{name} ({type(module).__name__}): only one of gate_up_proj and down_proj is frozen; freeze both or none"
        )
    experts, hidden, width = outer.shape
    if inner.shape != (experts, 2 * width, hidden):
        raise ValueError(
            f"{name} ({type(module).__name__}): gate_up_proj is {tuple(inner.shape)}, down_proj {tuple(outer.shape)}; "
            "must be [experts, 2 * width, hidden] and [experts, hidden, width]"
        )
    act_fn: Callable[[Tensor], Tensor] | None = getattr(module, "act_fn", None)
    activation = act_fn and activation_name(act_fn)
    if activation is None:
        raise ValueError(f"{name} ({type(module).__name__}): act_fn = {act_fn}: must be SiLU, GELU or ReLU")
    return ExpertShape(hidden, width, gated=True, activation=activation)
