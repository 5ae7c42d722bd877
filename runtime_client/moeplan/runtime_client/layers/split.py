"""How the tokens of an expert are divided among its replicas: the quota of each slot, and who sends what to whom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.split.flow import optimal_quota

__all__ = ["Split", "even_split", "optimal_split", "rank_flow"]

Split = Callable[[Int32, Int64], Int64]
"""From a layout, slots int32[devices, width], and loads int64[experts] to tokens per slot, int64[devices, width].

It runs on every rank with the same arguments and must give the same answer there."""


def optimal_split(speed: Float64) -> Split:
    """The split of least largest load per speed.

    Args:
        speed: float64[devices], relative tokens per second.
    """

    def split(slots: Int32, loads: Int64) -> Int64:
        quota: Int64 = optimal_quota(slots, loads[np.newaxis], speed)[0][0]
        return quota

    return split


@kernel
def even_split(slots: Int32, loads: Int64) -> Int64:
    """Divide each expert's tokens evenly among its replicas; earlier devices take what is left over.

    Args:
        slots: int32[devices, width], the layout.
        loads: int64[experts], tokens of each expert from all sources.

    Returns:
        int64[devices, width], tokens of each slot; 0 in an empty one.
    """
    devices, width = slots.shape
    replicas = np.zeros(len(loads), np.int64)
    for d in range(devices):
        for c in range(width):
            if slots[d, c] >= 0:
                replicas[slots[d, c]] += 1
    quota = np.zeros((devices, width), np.int64)
    given = np.zeros(len(loads), np.int64)
    for d in range(devices):
        for c in range(width):
            e = slots[d, c]
            if e >= 0:
                quota[d, c] = loads[e] // replicas[e] + (1 if given[e] < loads[e] % replicas[e] else 0)
                given[e] += 1
    return quota


@kernel
def rank_flow(slots: Int32, quota: Int64, counts: Int64, rank: int) -> tuple[Int64, Int64]:
    """What one rank sends to each slot, and receives for each of its own slots from each source.

    Tokens stay on their own device as far as the quota there allows; the rest of each expert's tokens go to the rest of
    its quotas in order of source and device. Every rank computes the same assignment from the same arguments.

    Args:
        slots: int32[devices, width], the layout.
        quota: int64[devices, width], tokens of each slot, each expert's adding up to its column in `counts`.
        counts: int64[devices, experts], tokens of each source.
        rank: The rank whose part is returned.

    Returns:
        (send, receive): int64[devices, width] tokens from `rank` to each slot, and int64[devices, width] tokens from
        each source to the slots of `rank`.
    """
    devices, width = slots.shape
    experts = counts.shape[1]
    send = np.zeros((devices, width), np.int64)
    receive = np.zeros((devices, width), np.int64)
    open_tokens = counts.copy()
    open_quota = quota.copy()
    for d in range(devices):
        for c in range(width):
            e = slots[d, c]
            if e < 0:
                continue
            stay = min(open_tokens[d, e], open_quota[d, c])
            open_tokens[d, e] -= stay
            open_quota[d, c] -= stay
            if d == rank:
                send[d, c] += stay
                receive[d, c] += stay
    # Per expert, the source that still has tokens: the slots are visited in order, so it only moves forward.
    source = np.zeros(experts, np.int64)
    for d in range(devices):
        for c in range(width):
            e = slots[d, c]
            if e < 0:
                continue
            while open_quota[d, c] > 0:
                i = source[e]
                amount = min(open_tokens[i, e], open_quota[d, c])
                open_tokens[i, e] -= amount
                open_quota[d, c] -= amount
                if i == rank:
                    send[d, c] += amount
                if d == rank:
                    receive[i, c] += amount
                if open_tokens[i, e] == 0 and open_quota[d, c] > 0:
                    source[e] += 1
    return send, receive
