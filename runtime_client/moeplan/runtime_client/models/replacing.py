"""Experts of an existing model, replaced by ours with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.layers.feed_forward import ExpertShape, activation_name, feed_forward, join_weights
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.models.gradients import expert_parameters

__all__ = ["replace_experts"]

_SIZES = (1.0, 1000.0)
"""Of the rows that old and new experts are compared on: what models see, and what no clamp of theirs lets through."""

_TOLERANCE = 1e-4
"""Relative; both compute in single precision, at any width of a model within a tenth of it."""

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
            which only some weights are frozen, inside an adapter, or that computes something else than
            ``down(act(gate) * up)``, as old and new module on random rows of ordinary and of large size show.
    """
    found = {name: module for name, module in model.named_modules() if _is_fused(module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__}: has no module with parameters gate_up_proj and down_proj of three dimensions; "
            "call FullyShardedExperts or ResidentExperts from the model's own MoE block instead"
        )
    shapes = {name: _shape_of(name, module) for name, module in found.items()}
    samples = {shape: _random_expert(shape) for shape in set(shapes.values())}
    for name, shape in shapes.items():
        _require_same(name, found[name], shape, *samples[shape])
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


def _random_expert(shape: ExpertShape) -> tuple[Tensor, Tensor]:
    """Matrices [1, rows, columns] of one expert, which keep the size of what they are multiplied with."""
    rng = torch.Generator().manual_seed(0)
    inner = torch.randn(1, shape.inner_rows, shape.hidden, generator=rng, device="cpu") / shape.hidden**0.5
    outer = torch.randn(1, shape.hidden, shape.width, generator=rng, device="cpu") / shape.width**0.5
    return inner, outer


@torch.no_grad()
def _require_same(name: str, module: nn.Module, shape: ExpertShape, inner: Tensor, outer: Tensor) -> None:
    """Raise unless a module, with one expert's weights in the place of all of its own, computes what ours do."""
    experts = len(module.get_parameter("gate_up_proj"))
    twin = copy.copy(module)
    twin._parameters = {
        "gate_up_proj": nn.Parameter(inner.expand(experts, -1, -1)),
        "down_proj": nn.Parameter(outer.expand(experts, -1, -1)),
    }
    twin._modules = copy.deepcopy(module._modules)
    twin.train()  # a dropout would show
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(6, shape.hidden, generator=rng, device="cpu")
    weight = torch.rand(6, 2, generator=rng, device="cpu")
    index = torch.tensor([0, experts - 1], device="cpu").expand(6, 2)
    for size in _SIZES:
        with torch.autocast("cpu", enabled=False):
            expected = feed_forward(shape, join_weights(inner, outer), size * rows, [6]) * weight.sum(1, keepdim=True)
            try:
                actual = type(module).forward(twin, size * rows, index, weight)
            except Exception as error:
                raise ValueError(
                    f"{name} ({type(module).__name__}): cannot be called as experts(hidden, index, weight): {error}"
                ) from error
        difference = float((actual - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"{name} ({type(module).__name__}): does not compute down({shape.activation}(gate) * up): on rows of "
                f"size {size:.0f} it differs by {difference:.2g} of the largest result, for instance by a clamp; "
                "experts of this form are not supported"
            )
