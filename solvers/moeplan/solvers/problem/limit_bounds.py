"""Lower bounds on the largest load per speed where limits say which devices may hold an expert, for one scenario.

A **unit** of experts stays within one **region** of devices (see `Limits`): an expert within its domain, or a group of
experts on its node. As a unit needs a slot for each of its experts, a region has room for so many units, and must take
those that the others have no room for. Units as wholes on regions are like whole experts on devices:

    reach      an expert is no faster than all the devices together that may hold it
    packing    any number of the heaviest units must find a place, each region with what else it must take
    division   the least largest load per speed of regions, exact where there are few units
    inside     a unit, and the coldest experts that its region must hold beside it, have no more than that region
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.bounds import COUNTS, bound_of, in_whole_tokens, room_for
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.limits import Limits

__all__ = ["division", "inside", "limited_bound", "packing", "reach"]

NODES, LOOKS = 5_000, 50_000
"""Steps of the exact division of units over regions, and regions that they look at, after which it proves nothing: some
50 microseconds."""

UNITS_INSIDE = 8
"""Units that `inside` looks at, the heaviest ones."""


def limited_bound(tokens: Int64, speed: Float64, capacity: Int32, limits: Limits) -> Float64:
    """The best of these bounds in each scenario; 0 where the limits prove nothing.

    Args:
        tokens: int64[scenarios, experts].
        speed: float64[devices].
        capacity: int32[devices], replicas that each device can hold.
        limits: What else limits a layout.

    Returns:
        float64[scenarios], tokens per unit of speed.
    """
    if limits.none:
        return np.zeros(len(tokens))
    alive = capacity > 0
    fast = np.where(alive, speed, 0.0)
    together = reach(
        fast,
        np.argsort(-fast, kind="stable"),
        limits.may,
        limits.held,
        limits.most,
        limits.max_arrivals,
        limits.device_arrivals,
        limits.region,
    )
    proven: Float64 = np.divide(tokens, together, out=np.zeros(tokens.shape), where=together > 0).max(axis=1)
    if limits.regions > 1:
        region = np.unique(limits.region[alive], return_inverse=True)[1].astype(np.int32)
        proven = np.maximum(proven, _in_regions(tokens, speed[alive], capacity[alive], limits.unit, region))
    return in_whole_tokens(proven, speed[alive])


@kernel
def reach(
    speed: Float64,
    order: Int64,
    may: Bool,
    held: Bool,
    most: Int32,
    max_arrivals: int,
    device_arrivals: Int64,
    region: Int32,
) -> Float64:
    """float64[experts]: the most speed that the replicas of an expert can have together.

    Args:
        speed: float64[devices], 0 where a device holds nothing.
        order: int64[devices], the fastest first.
        may: As the others, see `Limits`.
        held: See there.
        most: See there.
        max_arrivals: See there.
        device_arrivals: See there.
        region: See there.
    """
    regions = region.max() + 1
    best = np.empty(len(most))
    for e in range(len(most)):
        together = np.zeros(regions)
        replicas = np.zeros(regions, np.int64)
        arrivals = np.zeros(regions, np.int64)
        for d in order:
            r = region[d]
            if not may[d, e] or replicas[r] == most[e]:
                continue
            if not held[d, e]:
                if arrivals[r] >= max_arrivals or device_arrivals[d] == 0:
                    continue
                arrivals[r] += 1
            replicas[r] += 1
            together[r] += speed[d]
        best[e] = together.max()
    return best


@kernel
def _in_regions(tokens: Int64, speed: Float64, capacity: Int32, unit: Int32, region: Int32) -> Float64:
    units, regions = unit.max() + 1, region.max() + 1
    size = len(unit) // units
    fast = np.zeros(regions)
    room = np.zeros(regions, np.int64)
    for d in range(len(speed)):
        fast[region[d]] += speed[d]
        room[region[d]] += capacity[d]
    room = np.minimum(room // size, units)
    least = np.maximum(0, units - (room.sum() - room))
    proven = np.zeros(len(tokens))
    for s in range(len(tokens)):
        weight = np.zeros(units)
        for e in range(len(unit)):
            weight[unit[e]] += tokens[s, e]
        order = np.argsort(-weight, kind="mergesort")
        heavy = weight[order]
        best = packing(heavy, fast, room, least)
        best = max(best, inside(tokens[s], unit, order[:UNITS_INSIDE], region, speed, capacity, room, least))
        proven[s] = max(best, division(heavy, fast, room))
    return proven


@kernel
def packing(heavy: Float64, fast: Float64, room: Int64, least: Int64) -> float:
    """Any number of the heaviest units must find a place.

    A region with i of the K heaviest units has at least the i lightest of them, and beside them the lightest of the
    others as far as it must take more. So at M it has room for so many of the K at most.

    Args:
        heavy: float64[units] descending, their loads.
        fast: float64[regions], speeds.
        room: int64[regions], most units.
        least: int64[regions], units that it must take.
    """
    units = len(heavy)
    light = np.zeros(units + 1)
    for n in range(units):
        light[n + 1] = light[n] + heavy[units - 1 - n]
    best = 0.0
    for several in range(1, units + 1, max(1, units // COUNTS)):
        best = max(best, room_for(light, several, several, fast, room, least))
    return best


@kernel
def division(heavy: Float64, fast: Float64, room: Int64) -> float:
    """The least largest load per speed of units divided over regions; 0 where the search is not over in time.

    Units come heaviest first, and the first division that is tried puts each where it makes least. Of regions that are
    alike only the first is tried.

    Args:
        heavy: float64[units] descending, their loads.
        fast: float64[regions], speeds.
        room: int64[regions], most units.
    """
    units, regions = len(heavy), len(fast)
    load = np.zeros(regions)
    left = room.copy()
    for u in range(units):
        chosen = -1
        for r in range(regions):
            if left[r] and (chosen < 0 or (load[r] + heavy[u]) / fast[r] < (load[chosen] + heavy[u]) / fast[chosen]):
                chosen = r
        load[chosen] += heavy[u]
        left[chosen] -= 1
    best = (load / fast).max()
    load[:] = 0.0
    left[:] = room
    at = np.full(units, -1)
    u = looks = 0
    for _ in range(NODES):
        if looks > LOOKS:
            break
        r = at[u]
        if r >= 0:
            load[r] -= heavy[u]
            left[r] += 1
        r += 1
        looks -= r
        while r < regions and not _worth_trying(r, heavy[u], load, fast, left, best):
            r += 1
        looks += r + 1
        if r == regions:
            at[u] = -1
            u -= 1
            if u < 0:
                return best * (1 - 1e-12)  # sums of floats differ in the last digits by their order
            continue
        at[u] = r
        load[r] += heavy[u]
        left[r] -= 1
        if u == units - 1:
            best = (load / fast).max()
        else:
            u += 1
    return 0.0


@kernel
def _worth_trying(r: int, weight: float, load: Float64, fast: Float64, left: Int64, best: float) -> bool:
    """True if a unit may make a better division in that region, and not just what an earlier region makes."""
    fits = left[r] > 0 and (load[r] + weight) / fast[r] < best * (1 - 1e-12)
    q = 0
    while fits and q < r:
        fits = not (load[q] == load[r] and fast[q] == fast[r] and left[q] == left[r])
        q += 1
    return fits


@kernel
def inside(
    loads: Int64,
    unit: Int32,
    some: Int64,
    region: Int32,
    speed: Float64,
    capacity: Int32,
    room: Int64,
    least: Int64,
) -> float:
    """A unit is somewhere, with as many of the coldest other experts as its region must hold, alone on its devices.

    Args:
        loads: int64[experts].
        unit: int32[experts], units of equal size.
        some: int64[few], the units to look at.
        region: int32[devices].
        speed: float64[devices].
        capacity: int32[devices].
        room: int64[regions], most units.
        least: int64[regions], units that it must take.
    """
    best = 0.0
    new = np.ones(len(room), np.bool_)  # unlike all regions before
    for r in range(len(room)):
        here = np.flatnonzero(region == r)
        for q in range(r):
            there = np.flatnonzero(region == q)
            if new[r] and new[q] and room[q] == room[r] and least[q] == least[r] and len(there) == len(here):
                new[r] = (speed[there] != speed[here]).any() or (capacity[there] != capacity[here]).any()
    order = np.argsort(loads, kind="mergesort")
    for u in some:
        mine, others = loads[unit == u], loads[order[unit[order] != u]]
        weakest = np.inf
        for r in range(len(room)):
            if room[r] and new[r] and weakest > best:
                beside = others[: max(0, least[r] - 1) * len(mine)]
                here = np.flatnonzero(region == r)
                together = np.concatenate((mine, beside))
                width = np.minimum(capacity[here], len(together)).astype(np.int32)
                weakest = min(weakest, bound_of(together, speed[here], width))
        best = max(best, weakest)
    return best
