"""What the Triton kernels of this package share: how they are compiled, and what names mean in all of them.

Symmetric memory is named by what this rank sees of it. ``peers`` is int64[ranks]: where each rank's memory begins as
seen from the beginning of this rank's, in units of 16 bytes, so that compilers see what accesses are aligned.
``EACH`` is the number of elements in 16 bytes. ``answer`` is a plan as `AnswerShape` has it.

With ``TRITON_INTERPRET=1`` the same kernels run on CPU memory that processes share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

__all__ = ["program"]


def program(function: Callable[..., Any]) -> Any:
    """A Triton kernel, or a part of one, compiled once for all numbers and for all places of single words."""
    numbers = ["rank", "layer", "tokens", "pairs", "chunks", "excess", "limit", "number", "gathered", "low", "apart"]
    numbers += ["replicas", "first", "home", "loans", "begin", "end", "ends", "fills", "count"]
    return triton.jit(function, do_not_specialize=numbers)
