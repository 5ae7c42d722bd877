"""How often a parameter has been changed, by fused optimizers too, which leave the versions of tensors as they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["changes_of"]

_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Steps that optimizers have made with each parameter since it was first asked for."""


def changes_of(parameter: Tensor) -> tuple[int, int]:
    """Differs after a change of a parameter in place, or a step of an optimizer; not after one through ``.data``."""
    _look_at_steps()
    return parameter._version, _steps.setdefault(parameter, 0)


@cache
def _look_at_steps() -> None:
    """Once in a process, as torch calls it for every optimizer."""
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _steps:
                _steps[parameter] += 1
