"""Using the slots that a construction left empty."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import EMPTY, Layout

__all__ = ["fill", "fill_for_even_split"]


@kernel
def fill(slots: Int32, loads: Float64, capacity: Int32, end: float) -> None:
    """Give every empty slot the expert with the largest load per replica that its device does not hold yet.

    A further replica never makes the best split worse, and it widens what later splits can do. Slots are visited
    round by round over the devices, so that the hottest experts spread.

    Args:
        slots: int32[devices, width], changed in place; replicas of a device come first, unless it is too late.
        loads: float64[experts].
        capacity: int32[devices], at most the number of experts.
        end: Time on the clock of kernels after which slots stay empty.
    """
    devices, width = slots.shape
    experts = len(loads)
    if time_now() >= end:  # before a table of devices and experts is made
        return
    replicas = np.zeros(experts, np.int32)
    on = np.zeros((devices, experts), np.bool_)
    used = np.zeros(devices, np.int32)
    for d in range(devices):
        for c in range(width):
            if slots[d, c] >= 0:
                replicas[slots[d, c]] += 1
                on[d, slots[d, c]] = True
                slots[d, used[d]] = slots[d, c]
                if used[d] < c:
                    slots[d, c] = -1
                used[d] += 1
    for c in range(width):
        for d in range(devices):
            if used[d] != c or c >= capacity[d]:
                continue
            if time_now() >= end:
                return
            best = -1
            for e in range(experts):
                if not on[d, e] and (best < 0 or loads[e] * replicas[best] > loads[best] * replicas[e]):
                    best = e
            slots[d, c] = best
            used[d] += 1
            on[d, best] = True
            replicas[best] += 1


def fill_for_even_split(layout: Layout, loads: Float64, kept: Layout | None = None) -> Layout:
    """A layout without empty slots, as engines want it, which divide tokens evenly among replicas.

    Under an even split a further replica can do harm, so each slot takes that with which the largest load of a device
    is least.

    Args:
        layout: The layout; returned as it is where no slot is empty.
        loads: float64[experts], tokens.
        kept: The layout in force where moves are limited: empty slots take back what their device held.
    """
    slots = layout.slots.copy()
    replicas = np.bincount(slots[slots >= 0], minlength=layout.experts)
    for device, slot in np.argwhere(slots == EMPTY):
        held = slots[device][slots[device] >= 0]
        best, least = EMPTY, np.inf
        able = np.arange(layout.experts) if kept is None else kept.slots[device][kept.slots[device] >= 0]
        for expert in np.setdiff1d(able, held):
            slots[device, slot] = expert
            replicas[expert] += 1
            largest = np.where(slots >= 0, (loads / replicas)[slots], 0.0).sum(axis=1).max()
            replicas[expert] -= 1
            if largest < least:
                best, least = int(expert), largest
        slots[device, slot] = best
        if best != EMPTY:  # there may be more slots than experts, or than the device held
            replicas[best] += 1
    return Layout(slots, layout.experts) if (layout.slots == EMPTY).any() else layout
