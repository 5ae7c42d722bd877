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
    """

    @cache
    def compiled() -> Callable[P, Tensor]:
        return torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = args[0]
        assert isinstance(first, Tensor)
        return (compiled() if first.is_cuda and first.numel() else function)(*args, **kwargs)

    return call
