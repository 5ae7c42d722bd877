"""How often a parameter has been changed, by fused optimizers too, which leave the versions of tensors as they are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["changes_of", "steps_of"]


@dataclass(slots=True, eq=False)
class _Asked:
    """A parameter that was asked for, a number of its own, and steps that optimizers have made with it since."""

    parameter: weakref.ref[Tensor]
    number: int
    steps: int = 0


_numbers = count()
_asked: dict[int, _Asked] = {}
"""By the parameter's `id`: several times in a pass, and dictionaries of tensors take ten times as long."""


def changes_of(parameter: Tensor) -> tuple[int, int, int]:
    """(number, version, steps): differs between parameters, and after a change of one in place or by an optimizer.

    Not after a change through ``.data``, which nothing tells of.
    """
    place = id(parameter)
    asked = _asked.get(place)
    if asked is None or asked.parameter() is not parameter:
        _look_at_steps()
        asked = _asked[place] = _Asked(weakref.ref(parameter, partial(_forget, place)), next(_numbers))
    return asked.number, parameter._version, asked.steps


def steps_of(parameter: Tensor) -> int:
    """Steps that optimizers have made with a parameter since it was first asked for."""
    return changes_of(parameter)[2]


def _forget(place: int, gone: weakref.ref[Tensor]) -> None:
    if place in _asked and _asked[place].parameter is gone:
        del _asked[place]


@cache
def _look_at_steps() -> None:
    """Once in a process, as torch calls it for every optimizer."""
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            asked = _asked.get(id(parameter))
            if asked is not None and asked.parameter() is parameter:
                asked.steps += 1
