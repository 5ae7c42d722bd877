"""Lower bounds on the largest load per speed where every replica of an expert takes the same share of its tokens.

What a replica computes then follows from the number of its expert's replicas, so a layout packs items of known sizes,
and a level M is out of reach if no choice of these numbers lets the items fit. Each of these is a proof:

    needed    experts need more replicas than there are slots, so that each of their shares fits its device
    places    of items of at least t tokens a device takes so many, by its slots and by M, and fewer beside an item that
              is more than half of M; all such items together need more places than devices have, however replicas are
              numbered

The second is a dual feasible function of bin packing (Fekete & Schepers, Mathematical Programming 91, 2001) that knows
of slots. The fewest places over all numbers of replicas that fit into the slots are bounded by Lagrange's relaxation.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.bounds import in_whole_tokens
from moeplan.solvers.problem.kernel import kernel

__all__ = ["needed_bound", "places_bound"]

PARTS = (2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Parts of M that t is."""

HOT = 128
"""Rank of the last of the hottest experts beside which an item of t does not fit; ranks grow by half."""

STEP = 5e-4
"""Least relative growth of a bound that is tried, and accuracy of what is found."""

PRICES = 10
"""Prices of a slot that are tried, by bisection."""

SLACK = 1e-6
"""Part of a place that sums of prices may be wrong by."""


@kernel
def needed_bound(tokens: Int64, speed: Float64, capacity: Int32, most: Int32, low: Float64) -> Float64:
    """The least level at which the replicas that experts need fit into the slots.

    Args:
        tokens: int64[scenarios, experts].
        speed: float64[devices].
        capacity: int32[devices], replicas that each device can hold.
        most: int32[experts], most replicas of each expert.
        low: float64[scenarios], a bound already known.

    Returns:
        float64[scenarios], tokens per unit of speed, not less than `low`.
    """
    fast, slots = np.sort(speed)[::-1].copy(), capacity.sum()
    best = low.copy()
    for s in range(len(tokens)):
        high = max(low[s], tokens[s].max() / fast[0])
        if low[s] == 0 or _needed(tokens[s], _room(low[s], fast), most).sum() <= slots:
            continue
        while high - best[s] > STEP * best[s]:
            level = (best[s] + high) / 2
            if _needed(tokens[s], _room(level, fast), most).sum() > slots:
                best[s] = level
            else:
                high = level
    return in_whole_tokens(best, speed)


@kernel
def places_bound(loads: Int64, speed: Float64, capacity: Int32, most: Int32, low: float) -> float:
    """The largest level that is found out of reach in one scenario, from `low`, a bound already known, upwards.

    Some milliseconds for hundreds of experts; see `needed_bound` for the arguments.

    Args:
        loads: int64[experts].
        speed: See `needed_bound`.
        capacity: See there.
        most: See there.
        low: A bound already known, tokens per unit of speed.
    """
    order = np.argsort(-speed, kind="mergesort")
    fast, width = speed[order], capacity[order]
    if low == 0 or not _out_of_reach(loads, _room(low * (1 + STEP), fast), width, most):
        return low
    step = STEP
    while _out_of_reach(loads, _room(low * (1 + 2 * step), fast), width, most):
        step *= 2
    best, high = low * (1 + step), low * (1 + 2 * step)
    while high - best > STEP * best:
        level = (best + high) / 2
        if _out_of_reach(loads, _room(level, fast), width, most):
            best = level
        else:
            high = level
    return in_whole_tokens(np.array([best]), speed)[0]


@kernel
def _room(level: float, fast: Float64) -> Int64:
    """int64[devices]: whole tokens of each device at a level, the fastest first."""
    return np.floor(level * fast * (1 + 1e-12)).astype(np.int64)


@kernel
def _needed(loads: Int64, room: Int64, most: Int32) -> Int64:
    """int64[experts]: the fewest replicas whose shares can fit; one more than there are slots where none do.

    The fastest devices hold them. The odd tokens of an expert may be anywhere, so a share is rounded down, but for that
    of some replica.
    """
    fewest = np.empty(len(loads), np.int64)
    for e in range(len(loads)):
        w = loads[e]
        fewest[e] = 1
        while fewest[e] <= most[e] and (-(-w // fewest[e]) > room[0] or w // fewest[e] > room[fewest[e] - 1]):
            fewest[e] += 1
        if fewest[e] > most[e]:
            fewest[e] = 2**31
    return fewest


@kernel
def _out_of_reach(loads: Int64, room: Int64, width: Int32, most: Int32) -> bool:
    """True if no layout fits into `room`, int64[devices] tokens descending, and `width`, int32[devices] slots."""
    experts, slots = len(loads), width.sum()
    fewest = _needed(loads, room, most)
    spare = slots - fewest.sum()
    if spare < 0:
        return True
    for part in PARTS:
        if _too_many(loads, max(1, int(room[0] / part) + 1), room, width, most, fewest, spare):
            return True
    hottest = np.argsort(-loads, kind="mergesort")
    rank = 1
    while rank <= min(HOT, experts):
        e = hottest[rank - 1]
        size = loads[e] // fewest[e]
        if 2 * size > room[0] and _too_many(loads, room[0] - size + 1, room, width, most, fewest, spare):
            return True
        rank += max(1, rank // 2)
    return False


@kernel
def _too_many(loads: Int64, t: int, room: Int64, width: Int32, most: Int32, fewest: Int64, spare: int) -> bool:
    """True if items of at least `t` tokens need more places than there are, however many replicas experts have."""
    places = np.minimum(width, room // t).sum()
    start = np.zeros(len(loads) + 1, np.int64)
    longest = 0
    for e in range(len(loads)):  # no more replicas than make all items smaller than t
        last = min(most[e], fewest[e] + spare)
        if t > 1:
            last = min(last, -(-loads[e] // (t - 1)))
        longest += max(1, last - fewest[e] + 1)
        start[e + 1] = longest
    taken = np.empty(longest, np.int64)
    for e in range(len(loads)):
        for i in range(start[e + 1] - start[e]):
            r = fewest[e] + i
            size, odd = divmod(loads[e], r)
            taken[start[e] + i] = (r - odd) * _places(size, t, room, width)
            if odd:
                taken[start[e] + i] += odd * _places(size + 1, t, room, width)
    return _exceeds(taken, start, spare, places, float(len(room)))


@kernel
def _exceeds(taken: Int64, start: Int64, spare: int, places: int, highest: float) -> bool:
    """True if experts must take more than `places`, whichever of their entries of `taken` they choose.

    Args:
        taken: int64[entries], places that an expert takes with its fewest replicas, with one more, and so on.
        start: int64[experts + 1], where each expert's entries begin.
        spare: Replicas beyond the fewest, of all experts together.
        places: Places that there are.
        highest: The largest price of a replica, in places, that is tried.
    """
    low, high, price = 0.0, highest, 0.0
    for _ in range(PRICES):
        total, more = 0.0, 0
        for e in range(len(start) - 1):
            best, at = np.inf, 0
            for i in range(start[e + 1] - start[e]):
                value = taken[start[e] + i] + price * i
                if value < best:
                    best, at = value, i
            total += best
            more += at
        if total - price * spare > places + SLACK:
            return True
        if more > spare:
            low = price
        elif price == 0:
            return False
        else:
            high = price
        price = (low + high) / 2
    return False


@kernel
def _places(size: int, t: int, room: Int64, width: Int32) -> int:
    """Places that an item takes: those of a device that it leaves to no other, at the least."""
    if size < t:
        return 0
    if 2 * size <= room[0]:
        return 1
    least = width[0] + 1
    for d in range(len(room)):
        if room[d] < size:
            break
        if d and room[d] == room[d - 1] and width[d] == width[d - 1]:
            continue
        beside = min(width[d] - 1, (room[d] - size) // t)
        least = min(least, max(1, min(width[d], room[d] // t) - beside))
    return least
