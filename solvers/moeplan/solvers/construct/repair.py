"""The valid layout nearest to a wanted one: what makes any construction respect a problem's limits.

1. Units get a region each (`regions`), where limits keep them within one.
2. Pinned replicas; then one replica of every expert that has none, by linear assignment to free slots, so that a valid
   layout is found wherever pairs and slots allow one.
3. Other replicas as wanted, then those in force, then the hottest experts, each where limits and slots leave room.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import EMPTY, placed_in
from moeplan.solvers.problem.limit_kernels import LimitArrays, arrivals_of, arrive, limit_arrays, may_arrive
from moeplan.solvers.problem.limits import Limits, broken
from moeplan.solvers.problem.problem import Problem

__all__ = ["narrowings", "repair", "table"]

NEVER = 1e9
"""Cost of a pair that is not allowed."""


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
    from scipy.optimize import linear_sum_assignment  # takes half a second to import

    wanted = placed_in(slots, problem.experts)
    first, second = (limits.held, wanted) if stay else (wanted, limits.held)
    placed = limits.must.copy()
    loose = np.flatnonzero(~placed.any(axis=0))
    column = np.repeat(np.arange(problem.devices), problem.capacity - placed.sum(axis=1))
    if len(loose) > len(column):
        return None
    if len(loose):
        rank = 2.0 * ~first + ~second + NEVER * ~limits.may
        rows, columns = linear_sum_assignment(rank[column][:, loose].T)
        placed[column[columns], loose[rows]] = True
    order = np.argsort(-problem.mean_load, kind="stable")
    wanted_in_turn = np.stack([first, second, np.ones_like(first)])
    _add(placed, wanted_in_turn, order, problem.mean_load, problem.capacity, limit_arrays(limits))
    if broken(limits, placed) is not None:
        return None
    return table(problem, placed)


def table(problem: Problem, placed: Bool) -> Int32:
    """The slots, int32[devices, width], of a layout bool[devices, experts]."""
    slots = np.full((problem.devices, max(1, problem.cluster.max_slots)), EMPTY, np.int32)
    for d in range(problem.devices):
        experts = np.flatnonzero(placed[d])
        slots[d, : len(experts)] = experts
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


def narrowings(problem: Problem, wanted: Bool) -> Iterator[Limits]:
    """The limits with a region for every unit: near a wanted layout, bool[devices, experts], then balanced."""
    limits = problem.limits
    if limits.regions == 1:
        yield limits
        return
    from scipy.optimize import linear_sum_assignment

    units = int(limits.unit.max()) + 1
    size = problem.experts // units
    member = np.arange(limits.regions)[:, None] == limits.region  # bool[regions, devices]
    of_unit = np.arange(units)[:, None] == limits.unit  # bool[units, experts]
    near = of_unit.astype(float) @ (member.astype(float) @ wanted).T  # replicas of each unit in each region
    able = of_unit.astype(float) @ (member.astype(float) @ limits.may > 0).T == size
    pinned = of_unit.astype(float) @ (member.astype(float) @ limits.must).T
    able &= (pinned > 0) | ~(pinned > 0).any(axis=1, keepdims=True)
    room = np.bincount(limits.region, problem.capacity).astype(np.int64) // size
    speed = np.bincount(limits.region, problem.cluster.speed * (problem.capacity > 0)).astype(np.float64)
    column = np.repeat(np.arange(limits.regions), np.minimum(room, units))
    rows, columns = linear_sum_assignment((NEVER * ~able - near)[:, column])
    region = np.empty(units, np.int32)
    region[rows] = column[columns]
    if not able[np.arange(units), region].all():
        return
    yield limits.narrowed(region)
    loads: Float64 = (problem.loads @ of_unit.T).astype(np.float64)  # [scenarios, units]
    loads /= np.maximum(loads.sum(axis=1, keepdims=True) / speed.sum(), 1e-300)
    balanced = _balance(region.astype(np.int64), loads, speed, room, able, problem.demand.weights)
    if not np.array_equal(balanced, region):
        yield limits.narrowed(balanced.astype(np.int32))


@kernel
def _balance(region: Int64, loads: Float64, speed: Float64, room: Int64, able: Bool, weights: Float64) -> Int64:
    """Move and exchange units between regions while that lowers the mean over scenarios of the largest load per speed.

    Steps that leave the largest as it is must lower the sum of squares, so plateaus are crossed and the search ends.
    """
    region = region.copy()
    scenarios, units = loads.shape
    regions = len(speed)
    load = np.zeros((scenarios, regions))
    used = np.zeros(regions, np.int64)
    for u in range(units):
        used[region[u]] += 1
        load[:, region[u]] += loads[:, u]
    trial = np.empty(regions)
    for _ in range(4 * units):
        best, best_u, best_v, best_r = 1e300, -1, -1, -1
        now = 0.0
        for s in range(scenarios):
            level = load[s] / speed
            now += weights[s] * (level.max() + 1e-3 * (level * level).sum() / regions)
        for u in range(units):
            for other in range(units + regions):  # an exchange with a unit, or a move to a region
                if other < units:
                    r = region[other]
                    if other <= u or r == region[u] or not able[u, r] or not able[other, region[u]]:
                        continue
                else:
                    r = other - units
                    if r == region[u] or used[r] == room[r] or not able[u, r]:
                        continue
                value = 0.0
                for s in range(scenarios):
                    change = loads[s, u] - (loads[s, other] if other < units else 0.0)
                    trial[:] = load[s]
                    trial[region[u]] -= change
                    trial[r] += change
                    trial /= speed
                    value += weights[s] * (trial.max() + 1e-3 * (trial * trial).sum() / regions)
                if value < best:
                    best, best_u, best_v, best_r = value, u, other, r
        if best >= now * (1 - 1e-12) or best_u < 0:
            break
        old = region[best_u]
        load[:, old] -= loads[:, best_u]
        load[:, best_r] += loads[:, best_u]
        region[best_u] = best_r
        if best_v < units:
            load[:, best_r] -= loads[:, best_v]
            load[:, old] += loads[:, best_v]
            region[best_v] = old
        else:
            used[old] -= 1
            used[best_r] += 1
    return region
