"""The compilation of numeric kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

__all__ = ["kernel"]

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile `function` with numba: without the interpreter lock, cached on disk, and without fast-math.

    Ranks that solve the same problem must agree bit for bit, so floating-point operations are never reordered.
    """
    compiled: F = numba.njit(cache=True, nogil=True)(function)
    return compiled
