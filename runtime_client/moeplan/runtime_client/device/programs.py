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


def program(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """A Triton kernel, or a part of one.

    Args:
        varying: Numbers, and places of single words, that it is compiled once for; others it is compiled anew for where
            they are multiples of 16, so that it reads 16 bytes at a time.
    """
    return triton.jit(do_not_specialize=varying)
