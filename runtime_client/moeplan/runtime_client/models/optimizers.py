"""Optimizers that would not train the experts of a model, or train them wrongly: refused at their first step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.rank_checks import row_sums

__all__ = ["watch_optimizers"]

_layers: weakref.WeakSet[ExpertLayer] = weakref.WeakSet()
_replaced: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()


class _Looked(NamedTuple):
    """What an optimizer trained when it was looked at: how many parameters, and which layers."""

    parameters: int
    layers: weakref.WeakSet[ExpertLayer]


_trained: weakref.WeakKeyDictionary[Optimizer, _Looked] = weakref.WeakKeyDictionary()
"""Optimizers that have been looked at since experts were last replaced."""

_OF_WHOLE_TENSORS = (
    "adafactor", "adagc", "adamini", "adam_mini", "adammini", "adamp", "apollo", "came", "dadapt", "galore",
    "kfac", "kron", "lamb", "lars", "lbfgs", "muon", "novograd", "prodigy", "psgd", "ranger", "sgdp", "shampoo", "sm3",
    "soap", "stableadam",
)  # fmt: skip
"""In names of optimizers that treat a tensor, or all of them, as a whole: by its rows and columns, its singular values
or its norm, or with one rate for all that is found from all."""


def watch_optimizers(layers: Iterable[ExpertLayer], replaced: Iterable[nn.Parameter]) -> None:
    """Have steps of optimizers refused that hold what is no longer in the model, or treat experts as one tensor.

    Of other steps it is noted what ranks compare.

    Args:
        layers: The layers that are in the model now.
        replaced: The parameters that they have taken the place of.
    """
    _layers.update(layers)
    _replaced.update({id(parameter): parameter for parameter in replaced})
    _trained.clear()
    _look_at_steps()


@cache
def _look_at_steps() -> None:
    """Once in a process, as torch calls it for every optimizer."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(optimizer: Optimizer, *_: Any) -> None:
    held = sum(len(group["params"]) for group in optimizer.param_groups)  # of which `add_param_group` makes more
    looked = _trained.get(optimizer)
    if looked is None or looked.parameters != held:
        looked = _trained[optimizer] = _Looked(held, _require_right(optimizer))
    for layer in looked.layers:
        if layer.awaits_step:
            layer.trained_by = _sum_of_training(optimizer, layer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    looked = _trained.get(optimizer)
    for layer in looked.layers if looked else ():
        layer.steps = 1 + (layer.steps or 0)


def _require_right(optimizer: Optimizer) -> weakref.WeakSet[ExpertLayer]:
    """The layers that an optimizer trains.

    Raises:
        RuntimeError: the optimizer was made before `replace_experts`, treats tensors as a whole, or spreads them over
            ranks.
    """
    kind = type(optimizer).__name__
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    if any(_replaced.get(number) is parameter for number, parameter in held.items()):
        raise RuntimeError(
            f"{kind}: was made before replace_experts, so it holds weights that are no longer in the model, and would "
            "not train the experts. Make the optimizer after it"
        )
    layers = weakref.WeakSet(layer for layer in _layers if id(layer.weights) in held)
    if layers and kind == "ZeroRedundancyOptimizer":
        raise RuntimeError(
            f"{kind}: would have one rank train {min(layer.title for layer in layers)} and send its part to all, "
            "and each holds its own. Write\n"
            "    experts = set(expert_parameters(model).values())\n"
            "    ZeroRedundancyOptimizer([p for p in model.parameters() if p not in experts], ...)\n"
            "and give the experts an optimizer on each rank"
        )
    if layers and any(name in kind.lower() for name in _OF_WHOLE_TENSORS):
        raise RuntimeError(
            f"{kind}: takes the weights of {min(layer.title for layer in layers)} for a tensor of the model, which it "
            "treats as a whole, and they are the flat experts of a rank. Leave expert_parameters(model) to an "
            "optimizer that treats elements one by one, as AdamW or SGD"
        )
    for layer in layers:
        _require_decay(optimizer, layer)
    return layers


def _require_decay(optimizer: Optimizer, layer: ExpertLayer) -> None:
    """Refuse a decay of weights that is meant for matrices alone, where biases are in one parameter with them.

    Raises:
        RuntimeError: other biases of the model decay otherwise.
    """
    if not layer.shape.bias:
        return
    decays = {id(part): group.get("weight_decay") for group in optimizer.param_groups for part in group["params"]}
    (group,) = [group for group in optimizer.param_groups if any(part is layer.weights for part in group["params"])]
    own = group.get("weight_decay")
    others = {decays[id(bias)] for bias in layer.biases_beside if id(bias) in decays} - {own}
    if own and others and not group.get("decays_biases"):
        raise RuntimeError(
            f"{type(optimizer).__name__}: weight_decay = {own} of {layer.title} is for its biases, too, which are in "
            f"one parameter with its matrices, and other biases have weight_decay = {sorted(others, key=repr)}. Write, "
            "in the group of expert_parameters(model), weight_decay=0, or if biases of experts shall decay with their "
            "matrices, as where all of two dimensions and more does,\n"
            f'    {{"params": ..., "weight_decay": {own}, "decays_biases": True}}'
        )


def _sum_of_training(optimizer: Optimizer, layer: ExpertLayer) -> Tensor | None:
    """int64: sum of the bits of an optimizer's state of the layer once it has made a step, or else of the gradient."""
    weights = layer.weights
    state = optimizer.state.get(weights, {})
    kept = [part for part in state.values() if isinstance(part, Tensor) and part.shape == weights.shape]
    if not kept or not float(state.get("step", 1)):
        kept = [] if weights.grad is None else [weights.grad]
    return torch.stack([row_sums(part).sum() for part in kept]).sum() if kept else None
