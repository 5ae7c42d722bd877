"""Search for the smallest target at which a domain can be packed."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.filling import (
    CHUNK_EXPERT,
    CHUNK_TOKENS,
    Costs,
    Domain,
    State,
    finish_time,
    go_home,
    pack,
    replay,
    take_back,
)
from moeplan.solvers.spill.options import MAX_TOTAL
from moeplan.solvers.spill.replica_search import Trial, search_replicas

__all__ = ["lower_bound", "solve_domain", "with_transfers"]

_ATTEMPTS = 6
"""Targets tried at most; most calls need one."""

_FINEST = 1e-4
"""Targets closer together than this fraction are not told apart, even at tolerance 0."""

_HALVINGS = 24
"""Halvings of the distance between what transfers leave possible and what they do not."""

_SURELY = 1 - 1e-9
"""Part of an excess that is there whatever was rounded."""

_UNLIMITED = float(MAX_TOTAL)
"""A target that only the memory caps limit."""


@kernel
def lower_bound(domain: Domain, load: Int64) -> float:
    """A time that no plan of a domain can undercut, from its loads at home.

    The domain's tokens over its speed; and the same for the devices with spare slots alone, whose tokens cannot reach
    the others. Without any spare slot every device keeps its load. With equal speeds tokens are whole. Memory caps move
    what they do not admit to the other devices.
    """
    spare, cap, speed = domain.spare, domain.cap, domain.speed
    tokens, open_tokens, open_devices = 0, 0, 0
    rate, open_rate, worst = 0.0, 0.0, 0.0
    equal = True
    for p in range(len(load)):
        tokens += load[p]
        rate += speed[p]
        equal &= speed[p] == speed[0]
        worst = max(worst, load[p] / speed[p])
        if spare[p] > 0:
            open_tokens += load[p]
            open_rate += speed[p]
            open_devices += 1
    if open_devices == 0:
        return worst
    if equal:
        even = float(max(-(-tokens // len(load)), -(-open_tokens // open_devices)) / speed[0])
    else:
        even = max(tokens / rate, open_tokens / open_rate)
    return above_caps(even, tokens, cap, speed)


@kernel
def above_caps(bound: float, tokens: int, cap: Int64, speed: Float64) -> float:
    """Raise a bound until devices that reach their memory cap below it leave no more than the others can do by then."""
    while True:
        left, rate = tokens, 0.0
        for p in range(len(cap)):
            if cap[p] < bound * speed[p]:
                left -= cap[p]
            else:
                rate += speed[p]
        if rate == 0.0 or left / rate <= bound:
            return bound
        bound = left / rate


@kernel
def with_transfers(bound: float, w: Int64, domain: Domain, load: Int64, transfer: float) -> float:
    """Raise a bound of a domain, whose loads at home are given, until the transfers that it needs fit below it too.

    A device that has more at home than it can do by then sends its excess away in chunks, none larger than its largest
    expert or than the fastest device can do after a transfer; and each costs some device, the slowest at least, the
    time of a transfer. A later time needs fewer of them, so the least that is possible is found by halving.
    """
    first, spare, speed = domain.first, domain.spare, domain.speed
    tokens, rate, fastest, slowest, late = 0, 0.0, 0.0, 0.0, bound
    for p in range(len(load)):
        tokens += load[p]
        rate += speed[p]
        fastest = max(fastest, speed[p])
        if spare[p] > 0:
            slowest = speed[p] if slowest == 0.0 else min(slowest, speed[p])
        late = max(late, load[p] / speed[p])
    low, high = bound, late
    time = bound
    for _ in range(_HALVINGS):
        chunks = 0.0
        for p in range(len(load)):
            excess = load[p] - time * speed[p]
            if excess > 0:
                largest = max((time - transfer) * fastest, 1.0)
                heaviest = w[first[p] : first[p + 1]].max()
                chunks += np.ceil(excess * _SURELY / min(largest, float(heaviest)))
        if tokens + chunks * transfer * slowest <= time * rate:
            high = time
        else:
            low = time
        time = (low + high) / 2
    return low


@kernel
def solve_domain(
    floor: float, w: Int64, domain: Domain, costs: Costs, state: State, left: Int64, chunks: Int64, trial: Trial
) -> tuple[int, int]:
    """The best plan found for one domain; never worse than leaving everything at home.

    The first target is the bound plus the tolerance. One that cannot be packed leaves stuck tokens. Spread over the
    domain they are the least by which the target must grow, so it grows by that much, twice as far after
    every further failure, but at most to the middle between it and the best plan.

    Args:
        floor: Proven lower bound of the whole problem: nothing is gained below it.
        w: int64[experts], tokens of each expert.
        domain: The devices.
        costs: What replicas cost.
        state: The loads at home before, those of the plan after.
        left: int64[experts], scratch.
        chunks: int64[2 or more, 4, slots], out: the best plan is in one of the first two tables.
        trial: Memory of the search over replicas.

    Returns:
        The table that holds the best plan, and its number of chunks.
    """
    go_home(state)
    best, best_count = 0, 0
    best_time, best_short = finish_time(domain, costs, state)
    target, failed, grow = floor + floor * costs.tolerance, floor, 0.0
    step = floor * max(costs.tolerance, _FINEST)
    for _ in range(_ATTEMPTS):
        if best_short == 0 and (best_time <= target or best_time <= failed + step):
            break
        fewest_stuck = 2**62
        for wasteful in (False, True):
            go_home(state)
            count, stuck = pack(target, wasteful, w, domain, costs, state, left, chunks[1 - best])
            time, short = finish_time(domain, costs, state)
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
            grow = max(fewest_stuck / domain.speed.sum(), step, 2 * grow)
        target = min(failed + grow, (failed + best_time) / 2)

    go_home(state)
    replay(chunks[best], best_count, state)
    if costs.search > 0 and len(state.load) > 1 and (best_short > 0 or (costs.quick == 0 and best_time > floor + step)):
        first, last = domain.first[0], domain.first[-1]
        for e in range(first, last):
            left[e] = w[e]
        for c in range(best_count):
            left[chunks[best, CHUNK_EXPERT, c]] -= chunks[best, CHUNK_TOKENS, c]
        best_count = search_replicas(floor, domain, costs, state, left, chunks[best], best_count, trial)
        go_home(state)
        replay(chunks[best], best_count, state)
        best_time, best_short = finish_time(domain, costs, state)
    best_count = take_back(max(best_time, floor), chunks[best], best_count, domain, costs, state)
    return best, best_count
