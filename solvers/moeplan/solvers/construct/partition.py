"""Few spare slots: partition devices and experts into groups, each balanced perfectly by a sliding window.

Theorem. With R < D - 1 spare slots the optimum over all layouts and splits is the best partition of the D devices and E
experts into groups of t_j devices and at most t_j (C - 1) + 1 experts, judged by max_j W_j / t_j; every such partition
has at least D - R groups. (Cancel cycles in the support of an optimal split: what remains is a forest, and each of its
trees is such a group.) The problem is NP-hard, so groups are filled greedily and improved by exchanges of single
experts, then of pairs: their sums lie far closer together.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.construct.sliding_window import sliding_window
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.kernel import kernel

__all__ = ["grouping"]

MOST_PAIRED = 64
"""Experts of a group beyond which pairs are not exchanged: there are single ones enough, and pairs too many."""


@kernel
def grouping(loads: Float64, devices: int, width: int, rounds: int, end: float) -> Int32:
    """Place all experts on equal devices with ``experts > devices * (width - 1) + 1`` and at least one slot each.

    Args:
        loads: float64[experts].
        devices: Number of equal devices.
        width: Slots of each.
        rounds: Most exchanges between groups.
        end: Time on the clock of kernels after which none is made.

    Returns:
        int32[devices, width], -1 for slots that were not needed.
    """
    experts = len(loads)
    groups = experts - devices * (width - 1)  # D - R
    size = np.full(groups, devices // groups, np.int64)
    size[: devices % groups] += 1
    room = size * (width - 1) + 1
    load = np.zeros(groups)
    used = np.zeros(groups, np.int64)
    group = np.empty(experts, np.int64)
    for e in np.argsort(-loads, kind="mergesort"):
        best = -1
        for j in range(groups):
            if used[j] < room[j] and (
                best < 0 or (load[j] + loads[e]) / size[j] < (load[best] + loads[e]) / size[best]
            ):
                best = j
        group[e] = best
        used[best] += 1
        load[best] += loads[e]
    for _ in range(rounds):
        if time_now() >= end:
            break
        if not _exchange(loads, group, load, size) and not _exchange_pairs(loads, group, load, size):
            break
    slots = np.full((devices, width), -1, np.int32)
    start = 0
    for j in range(groups):
        members = np.flatnonzero(group == j)
        stop = start + size[j]
        slots[start:stop] = sliding_window(loads, members, size[j], width)
        start = stop
    return slots


@kernel
def _heaviest(load: Float64, size: Int64) -> int:
    """The group with the largest load per device."""
    top = 0
    for j in range(len(size)):
        if load[j] / size[j] > load[top] / size[top]:
            top = j
    return top


@kernel
def _exchange(loads: Float64, group: Int64, load: Float64, size: Int64) -> bool:
    """Swap one expert of the heaviest group with the one elsewhere that lowers the larger of the two most."""
    top = _heaviest(load, size)
    best = load[top] / size[top] * (1 - 1e-12)
    best_a, best_b = -1, -1
    for a in range(len(loads)):
        if group[a] != top:
            continue
        for b in range(len(loads)):
            j = group[b]
            change = loads[a] - loads[b]
            if j == top or change <= 0:
                continue
            after = max((load[top] - change) / size[top], (load[j] + change) / size[j])
            if after < best:
                best, best_a, best_b = after, a, b
    if best_a < 0:
        return False
    j = group[best_b]
    change = loads[best_a] - loads[best_b]
    load[top] -= change
    load[j] += change
    group[best_a], group[best_b] = j, top
    return True


@kernel
def _exchange_pairs(loads: Float64, group: Int64, load: Float64, size: Int64) -> bool:
    """Swap two experts of the heaviest group with the two of another that lower the larger of the two most."""
    top = _heaviest(load, size)
    if np.sum(group == top) > MOST_PAIRED:
        return False
    given, given_sum = _pairs(loads, np.flatnonzero(group == top))
    best = load[top] / size[top] * (1 - 1e-12)
    best_given, best_taken = np.zeros(2, np.int64), np.zeros(2, np.int64)
    best_group, best_change = -1, 0.0
    for j in range(len(size)):
        if j == top or np.sum(group == j) > MOST_PAIRED:
            continue
        taken, taken_sum = _pairs(loads, np.flatnonzero(group == j))
        level = (load[top] * size[j] - load[j] * size[top]) / (size[top] + size[j])  # change after which both are equal
        place = np.searchsorted(taken_sum, given_sum - level)
        for a in range(len(given)):
            for b in range(max(0, place[a] - 1), min(len(taken), place[a] + 1)):
                change = given_sum[a] - taken_sum[b]
                after = max((load[top] - change) / size[top], (load[j] + change) / size[j])
                if after < best:
                    best, best_group, best_change = after, j, change
                    best_given, best_taken = given[a], taken[b]
    if best_group < 0:
        return False
    load[top] -= best_change
    load[best_group] += best_change
    group[best_given] = best_group
    group[best_taken] = top
    return True


@kernel
def _pairs(loads: Float64, members: Int64) -> tuple[Int64, Float64]:
    """int64[pairs, 2] and float64[pairs]: all pairs of `members` in ascending order of their load."""
    count = len(members) * (len(members) - 1) // 2
    pairs, total = np.empty((count, 2), np.int64), np.empty(count)
    i = 0
    for a in range(len(members)):
        for b in range(a):
            pairs[i, 0], pairs[i, 1] = members[a], members[b]
            total[i] = loads[members[a]] + loads[members[b]]
            i += 1
    order = np.argsort(total, kind="mergesort")
    return pairs[order], total[order]
