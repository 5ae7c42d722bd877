"""The valid layout nearest to a wanted one: what makes any construction respect a problem's limits.

1. Units get a region each (see `regions`), where limits keep them within one.
2. Pinned replicas; then one replica of every expert that has none, by linear assignment to free slots, so that a valid
   layout is found wherever pairs and slots allow one.
3. Other replicas as wanted, then those in force, then the hottest experts, each where limits and slots leave room.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import EMPTY, placed_in
from moeplan.solvers.problem.limit_kernels import LimitArrays, arrivals_of, arrive, limit_arrays, may_arrive
from moeplan.solvers.problem.limits import Limits, broken
from moeplan.solvers.problem.linear_assignment import linear_assignment
from moeplan.solvers.problem.problem import Problem

__all__ = ["NEVER", "repair", "table"]

NEVER = 1e9
"""Cost of an assignment that is not allowed."""


def repair(problem: Problem, limits: Limits, slots: Int32, *, stay: bool) -> Int32 | None:
    """A layout close to a wanted one that respects the limits.

    Args:
        problem: The problem.
        limits: Its limits, narrowed to one region per unit.
        slots: int32[devices, width], the layout wanted; may break limits, or lack experts.
        stay: Whether replicas in force come before wanted ones.

    Returns:
        int32[devices, width]; None if this way finds none.
    """
    wanted = placed_in(slots, problem.experts)
    first, second = (limits.held, wanted) if stay else (wanted, limits.held)
    placed = first.copy() if _valid(limits, first, problem.capacity) else limits.must.copy()
    loose = np.flatnonzero(~placed.any(axis=0))
    column = np.repeat(np.arange(problem.devices), problem.capacity - placed.sum(axis=1))
    if len(loose) > len(column):
        return None
    if len(loose):
        rank = 2.0 * ~first + ~second + NEVER * ~limits.may
        rows, columns = linear_assignment(rank.T[np.ix_(loose, column)])
        placed[column[columns], loose[rows]] = True
    order = np.argsort(-problem.mean_load, kind="stable")
    wanted_in_turn = np.stack([first, second, np.ones_like(first)])
    _add(placed, wanted_in_turn, order, problem.mean_load, problem.capacity, limit_arrays(limits))
    if broken(limits, placed) is not None:
        return None
    return table(problem, placed)


def _valid(limits: Limits, placed: Bool, capacity: Int32) -> bool:
    """True if a layout, bool[devices, experts], may be as it is."""
    whole = bool(placed.any(axis=0).all() and (placed.sum(axis=1) <= capacity).all())
    return whole and broken(limits, placed) is None


def table(problem: Problem, placed: Bool) -> Int32:
    """The slots, int32[devices, width], of a layout bool[devices, experts]."""
    slots = np.full((problem.devices, max(1, problem.cluster.max_slots)), EMPTY, np.int32)
    device, expert = np.nonzero(placed)
    slots[device, np.arange(len(device)) - np.searchsorted(device, device)] = expert
    return slots


@kernel
def _add(placed: Bool, turns: Bool, order: Int64, loads: Float64, capacity: Int32, limits: LimitArrays) -> None:
    """Add replicas in place, turn by turn, to the devices in rounds: each the one of the largest load per replica.

    Args:
        placed: bool[devices, experts], changed.
        turns: bool[turns, devices, experts], the replicas wanted in each turn.
        order: int64[experts], which comes first where loads per replica are equal.
        loads: float64[experts].
        capacity: int32[devices].
        limits: What the replicas must respect.
    """
    devices, experts = placed.shape
    used = np.zeros(devices, np.int64)
    replicas = np.zeros(experts, np.int64)
    for d in range(devices):
        for e in range(experts):
            used[d] += placed[d, e]
            replicas[e] += placed[d, e]
    arrivals = arrivals_of(placed, limits)
    for wanted in turns:
        again = True
        while again:
            again = False
            for d in range(devices):
                if used[d] == capacity[d]:
                    continue
                best = -1
                for e in order:
                    if placed[d, e] or not wanted[d, e] or not limits.may[d, e] or replicas[e] >= limits.most[e]:
                        continue
                    if not may_arrive(d, e, limits, arrivals):
                        continue
                    if best < 0 or loads[e] * replicas[best] > loads[best] * replicas[e]:
                        best = e
                if best >= 0:
                    placed[d, best] = True
                    used[d] += 1
                    replicas[best] += 1
                    arrive(d, best, limits, arrivals)
                    again = True
