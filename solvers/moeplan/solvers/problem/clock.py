"""The clock of kernels, by which a long one ends in time: 40 nanoseconds for a look."""

from __future__ import annotations

import time

import numpy as np
from numba import types

from moeplan.solvers.problem.kernel import kernel

__all__ = ["NEVER", "end_of", "time_now"]

NEVER = float("inf")
"""The time at which a kernel ends that may take as long as it needs."""

_MONOTONIC = time.CLOCK_MONOTONIC

_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))


@kernel
def time_now() -> float:
    """Seconds on the system's monotonic clock."""
    passed = np.empty(2, np.int64)
    _gettime(_MONOTONIC, passed.ctypes.data)
    return passed[0] + passed[1] * 1e-9


def end_of(deadline: float | None) -> float:
    """A deadline, a time on `time.perf_counter`, as a time on the clock of kernels; None is `NEVER`."""
    return NEVER if deadline is None else time_now() + deadline - time.perf_counter()
