"""Pseudo-random numbers for searches, the same on every machine."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.kernel import inner_kernel, kernel

__all__ = ["next_random", "seeded"]


@kernel
def seeded(seed: int) -> Int64:
    """The state of a generator, for `next_random`."""
    return np.array([np.int64(seed) * 2 + 88172645463325252], np.int64)


@inner_kernel
def next_random(state: Int64) -> int:
    """xorshift64*: a pseudo-random number below 2**31, the same on every machine."""
    x = np.uint64(state[0])
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = np.int64(x)
    return int((x * np.uint64(2685821657736338717)) >> np.uint64(33))
