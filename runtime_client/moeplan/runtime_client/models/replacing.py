"""Experts of an existing model, replaced by ours with the same weights."""

from __future__ import annotations

import inspect
from typing import Protocol, TypeVar

import torch
from torch import nn

from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.rows_by_expert import take_rows_by_expert
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.models.gradients import ignore_experts
from moeplan.runtime_client.models.optimizers import watch_optimizers
from moeplan.runtime_client.models.recognition import Recognised, called_with_rows, recognise

__all__ = ["replace_experts"]

L_co = TypeVar("L_co", bound=FullyShardedExperts | ResidentExperts, covariant=True)
L = TypeVar("L", bound=FullyShardedExperts | ResidentExperts)


class MakeExperts(Protocol[L_co]):
    """A maker of layers: one of our classes with its other arguments already given, for instance by ``partial``."""

    def __call__(self, shape: ExpertShape, experts: int, *, dtype: torch.dtype, device: torch.device) -> L_co: ...


def replace_experts(model: nn.Module, make: MakeExperts[L]) -> dict[str, L]:
    """Replace every fused experts module of a model, in place; its router and the rest stay as they are.

    It knows experts modules by their parameters, ``gate_up_proj`` (``up_proj`` of networks without a gate) and
    ``down_proj`` of three dimensions, perhaps with biases, and by the call ``experts(hidden, index, weight)``: those of
    Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and V4, gpt-oss, Nemotron-H, Llama 4 and others in transformers 5. A norm of
    results, and choices that are the identity, are computed on the rank that a token comes from. Shared experts, which
    every token goes to, are none of them and stay as they are. What a module computes it finds out by comparison, on
    random rows of ordinary and of large size, with the forms of `ExpertShape`. Fully sharded layers are chained in the
    order of the model's modules.

    Every rank holds the same weights before, and its part of them after. On the meta device there is nothing to take
    over: `load_pretrained`, or ``to_empty`` and a checkpoint of `TrainingState`, must follow. Frozen experts stay so.

    Before training make an `ExpertGradients`, which says how gradients of experts go with those of the rest, and then
    the optimizer: the step of one that was made before, or that takes a rank's flat experts for a matrix (Muon), is an
    error.

    Args:
        model: The model, for instance ``AutoModelForCausalLM.from_pretrained(...)``.
        make: Makes a layer, for instance ``partial(FullyShardedExperts, group=group)``.

    Returns:
        The new layers by their names in the model, in its order.

    Raises:
        ValueError: the model has no such module, or one that computes something else, with other parameters or
            quantized ones, of which only some are frozen, inside an adapter, with hooks, or with another's weights.
            Nothing has been replaced then.
    """
    found = {name: module for name, module in model.named_modules() if _is_fused(module)}
    if not found:
        raise ValueError(
            f"{type(model).__name__}: has no module with parameters gate_up_proj and down_proj of three dimensions; "
            "call FullyShardedExperts or ResidentExperts from the model's own MoE block instead"
        )
    known: dict[str, Recognised] = {}
    _require_apart(found)
    places = _places(model, found)
    for name, module in found.items():
        shapes = {other.shape for other in known.values()}
        known[name] = recognise(f"{name} ({type(module).__name__})", module, shapes)
    layers: dict[str, L] = {}
    for name, (shape, experts, identities, finish) in known.items():
        module = found.pop(name)
        weights = [module.get_parameter(part) for part in shape.parts]
        dtype, device = weights[0].dtype, weights[0].device
        layer = make(shape, experts, dtype=dtype, device=device)
        if device.type != "meta":
            for expert in range(experts):  # one by one: never two copies of a layer
                layer.load_experts(expert, join_weights(*(part[expert, None].detach() for part in weights)))
        layer.train(module.training)
        layer.weights.requires_grad_(weights[0].requires_grad)
        layer.name = name
        layer.identities = identities
        if finish:
            layer.finish_by(finish, module.get_submodule(finish))
        if called_with_rows(module):
            take_rows_by_expert(layer, experts)
        for owner, _, attribute in places[name]:
            setattr(model.get_submodule(owner), attribute, layer)
        layer.watch(model.get_submodule(name.rpartition(".")[0]), model)
        layers[name] = layer
        watch_optimizers([layer], weights)
    chain([layer for layer in layers.values() if isinstance(layer, FullyShardedExperts)])
    ignore_experts(model)
    return layers


def _places(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, list[tuple[str, str, str]]]:
    """Owner, dot and attribute of all places of each module: several, if blocks share it."""
    names = {id(module): name for name, module in found.items()}
    places: dict[str, list[tuple[str, str, str]]] = {name: [] for name in found}
    for place, module in model.named_modules(remove_duplicate=False):
        if id(module) in names:
            places[names[id(module)]].append(place.rpartition("."))
    return places


def _require_apart(found: dict[str, nn.Module]) -> None:
    """Refuse experts from which something else hangs that would be lost.

    Raises:
        ValueError: hooks do, or the weights of another module.
    """
    owners: dict[nn.Parameter, str] = {}
    for name, module in found.items():
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            raise ValueError(
                f"{name}: has hooks, which would be lost; call record(model), or whatever has set them, after "
                "replace_experts"
            )
        for parameter in module.parameters(recurse=False):
            if owners.setdefault(parameter, name) != name:
                raise ValueError(
                    f"{name}: has weights of {owners[parameter]}, and either would get its own; to share experts, let "
                    "both blocks have the same module"
                )


def _is_fused(module: nn.Module) -> bool:
    inner = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    weights = (inner, getattr(module, "down_proj", None))
    return all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights) and not _is_shared(module)


def _is_shared(module: nn.Module) -> bool:
    """True if it is called without choices, and has three matrices for each of the experts that all tokens go to."""
    return hasattr(module, "gate_proj") and len(inspect.signature(type(module).forward).parameters) < 4
