"""The valid layout nearest to a wanted one: what makes any construction respect a problem's limits.

1. Units get a region each (`regions`), where limits keep them within one.
2. Pinned replicas; then one replica of every expert that has none, by linear assignment to free slots, so that a valid
   layout is found wherever pairs and slots allow one.
3. Other replicas as wanted, then those in force, then the hottest experts, each where limits and slots leave room.
"""

from __future__ import annotations

import time
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


def narrowings(problem: Problem, wanted: Bool, deadline: float | None = None) -> Iterator[Limits]:
    """The limits with a region for every unit: near a wanted layout, bool[devices, experts], then balanced.

    Balancing ends at the deadline, a time on `time.perf_counter`.
    """
    limits = problem.limits
    if limits.regions == 1:
        yield limits
        return
    from scipy.optimize import linear_sum_assignment

    units = int(limits.unit.max()) + 1
    size = problem.experts // units
    near = _by_unit(_in_regions(wanted, limits), limits.unit)  # replicas of each unit in each region
    able = _by_unit(_in_regions(limits.may, limits) > 0, limits.unit) == size
    pinned = _by_unit(_in_regions(limits.must, limits), limits.unit) > 0
    able &= pinned | ~pinned.any(axis=1, keepdims=True)
    open_to = min(limits.max_arrivals, 1) * np.bincount(limits.region, np.minimum(limits.device_arrivals, 1))
    held = _by_unit(_in_regions(limits.held, limits) > 0, limits.unit) == size
    able &= held | (open_to > 0)  # where nothing may arrive, the unit is there already
    room = np.bincount(limits.region, problem.capacity).astype(np.int64) // size
    speed = np.bincount(limits.region, problem.cluster.speed * (problem.capacity > 0)).astype(np.float64)
    column = np.repeat(np.arange(limits.regions), np.minimum(room, units))
    rows, columns = linear_sum_assignment((NEVER * ~able - near)[:, column])
    region = np.empty(units, np.int32)
    region[rows] = column[columns]
    if not able[np.arange(units), region].all():
        return
    yield limits.narrowed(region)
    loads: Float64 = _by_unit(problem.loads, limits.unit).T.astype(np.float64)  # [scenarios, units]
    loads /= np.maximum(loads.sum(axis=1, keepdims=True) / speed.sum(), 1e-300)
    balanced = region.astype(np.int64)
    load: Float64 = loads @ (balanced[:, None] == np.arange(limits.regions))
    used = np.bincount(balanced, minlength=limits.regions).astype(np.int64)
    for _ in range(4 * units):
        late = deadline is not None and time.perf_counter() >= deadline
        if late or not _balance(balanced, load, used, loads, speed, room, able, problem.demand.weights):
            break
    if not np.array_equal(balanced, region):
        yield limits.narrowed(balanced.astype(np.int32))


def _in_regions(pairs: Bool, limits: Limits) -> Int64:
    """int64[regions, experts]: how many devices of each region are in pairs, bool[devices, experts]."""
    return np.stack([pairs[limits.region == r].sum(axis=0) for r in range(limits.regions)])


def _by_unit(values: Int64 | Bool, unit: Int32) -> Int64:
    """int64[units, rows]: what the experts of each unit, all of equal size, have together in [rows, experts]."""
    order = np.argsort(unit, kind="stable")
    summed: Int64 = values[:, order].reshape(len(values), int(unit.max()) + 1, -1).sum(axis=2)
    return summed.T


@kernel
def _balance(
    region: Int64, load: Float64, used: Int64, loads: Float64, speed: Float64, room: Int64, able: Bool, weights: Float64
) -> bool:
    """Take the best step that relieves the hottest region for which there is one; whether there was any.

    A step moves a unit of that region to another, or exchanges it with one there, and lowers the mean over scenarios of
    the largest load per speed. What leaves the largest as it is must lower the sum of squares, so plateaus are crossed
    and the steps come to an end.

    Args:
        region: int64[units], changed.
        load: float64[scenarios, regions], changed with it.
        used: int64[regions], units of each; changed with it.
        loads: float64[scenarios, units].
        speed: float64[regions].
        room: int64[regions], units that fit.
        able: bool[units, regions].
        weights: float64[scenarios].
    """
    scenarios, units = loads.shape
    regions = len(speed)
    heat = np.zeros(regions)
    squares = np.zeros(scenarios)
    top = np.zeros((scenarios, 3), np.int64)  # the hottest regions of each scenario: a step touches two
    now = 0.0
    for s in range(scenarios):
        level = load[s] / speed
        order = np.argsort(-level, kind="mergesort")
        for i in range(3):
            top[s, i] = order[min(i, regions - 1)]
        heat[order[0]] += weights[s] * level[order[0]]
        squares[s] = (level * level).sum()
        now += weights[s] * (level[order[0]] + 1e-3 * squares[s] / regions)
    for r in np.argsort(-heat, kind="mergesort"):
        if heat[r] == 0:
            return False
        best, best_u, best_v, best_to = now * (1 - 1e-12), -1, -1, -1
        for u in range(units):
            if region[u] != r:
                continue
            for other in range(units + regions):  # an exchange with a unit, or a move to a region
                if other < units:
                    to = region[other]
                    if to == r or not able[u, to] or not able[other, r]:
                        continue
                else:
                    to = other - units
                    if to == r or used[to] == room[to] or not able[u, to]:
                        continue
                value = 0.0
                for s in range(scenarios):
                    change = loads[s, u] - (loads[s, other] if other < units else 0.0)
                    here, there = (load[s, r] - change) / speed[r], (load[s, to] + change) / speed[to]
                    level = max(here, there)
                    for t in top[s]:
                        if t != r and t != to:
                            level = max(level, load[s, t] / speed[t])
                            break
                    before = (load[s, r] / speed[r]) ** 2 + (load[s, to] / speed[to]) ** 2
                    value += weights[s] * (level + 1e-3 * (squares[s] - before + here**2 + there**2) / regions)
                    if value >= best:
                        break
                if value < best:
                    best, best_u, best_v, best_to = value, u, other, to
        if best_u < 0:
            continue
        region[best_u] = best_to
        load[:, r] -= loads[:, best_u]
        load[:, best_to] += loads[:, best_u]
        if best_v < units:
            region[best_v] = r
            load[:, best_to] -= loads[:, best_v]
            load[:, r] += loads[:, best_v]
        else:
            used[r] -= 1
            used[best_to] += 1
        return True
    return False
