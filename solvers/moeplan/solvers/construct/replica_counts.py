"""Replica counts: Adams' divisor method, the replica step of EPLB."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.kernel import kernel

__all__ = ["adams_replicas"]


@kernel
def adams_replicas(loads: Float64, slots: int, most: int) -> Int32:
    """Give every expert one replica, then each further slot to the largest load per replica.

    This minimises ``max w_e / r_e`` (Balinski and Young; DeepSeek EPLB `replicate_experts`). Ties go to the lower id.

    Args:
        loads: float64[experts].
        slots: Replicas to hand out, at least one per expert.
        most: Most replicas of one expert: the number of devices.

    Returns:
        int32[experts], summing to ``min(slots, experts * most)``.
    """
    experts = len(loads)
    replicas = np.ones(experts, np.int32)
    # A binary heap of experts by descending share, ties by ascending id.
    share = loads.copy()
    heap = np.argsort(-loads, kind="mergesort")
    size = experts
    left = slots - experts
    while left > 0 and size > 0:
        e = heap[0]
        if replicas[e] >= most:
            size -= 1
            heap[0] = heap[size]
        else:
            replicas[e] += 1
            share[e] = loads[e] / replicas[e]
            left -= 1
        i = 0
        while True:
            child = 2 * i + 1
            if child >= size:
                break
            right = child + 1
            if right < size and _before(heap[right], heap[child], share):
                child = right
            if not _before(heap[child], heap[i], share):
                break
            heap[i], heap[child] = heap[child], heap[i]
            i = child
    return replicas


@kernel
def _before(a: int, b: int, share: Float64) -> bool:
    return share[a] > share[b] or (share[a] == share[b] and a < b)
