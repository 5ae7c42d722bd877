"""Layouts with other numbers of replicas, where every replica of an expert takes the same share of its tokens.

One more replica of an expert changes what every device that holds it computes, so a local search crosses from one
choice of these numbers to a better one only by layouts that are far worse. Here the numbers themselves are searched: a
replica or a few go from one expert to another, and all are packed anew, longest first and then by swaps, which takes
about as long as scoring a candidate for each slot. What comes out is a start for local search.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.construct.packing import pack, packed_level, swap
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.search.local import Burst
from moeplan.solvers.search.random import next_random, seeded

__all__ = ["recounted"]

DRAWS = 50
"""Pairs of experts drawn at most, until one may give a replica to the other."""

ROUNDS = 100
"""Most swaps of a packing."""


@kernel
def recounted(slots: Int32, loads: Float64, capacity: Int32, speed: Float64, burst: Burst) -> Int32:
    """The best packing of a walk over numbers of replicas, from those of a layout, each step no worse than the last.

    Args:
        slots: int32[devices, width], the layout, -1 for empty slots.
        loads: float64[experts].
        capacity: int32[devices].
        speed: float64[devices].
        burst: Its steps are packings; price and target do not count.

    Returns:
        int32[devices, largest capacity], as good as the layout or not; the layout itself where nothing could be packed.
    """
    flat = slots.reshape(-1)
    replicas = np.zeros(len(loads), np.int32)
    for e in flat:
        if e >= 0:
            replicas[e] += 1
    most = packed_level(slots, loads, replicas, speed) * speed.max()
    state = seeded(burst.seed)
    best, level, last = slots.copy(), np.inf, np.inf
    for _ in range(burst.steps):
        if time_now() >= burst.end:
            break
        trial = replicas.copy()
        if not _shift(trial, flat, loads, most, len(speed), state):
            break
        packed = pack(loads, trial, capacity, speed, burst.end)
        swap(packed, loads / trial, speed, ROUNDS, burst.end)
        reached = packed_level(packed, loads, trial, speed)
        if reached < level:
            best, level = packed, reached
        if reached <= last:
            replicas, last = trial, reached
    return best


@inner_kernel
def _shift(replicas: Int32, flat: Int32, loads: Float64, most: float, devices: int, state: Int64) -> bool:
    """Let experts give a replica to another, once or a few times; False if none can.

    None gives one up whose others would then have `most` or more each: no device could hold them in a better layout.
    """
    shifted = False
    for _ in range(DRAWS):
        giver, taker = flat[next_random(state) % len(flat)], next_random(state) % len(replicas)
        if giver < 0 or giver == taker or replicas[giver] < 2 or replicas[taker] >= devices:
            continue
        if loads[giver] >= most * (replicas[giver] - 1):
            continue
        replicas[giver] -= 1
        replicas[taker] += 1
        shifted = True
        if next_random(state) % 2 == 0:
            break
    return shifted
