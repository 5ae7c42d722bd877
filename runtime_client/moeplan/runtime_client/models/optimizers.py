"""Optimizers that would not train the experts of a model, or train them wrongly: refused at their first step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moeplan.runtime_client.layers.expert_layer import ExpertLayer

__all__ = ["watch_optimizers"]

_layers: weakref.WeakSet[ExpertLayer] = weakref.WeakSet()
_replaced: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
_right: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that have been looked at since experts were last replaced."""


def watch_optimizers(layers: Iterable[ExpertLayer], replaced: Iterable[nn.Parameter]) -> None:
    """Have steps of optimizers refused that hold what is no longer in the model, or that take experts for matrices.

    Args:
        layers: The layers that are in the model now.
        replaced: The parameters that they have taken the place of.
    """
    _layers.update(layers)
    _replaced.update({id(parameter): parameter for parameter in replaced})
    _right.clear()
    _look_at_steps()


@cache
def _look_at_steps() -> None:
    """Once in a process, as torch calls it for every optimizer."""
    register_optimizer_step_pre_hook(_require_right)


def _require_right(optimizer: Optimizer, *_: Any) -> None:
    """Raise before a step that would go wrong.

    Raises:
        RuntimeError: the optimizer was made before `replace_experts`, or is one for matrices.
    """
    if optimizer in _right:
        return
    kind = type(optimizer).__name__
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    if any(_replaced.get(number) is parameter for number, parameter in held.items()):
        raise RuntimeError(
            f"{kind}: was made before replace_experts, so it holds weights that are no longer in the model, and would "
            "not train the experts. Make the optimizer after it"
        )
    flat = [layer.title for layer in _layers if id(layer.weights) in held]
    if flat and "muon" in kind.lower():
        raise RuntimeError(
            f"{kind}: takes the weights of {min(flat)} for a matrix, and they are the flat experts of a rank. Leave "
            "expert_parameters(model) to an optimizer that treats elements one by one, as AdamW or SGD"
        )
    _right.add(optimizer)
