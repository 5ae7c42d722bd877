"""Packing replicas of even shares onto devices: longest processing time first, then swaps."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.kernel import kernel

__all__ = ["pack", "packed_level", "swap"]


@kernel
def pack(loads: Float64, replicas: Int32, capacity: Int32, speed: Float64, end: float) -> Int32:
    """Place replicas, heaviest share first, each on the device it fills least, never twice on one device.

    This is the packing step of EPLB with the distinctness that EPLB lacks. Where every device with room already holds
    the expert, one with room takes over a replica of another device, which then takes this one; if none can, replicas
    beyond the first are left out.

    Args:
        loads: float64[experts].
        replicas: int32[experts], each at most the number of devices, together at most all slots.
        capacity: int32[devices].
        speed: float64[devices].
        end: Time on the clock of kernels after which experts are left out.

    Returns:
        int32[devices, largest capacity], -1 for empty slots.
    """
    devices = len(capacity)
    slots = np.full((devices, max(1, capacity.max())), -1, np.int32)
    used = np.zeros(devices, np.int32)
    load = np.zeros(devices)
    on = np.zeros((devices, len(loads)), np.bool_)
    for e in np.argsort(-loads / replicas, kind="mergesort"):
        if time_now() >= end:
            break
        share = loads[e] / replicas[e]
        for _ in range(replicas[e]):
            best, least = -1, np.inf
            for d in range(devices):
                if used[d] == capacity[d]:
                    continue
                level = (load[d] + share) / speed[d]
                if (best < 0 or level < least) and not on[d, e]:
                    best, least = d, level
            if best < 0:
                best = _make_room(e, capacity, slots, used, on, load, loads, replicas)
            if best < 0:
                break
            slots[best, used[best]] = e
            used[best] += 1
            on[best, e] = True
            load[best] += share
    return slots


@kernel
def _make_room(
    e: int,
    capacity: Int32,
    slots: Int32,
    used: Int32,
    on: Bool,
    load: Float64,
    loads: Float64,
    replicas: Int32,
) -> int:
    """Move one replica from a full device without `e` to one with room, and return the former; -1 if none can."""
    for d in range(len(used)):
        if on[d, e]:
            continue
        for target in range(len(used)):
            if used[target] == capacity[target]:
                continue
            for c in range(used[d]):
                x = slots[d, c]
                if not on[target, x]:
                    used[d] -= 1
                    slots[d, c] = slots[d, used[d]]
                    slots[d, used[d]] = -1
                    slots[target, used[target]] = x
                    used[target] += 1
                    on[d, x] = False
                    on[target, x] = True
                    load[d] -= loads[x] / replicas[x]
                    load[target] += loads[x] / replicas[x]
                    return d
    return -1


@kernel
def packed_level(slots: Int32, loads: Float64, replicas: Int32, speed: Float64) -> float:
    """The largest load per speed; infinite where a replica found no place, for then shares are not what they seem."""
    largest, placed = 0.0, 0
    for d in range(len(slots)):
        load = 0.0
        for e in slots[d]:
            if e >= 0:
                load += loads[e] / replicas[e]
                placed += 1
        largest = max(largest, load / speed[d])
    return largest if placed == replicas.sum() else np.inf


@kernel
def swap(slots: Int32, share: Float64, speed: Float64, rounds: int, end: float) -> None:
    """Exchange replicas between the most loaded device and any other while that lowers the larger of the two.

    Args:
        slots: int32[devices, width], improved in place.
        share: float64[experts], load of each replica.
        speed: float64[devices].
        rounds: Most exchanges.
        end: Time on the clock of kernels to stop at.
    """
    devices, width = slots.shape
    experts = len(share)
    if time_now() >= end:  # before a table of devices and experts is made
        return
    load = np.zeros(devices)
    on = np.zeros((devices, experts), np.bool_)
    for d in range(devices):
        for c in range(width):
            if slots[d, c] >= 0:
                load[d] += share[slots[d, c]]
                on[d, slots[d, c]] = True
    level = load / speed
    for _ in range(rounds):
        if time_now() >= end:
            return
        top, cold = int(level.argmax()), int(level.argmin())
        highest = level[top] * (1 - 1e-12)
        bound, _, _ = _best_exchange(slots, on, load, share, speed, top, cold, highest)
        best, best_d, best_c, best_k = highest, -1, 0, 0
        for d in range(devices):
            # Not even a perfect exchange with this device would be as good as the one with the coldest.
            if d == top or load[top] + load[d] > bound * (1 + 1e-12) * (speed[top] + speed[d]):
                continue
            after, c, k = _best_exchange(slots, on, load, share, speed, top, d, best)
            if after < best:
                best, best_d, best_c, best_k = after, d, c, k
        if best_d < 0:
            return
        a, b = slots[top, best_c], slots[best_d, best_k]
        slots[top, best_c], slots[best_d, best_k] = b, a
        on[top, a], on[top, b], on[best_d, b], on[best_d, a] = False, True, False, True
        load[top] -= share[a] - share[b]
        load[best_d] += share[a] - share[b]
        level[top], level[best_d] = load[top] / speed[top], load[best_d] / speed[best_d]


@kernel
def _best_exchange(
    slots: Int32, on: Bool, load: Float64, share: Float64, speed: Float64, top: int, d: int, best: float
) -> tuple[float, int, int]:
    """The larger level of two devices after their best exchange, if below `best`, and the slots of `top` and `d`."""
    width = slots.shape[1]
    best_c, best_k = -1, -1
    for c in range(width):
        a = slots[top, c]
        if a < 0:
            continue
        for k in range(width):
            b = slots[d, k]
            if b < 0:
                continue
            change = share[a] - share[b]
            if change <= 0:
                continue
            after = max((load[top] - change) / speed[top], (load[d] + change) / speed[d])
            if after < best and not on[d, a] and not on[top, b]:
                best, best_c, best_k = after, c, k
    return best, best_c, best_k
