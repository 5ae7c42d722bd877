"""Kernels of `layout`, apart from it so that a program that only passes layouts on need not load the compiler."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.kernel import kernel

__all__ = ["MISSING", "OK", "RANGE", "TWICE", "first_fault", "hosts"]

OK, RANGE, TWICE, MISSING = range(4)


@kernel
def first_fault(slots: Int32, experts: int) -> tuple[int, int]:
    """The first fault of a table, and its place: an index of `slots.ravel()`, or the expert that is missing."""
    seen_on = np.full(max(experts, 0), -1, np.int32)
    devices, width = slots.shape
    for d in range(devices):
        for c in range(width):
            e = slots[d, c]
            if e == -1:
                continue
            if e < -1 or e >= experts:
                return RANGE, d * width + c
            if seen_on[e] == d:
                return TWICE, d * width + c
            seen_on[e] = d
    for e in range(experts):
        if seen_on[e] < 0:
            return MISSING, e
    return OK, 0


@kernel
def hosts(slots: Int32, experts: int) -> tuple[Int32, Int32, Int32]:
    """`Hosts` of a valid table."""
    devices, width = slots.shape
    start = np.zeros(experts + 1, np.int32)
    for d in range(devices):
        for c in range(width):
            if slots[d, c] >= 0:
                start[slots[d, c] + 1] += 1
    for e in range(experts):
        start[e + 1] += start[e]
    fill = start[:-1].copy()
    device = np.empty(start[experts], np.int32)
    slot = np.empty(start[experts], np.int32)
    for d in range(devices):
        for c in range(width):
            e = slots[d, c]
            if e >= 0:
                device[fill[e]] = d
                slot[fill[e]] = c
                fill[e] += 1
    return start, device, slot
