"""Chains of elementwise operations that run as one kernel on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

__all__ = ["fused"]

P = ParamSpec("P")


def fused(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`function`, compiled by ``torch.compile`` when its first argument is a tensor on a CUDA device.

    One by one its operations would read and write every activation several times. They do run so on other devices,
    on empty tensors, and where ``TORCH_COMPILE_DISABLE=1`` is set.

    Args:
        function: Takes tensors whose first dimension differs from call to call, and other arguments that do not.
    """

    @cache
    def compiled() -> Callable[P, Tensor]:
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not tensors[0].is_cuda or not tensors[0].numel():
            return function(*args, **kwargs)
        for tensor in tensors:
            # Only this dimension: a kernel for any width takes three times as long.
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled()(*args, **kwargs)

    return call
