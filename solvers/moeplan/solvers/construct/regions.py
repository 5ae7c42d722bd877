"""Which region each unit of experts gets, where limits keep the replicas of a unit within one.

A split cannot carry load from one region to another, so regions should have tokens by their speed in every scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from moeplan.solvers.construct.repair import NEVER
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.clock import end_of, time_now
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.limits import Limits
from moeplan.solvers.problem.linear_assignment import linear_assignment
from moeplan.solvers.problem.problem import Problem

__all__ = ["divisions", "narrowings"]

MOST_STEPS = 4
"""Steps towards balance, for each unit."""


def narrowings(problem: Problem, wanted: Bool, deadline: Callable[[], float | None] = lambda: None) -> Iterator[Limits]:
    """The limits with a region for every unit: near a wanted layout, bool[devices, experts], then balanced.

    Balancing ends at the deadline, a time on `time.perf_counter` asked for when it begins: how long it takes to judge
    a layout is known then. Where arrivals are limited, it takes half of them.
    """
    limits = problem.limits
    if limits.regions == 1:
        yield limits
        return
    near = _by_unit(_in_regions(wanted, limits), limits.unit)  # replicas of each unit in each region
    able, room = _able(limits), _room(problem)
    column = np.repeat(np.arange(limits.regions), np.minimum(room, len(able)))
    rows, columns = linear_assignment((NEVER * ~able - near)[:, column])
    region = np.empty(len(able), np.int64)
    region[rows] = column[columns]
    if not able[np.arange(len(able)), region].all():
        return
    yield limits.narrowed(region.astype(np.int32))
    balanced = region.copy()
    measure, weights, end = _measure(problem), problem.demand.weights, end_of(deadline())
    most_steps = MOST_STEPS * len(able)
    if limits.moves_limited:
        held = able & (_by_unit(_in_regions(limits.held, limits) > 0, limits.unit) == problem.experts // len(able))
        held[np.arange(len(able)), region] = True
        _balance(balanced, *measure, room, held, weights, most_steps, end)  # which needs no arrivals
        arrivals = min(limits.max_arrivals, sum(limits.device_arrivals.tolist()))
        most_steps = min(most_steps, arrivals * len(able) // (4 * problem.experts))  # of two units at most
    _balance(balanced, *measure, room, able, weights, most_steps, end)
    if not np.array_equal(balanced, region):
        yield limits.narrowed(balanced.astype(np.int32))


def divisions(problem: Problem, deadline: float | None = None) -> Iterator[Int32]:
    """Regions of all units, int32[units], balanced from scratch, until the deadline, a time on `time.perf_counter`.

    First with spare slots left by the number of devices, which balance a region in itself; then with half of them
    taken and with all, as far as it helps: where experts are alike, only their number makes the tokens of a region.
    """
    able, room = _able(problem.limits), _room(problem)
    measure = _measure(problem)
    devices = np.bincount(problem.limits.region, problem.capacity > 0)
    spare = (room.sum() - len(able)) * devices / devices.sum()
    region = before = _deal(*measure, np.ceil(room - spare).astype(np.int64), able)
    if (region < 0).any():
        return
    for taken in (0.0, 0.5, 1.0):
        region = before.copy()
        most = np.ceil(room - (1 - taken) * spare).astype(np.int64)
        _balance(region, *measure, most, able, problem.demand.weights, MOST_STEPS * len(able), end_of(deadline))
        if not taken or not np.array_equal(region, before):
            yield region.astype(np.int32)
        before = region


def _able(limits: Limits) -> Bool:
    """bool[units, regions]: which units may be where."""
    size = int(np.count_nonzero(limits.unit == 0))
    able = _by_unit(_in_regions(limits.may, limits) > 0, limits.unit) == size
    pinned = _by_unit(_in_regions(limits.must, limits), limits.unit) > 0
    able &= pinned | ~pinned.any(axis=1, keepdims=True)
    open_to = min(limits.max_arrivals, 1) * np.bincount(limits.region, np.minimum(limits.device_arrivals, 1))
    held = _by_unit(_in_regions(limits.held, limits) > 0, limits.unit) == size
    able &= held | (open_to > 0)  # where nothing may arrive, the unit is there already
    return able


def _room(problem: Problem) -> Int64:
    """int64[regions]: units that fit."""
    limits = problem.limits
    size = int(np.count_nonzero(limits.unit == 0))
    room: Int64 = np.bincount(limits.region, problem.capacity).astype(np.int64) // size
    return room


def _measure(problem: Problem) -> tuple[Float64, Float64]:
    """float64[scenarios, units], the tokens of each over the mean per speed, and float64[regions], speeds."""
    limits = problem.limits
    speed = np.bincount(limits.region, problem.cluster.speed * (problem.capacity > 0)).astype(np.float64)
    speed = np.maximum(speed, speed.max() * 1e-9)  # where all devices failed there is no room either
    loads = np.ascontiguousarray(_by_unit(problem.loads, limits.unit).T, np.float64)
    loads /= np.maximum(loads.sum(axis=1, keepdims=True) / speed.sum(), 1e-300)
    return loads, speed


def _in_regions(pairs: Bool, limits: Limits) -> Int64:
    """int64[regions, experts]: how many devices of each region are in pairs, bool[devices, experts]."""
    return np.stack([pairs[limits.region == r].sum(axis=0) for r in range(limits.regions)])


def _by_unit(values: Int64 | Bool, unit: Int32) -> Int64:
    """int64[units, rows]: what the experts of each unit, all of equal size, have together in [rows, experts]."""
    order = np.argsort(unit, kind="stable")
    summed: Int64 = values[:, order].reshape(len(values), int(unit.max()) + 1, -1).sum(axis=2)
    return summed.T


@kernel
def _deal(loads: Float64, speed: Float64, most: Int64, able: Bool) -> Int64:
    """Give each unit, those with least choice and most tokens first, the region that has least tokens per speed then.

    Args:
        loads: float64[scenarios, units].
        speed: float64[regions].
        most: int64[regions], units of each at most.
        able: bool[units, regions].

    Returns:
        int64[units], -1 for one that found no place.
    """
    scenarios, units = loads.shape
    regions = len(speed)
    mean = loads.sum(axis=0)
    choice = np.empty(units)
    for u in range(units):
        choice[u] = able[u].sum() - mean[u] / (mean.sum() + 1)
    region = np.full(units, -1, np.int64)
    load = np.zeros((scenarios, regions))
    used = np.zeros(regions, np.int64)
    for u in np.argsort(choice, kind="mergesort"):
        least = np.inf
        for r in range(regions):
            if used[r] >= most[r] or speed[r] == 0 or not able[u, r]:
                continue
            heat = 0.0
            for s in range(scenarios):
                heat += ((load[s, r] + loads[s, u]) / speed[r]) ** 2
            if heat < least:
                least = heat
                region[u] = r
        if region[u] >= 0:
            used[region[u]] += 1
            load[:, region[u]] += loads[:, u]
    return region


@kernel
def _balance(
    region: Int64, loads: Float64, speed: Float64, most: Int64, able: Bool, weights: Float64, steps: int, end: float
) -> None:
    """Take steps that relieve the hottest region for which there is one, the best at a time, until there is none.

    Args:
        region: int64[units], changed.
        loads: float64[scenarios, units].
        speed: float64[regions].
        most: int64[regions], units of each at most.
        able: bool[units, regions].
        weights: float64[scenarios].
        steps: Most steps.
        end: Time on the clock of kernels to stop at.
    """
    load = np.zeros((len(loads), len(speed)))
    used = np.zeros(len(speed), np.int64)
    for u in range(len(region)):
        load[:, region[u]] += loads[:, u]
        used[region[u]] += 1
    for _ in range(steps):
        if time_now() >= end or not _relieve(region, load, used, loads, speed, most, able, weights):
            return


@kernel
def _relieve(
    region: Int64, load: Float64, used: Int64, loads: Float64, speed: Float64, most: Int64, able: Bool, weights: Float64
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
        most: int64[regions], units of each at most.
        able: bool[units, regions].
        weights: float64[scenarios].
    """
    scenarios, units = loads.shape
    regions, total = len(speed), speed.sum()
    heat = np.zeros(regions)
    squares = np.zeros(scenarios)
    top = np.zeros((scenarios, 3), np.int64)  # the hottest regions of each scenario: a step touches two
    now = 0.0
    for s in range(scenarios):
        levels = load[s] / speed
        order = np.argsort(-levels, kind="mergesort")
        for i in range(3):
            top[s, i] = order[min(i, regions - 1)]
        heat[order[0]] += weights[s] * levels[order[0]]
        squares[s] = (speed * levels * levels).sum()  # least where all levels are equal, whatever the speeds
        now += weights[s] * (levels[order[0]] + 1e-3 * squares[s] / total)
    rest = np.zeros(scenarios + 1)  # what the scenarios from one on add to any step's value at least
    for s in range(scenarios - 1, -1, -1):
        level, even = load[s, top[s, 2]] / speed[top[s, 2]], load[s].sum() / total
        rest[s] = rest[s + 1] + weights[s] * (level * (regions > 2) + 1e-3 * even * even)
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
                    if to == r or used[to] >= most[to] or not able[u, to]:
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
                    before = load[s, r] ** 2 / speed[r] + load[s, to] ** 2 / speed[to]
                    after = speed[r] * here**2 + speed[to] * there**2
                    value += weights[s] * (level + 1e-3 * (squares[s] - before + after) / total)
                    if value + rest[s + 1] >= best:
                        value = np.inf
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
