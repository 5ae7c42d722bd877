"""SYMI (SwiftMoE): replicas in proportion to the last popularity, laid out in order (arXiv 2504.19925, algorithm 1).

The optimizer state is sharded over all ranks whatever the layout, so a new layout each iteration moves no state. The
original loops for ever when there are more experts than slots, divides by zero without any load, and puts neighbouring
replicas of an expert on one device; here an expert's replicas go to consecutive devices instead, which keeps the
contiguous range of ranks that the paper's replica groups rely on.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule


@policy("symi", source="SYMI / SwiftMoE, arXiv 2504.19925", split=SplitRule.EVEN)
def symi(problem: Problem, parameters: SolveParameters) -> Layout:
    """Replicas proportional to the popularity of experts, in their order over consecutive devices.

    The paper has that of the last iteration. Scenarios of a forecast are drawn around recent ones: their mean counts.
    """
    replicas = proportional(problem.mean_load, int(problem.capacity.sum()), problem.devices)
    return Layout(_in_order(replicas, problem.capacity, problem.cluster.max_slots), problem.experts)


@kernel
def _in_order(replicas: Int32, capacity: Int32, width: int) -> Int32:
    """int32[devices, width]: replicas in the order of their experts over consecutive devices with room for them."""
    devices = len(capacity)
    slots = np.full((devices, width), -1, np.int32)
    used = np.zeros(devices, np.int32)
    device = 0
    for expert in range(len(replicas)):
        for _ in range(replicas[expert]):
            # The next device in turn that has room and does not hold the expert.
            for step in range(devices):
                d = (device + step) % devices
                if used[d] < capacity[d] and not (slots[d] == expert).any():
                    slots[d, used[d]] = expert
                    used[d] += 1
                    device = d + 1
                    break
    return slots


def proportional(popularity: Float64 | Int64, slots: int, most: int) -> Int32:
    """Algorithm 1: round ``popularity / sum * slots`` to whole replicas, at least 1 and at most `most` each.

    Args:
        popularity: [experts]; without any load all experts count the same.
        slots: Replicas to hand out, at least one per expert.
        most: Number of devices.

    Returns:
        int32[experts], summing to ``min(slots, experts * most)``.
    """
    experts = len(popularity)
    total = popularity.sum()
    goal = popularity / total * slots if total else np.full(experts, slots / experts)
    count = np.minimum(np.floor(np.maximum(goal, 1)), most).astype(np.int32)
    off = count - goal
    slots = min(slots, experts * most)
    while count.sum() > slots:
        e = int(np.where(count > 1, off, -np.inf).argmax())
        count[e] -= 1
        off[e] -= 1
    while count.sum() < slots:
        e = int(np.where(count < most, off, np.inf).argmin())
        count[e] += 1
        off[e] += 1
    return count
