"""Search for the smallest target that can be packed, domain by domain."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.arrays import Float64, Int64
from moeplan.solvers.kernel import kernel
from moeplan.solvers.spill.options import MAX_TOTAL
from moeplan.solvers.spill.packing import RULES, finish_time, pack

__all__ = ["lower_bound", "solve_domain"]

_ATTEMPTS = 8
"""Targets tried at most; the typical count is 1 to 3."""

_UNLIMITED = float(MAX_TOTAL)
"""A target that only the memory caps limit."""

_FINEST = 1e-4
"""Targets closer together than this fraction are not told apart, even at tolerance 0."""


@kernel
def lower_bound(low: int, high: int, spare: Int64, speed: Float64, load: Int64) -> float:
    """A time that no plan of a domain can undercut, from its loads at home.

    The domain's tokens over its speed; and the same for the devices with spare slots alone, because tokens of their
    experts cannot leave them. With one spare slot nowhere, every device keeps its load. Equal speeds: whole tokens.
    """
    tokens, rate, open_tokens, open_rate = np.int64(0), 0.0, np.int64(0), 0.0
    worst, equal, devices, open_devices = 0.0, True, 0, 0
    for p in range(low, high):
        tokens += load[p]
        rate += speed[p]
        devices += 1
        equal &= speed[p] == speed[low]
        worst = max(worst, load[p] / speed[p])
        if spare[p] > 0:
            open_tokens += load[p]
            open_rate += speed[p]
            open_devices += 1
    if open_devices == 0:
        return worst
    if equal:
        even = max(-(-tokens // devices), -(-open_tokens // open_devices))
        return even / speed[low]
    return max(tokens / rate, open_tokens / open_rate)


@kernel
def solve_domain(
    floor: float,
    low: int,
    high: int,
    w: Int64,
    first: Int64,
    spare: Int64,
    cap: Int64,
    speed: Float64,
    costs: Float64,
    at_home: Int64,
    load: Int64,
    received: Int64,
    room: Int64,
    excess: Int64,
    last_slot: Int64,
    left: Int64,
    chunks: Int64,
) -> tuple[int, int]:
    """The best plan found for one domain.

    A target that cannot be packed leaves a number of stuck tokens. Spread over the domain they are the least by which
    the target must grow, so the next target grows by that much (or to the middle of what is known, if that is less).

    Args:
        floor: Proven lower bound of the whole problem: nothing is gained below it.
        low: First position of the domain.
        high: End of the domain.
        w: See `packing.pack` for this and the following.
        first: See `packing.pack`.
        spare: See `packing.pack`.
        cap: See `packing.pack`.
        speed: See `packing.pack`.
        costs: float64[4]; the last is the tolerance.
        at_home: int64[positions], loads at home.
        load: Out: loads of the plan.
        received: Out: replicas received.
        room: Scratch; so are `excess`, `last_slot`, `left`.
        excess: Scratch.
        last_slot: Scratch.
        left: Scratch.
        chunks: int64[2, 4, slots]; the best plan is in one of the two tables.

    Returns:
        The table that holds the best plan, and its number of chunks.
    """
    load[low:high] = at_home[low:high]
    received[low:high] = 0
    best, best_count = 0, 0
    best_time, best_short = finish_time(low, high, cap, speed, costs, load, received)
    step = floor * max(costs[3], _FINEST)
    rate = speed[low:high].sum()
    target = floor + floor * costs[3]
    failed = floor
    for _ in range(_ATTEMPTS):
        if best_short == 0 and (best_time <= target or best_time <= failed + step):
            break
        fewest_stuck = np.int64(2**62)
        for rule in range(RULES):
            load[low:high] = at_home[low:high]
            received[low:high] = 0
            count, stuck = pack(
                target, rule, low, high, w, first, spare, cap, speed, costs,
                load, received, room, excess, last_slot, left, chunks[1 - best],
            )  # fmt: skip
            time, short = finish_time(low, high, cap, speed, costs, load, received)
            if short < best_short or (short == best_short and time < best_time):
                best, best_count, best_time, best_short = 1 - best, count, time, short
            fewest_stuck = min(fewest_stuck, stuck)
            if stuck == 0:
                break
        if best_short > 0:
            if target == _UNLIMITED:
                break
            target = _UNLIMITED
            continue
        if fewest_stuck > 0:
            failed = max(failed, target)
            grow = max(fewest_stuck / rate, step)
        target = min(failed + grow, (failed + best_time) / 2)
    return best, best_count
