"""Backward passes that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

__all__ = ["once_differentiable"]

R = TypeVar("R")


def once_differentiable(backward: Callable[..., R]) -> Callable[..., R]:
    """The backward of an `autograd.Function`, which refuses to be part of a graph itself.

    torch's decorator of this name does so only where the gradients that come have derivatives, and takes others for
    constants: of a sum of outputs, say, whose gradient is ones.

    Raises:
        RuntimeError: it is called with ``create_graph=True``; on all ranks that call it so.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> R:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: gradients of experts that ranks share have no derivatives. Leave create_graph out, "
                "or keep the experts of the original model where gradients of gradients are wanted, and do not call "
                "replace_experts"
            )
        return backward(ctx, *gradients)

    return once
