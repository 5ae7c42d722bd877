"""Replicas for tiers of experts, where every replica of an expert takes the same share of its tokens.

Adams' counts make the largest load per replica least, but what counts is the load of a device: often fewer replicas of
the hottest experts and more of the middling ones pack better. So experts are sorted by load into a few tiers, and spare
slots are shifted between tiers, many at first and then fewer, while longest-first packing gets better. Inside a tier
Adams' counts hold. FlashLB of vllm-ascend divides the spare slots over groups of experts too, one group after another
and for good; here any two tiers trade until nothing helps.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.construct.packing import pack, packed_level
from moeplan.solvers.construct.replica_counts import adams_replicas
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.clock import NEVER, time_now
from moeplan.solvers.problem.kernel import kernel

__all__ = ["tiered"]

MOST_PACKINGS = 400
"""Packings tried at most."""

MOST_VISITS = 4_000_000
"""Slots x devices that packings look at, at most: some ten milliseconds."""


@kernel
def tiered(loads: Float64, capacity: Int32, speed: Float64, tiers: int, end: float) -> Int32:
    """A layout for an even split.

    Args:
        loads: float64[experts].
        capacity: int32[devices].
        speed: float64[devices].
        tiers: Number of tiers, at least 1.
        end: Time on the clock of kernels after which no packing is begun.

    Returns:
        int32[devices, largest capacity], -1 for empty slots.
    """
    experts, devices = len(loads), len(capacity)
    order = np.argsort(-loads, kind="mergesort")
    edges = np.zeros(tiers + 1, np.int64)
    for t in range(tiers + 1):
        edges[t] = t * experts // tiers
    replicas = adams_replicas(loads, capacity.sum(), devices)
    spare = np.zeros(tiers, np.int64)
    for t in range(tiers):
        for e in order[edges[t] : edges[t + 1]]:
            spare[t] += replicas[e] - 1
    best = pack(loads, replicas, capacity, speed, NEVER)
    level = packed_level(best, loads, replicas, speed)
    step = max(1, spare.max() // 2)
    left = min(MOST_PACKINGS, MOST_VISITS // (capacity.sum() * devices))
    while step > 0 and left > 0 and time_now() < end:
        better = False
        for giver in range(tiers):
            for taker in range(tiers):
                room = (edges[taker + 1] - edges[taker]) * (devices - 1) - spare[taker]
                shift = min(step, spare[giver], room)
                if giver == taker or shift <= 0 or time_now() >= end:
                    continue
                left -= 1
                spare[giver] -= shift
                spare[taker] += shift
                _count(loads, order, edges, spare, devices, replicas)
                slots = pack(loads, replicas, capacity, speed, NEVER)
                reached = packed_level(slots, loads, replicas, speed)
                if reached < level:
                    best, level, better = slots, reached, True
                else:
                    spare[giver] += shift
                    spare[taker] -= shift
        if not better:
            step //= 2
    return best


@kernel
def _count(loads: Float64, order: Int64, edges: Int64, spare: Int64, most: int, replicas: Int32) -> None:
    """Fill `replicas`, int32[experts]: Adams' counts inside each tier."""
    for t in range(len(spare)):
        members = order[edges[t] : edges[t + 1]]
        if len(members):
            replicas[members] = adams_replicas(loads[members], len(members) + spare[t], most)
