"""How often a parameter has been changed, by fused optimizers too, which leave the versions of tensors as they are."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["changes_of", "steps_of"]

_numbers = count()
_asked: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""[a number of its own, steps that optimizers have made with it since] of each parameter that was asked for."""


def changes_of(parameter: Tensor) -> tuple[int, int, int]:
    """(number, version, steps): differs between parameters, and after a change of one in place or by an optimizer.

    Not after a change through ``.data``, which nothing tells of.
    """
    _look_at_steps()
    if parameter not in _asked:
        _asked[parameter] = [next(_numbers), 0]
    number, steps = _asked[parameter]
    return number, parameter._version, steps


def steps_of(parameter: Tensor) -> int:
    """Steps that optimizers have made with a parameter since it was first asked for."""
    return changes_of(parameter)[2]


@cache
def _look_at_steps() -> None:
    """Once in a process, as torch calls it for every optimizer."""
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _asked:
                _asked[parameter][1] += 1
