"""Exchanges of two units between pools, the best first, while the slowest pool becomes faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["Pools", "deal", "exchange", "pool_time", "slowest"]

OVER_CAP = 1e3
"""Time of a share of the load that a pool has no memory for: more than any exchange can gain."""


class Pools(NamedTuple):
    """Devices within which spilling evens the load, and the load to come. Loads are shares of a device of mean speed.

    Attributes:
        load: float64[scenarios, units], load of each unit: of an expert, or of a group of experts that stay together.
        weight: float64[scenarios], importance of each scenario.
        rate: float64[pools], speed of a pool's devices together, where all pools have that of all devices.
        cap: float64[scenarios, pools], load that a pool has memory for.
    """

    load: Float64
    weight: Float64
    rate: Float64
    cap: Float64


@kernel
def pool_time(load: float, rate: float, cap: float) -> float:
    """Time of a pool; far more where it has no memory for its load."""
    return load / rate + OVER_CAP * max(load - cap, 0.0)


@kernel
def _loads(pools: Pools, place: Int64) -> Float64:
    """float64[scenarios, pools]."""
    load = np.zeros(pools.cap.shape)
    for s in range(len(load)):
        for u in range(len(place)):
            load[s, place[u]] += pools.load[s, u]
    return load


@kernel
def slowest(pools: Pools, place: Int64) -> float:
    """Time of the slowest pool, on average over the scenarios; 1 where all pools are equally fast.

    Args:
        pools: The load to come.
        place: int64[units], pool of each unit.
    """
    load, total = _loads(pools, place), 0.0
    for s in range(len(load)):
        most = 0.0
        for p in range(load.shape[1]):
            most = max(most, pool_time(load[s, p], pools.rate[p], pools.cap[s, p]))
        total += pools.weight[s] * most
    return total


@kernel
def _after(pools: Pools, place: Int64, load: Float64, time: Float64, a: int, b: int, limit: float) -> float:
    """The value of `slowest` once units `a` and `b` have changed places; `limit` or more if it is not less than that.

    Args:
        pools: The load to come.
        place: int64[units], pool of each unit now.
        load: float64[scenarios, pools], load of each pool now.
        time: float64[scenarios, pools], its time.
        a: A unit.
        b: A unit of another pool.
        limit: What to beat.
    """
    p, q, after = place[a], place[b], 0.0
    for s in range(len(load)):
        change = pools.load[s, b] - pools.load[s, a]
        worst = pool_time(load[s, p] + change, pools.rate[p], pools.cap[s, p])
        worst = max(worst, pool_time(load[s, q] - change, pools.rate[q], pools.cap[s, q]))
        for r in range(load.shape[1]):
            if r != p and r != q:
                worst = max(worst, time[s, r])
        after += pools.weight[s] * worst
        if after >= limit:
            break
    return after


@kernel
def exchange(pools: Pools, place: Int64, most: int, least_gain: float) -> int:
    """Exchange units between pools until none gains enough; `place` is changed.

    Every exchange is the best of all pairs, which costs ``units**2 * scenarios``. Pairs of pools of which neither is
    ever the slowest cannot gain and are passed over.

    Args:
        pools: The load to come.
        place: int64[units], pool of each unit.
        most: Most exchanges.
        least_gain: Time that an exchange must save.

    Returns:
        The number of exchanges.
    """
    scenarios, count = pools.cap.shape
    load = _loads(pools, place)
    time, hot = np.empty((scenarios, count)), np.zeros(count, np.bool_)
    for done in range(most):
        now = 0.0
        hot[:] = False
        for s in range(scenarios):
            for p in range(count):
                time[s, p] = pool_time(load[s, p], pools.rate[p], pools.cap[s, p])
            top = np.argmax(time[s])
            hot[top] = True
            now += pools.weight[s] * time[s, top]
        best, best_a, best_b = now - max(least_gain, 1e-12), -1, -1
        for a in range(len(place)):
            for b in range(a + 1, len(place)):
                p, q = place[a], place[b]
                if p == q or not (hot[p] or hot[q]):
                    continue
                after = _after(pools, place, load, time, a, b, best)
                if after < best:
                    best, best_a, best_b = after, a, b
        if best_a < 0:
            return done
        p, q = place[best_a], place[best_b]
        for s in range(scenarios):
            change = pools.load[s, best_b] - pools.load[s, best_a]
            load[s, p] += change
            load[s, q] -= change
        place[best_a], place[best_b] = q, p
    return most


@kernel
def deal(pools: Pools, room: Int64) -> Int64:
    """int64[units]: units dealt to pools, the busiest on average first, each to the pool that is then fastest.

    Args:
        pools: The load to come.
        room: int64[pools], units of each.
    """
    mean = np.zeros(pools.load.shape[1])
    for s in range(len(pools.load)):
        mean += pools.weight[s] * pools.load[s]
    place = np.empty(len(mean), np.int64)
    load, left = np.zeros(len(room)), room.copy()
    for u in np.argsort(-mean, kind="mergesort"):
        best = -1
        for p in range(len(room)):
            if left[p] and (
                best < 0 or (load[p] + mean[u]) / pools.rate[p] < (load[best] + mean[u]) / pools.rate[best]
            ):
                best = p
        place[u] = best
        load[best] += mean[u]
        left[best] -= 1
    return place
