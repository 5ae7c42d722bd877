"""Local search over the replicas of a domain, for limits that packing does not look ahead to.

Packing gives each chunk the tokens that suit it at the moment. With a least size of chunks, transfers that take time,
caps, unequal speeds or spare slots, what is left over may then fit nowhere. The search takes a few chunks out of the
packed ones at random and sends what is above the limits away anew, if need be to where it overfills, until spare slots
or patience end. After every change tokens flow along the chunks that there are: a chunk may grow by what is left at its
home, and shrink to the least size. A change stays if no more tokens than before it are above the limits at the target.
(Ruin and recreate: Schrimpf et al. 2000.) The random numbers are the same in every call, so all ranks find one plan.
"""

from __future__ import annotations

from typing import NamedTuple

from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.filling import (
    CHUNK_EXPERT,
    CHUNK_FROM,
    CHUNK_TO,
    CHUNK_TOKENS,
    Costs,
    Domain,
    State,
    finish_time,
    limit_at,
)

__all__ = ["Trial", "search_replicas"]

_RUINED = 3
"""Chunks that one change takes out at most."""

_RECREATED = 2
"""Chunks that one change may put in beyond those that it took out."""

_PATIENCE = 30
"""Changes in a row without a gain after which a target counts as out of reach."""

_FINEST = 1e-3
"""Targets closer together than this fraction are not told apart."""

_PASSES = 2
"""Times that the targets between the bound and the best plan are tried."""

_SEED = 88172645463325252
_NOWHERE = -1
_RANDOM, _VISITS = range(2)


class Trial(NamedTuple):
    """Memory of the search, int64.

    Attributes:
        load: [positions], `State.load` before a change.
        received: [positions], `State.received` before it.
        queue: [positions], positions that tokens can flow to.
        entry: [positions], how they do: by chunk c to its host as 2 c, back to its home as 2 c + 1.
        counters: [2 or more], state of the random numbers, and chunks looked at.
        left: [experts], tokens at home before a change.
        now: [4, slots], the chunks of now.
        before: [4, slots], those before a change.
    """

    load: Int64
    received: Int64
    queue: Int64
    entry: Int64
    counters: Int64
    left: Int64
    now: Int64
    before: Int64


@kernel
def _random(counters: Int64, below: int) -> int:
    """A number of 0 .. below - 1, by Knuth's linear congruence."""
    counters[_RANDOM] = counters[_RANDOM] * 6364136223846793005 + 1442695040888963407
    return ((counters[_RANDOM] >> 33) & 0x3FFFFFFF) % below


@kernel
def _copy_chunks(source: Int64, target: Int64, count: int) -> None:
    for row in range(4):
        for c in range(count):
            target[row, c] = source[row, c]


@kernel
def _find_room(start: int, room: Int64, left: Int64, count: int, smallest: int, trial: Trial) -> int:
    """The position with room that a flow from `start` reaches over the fewest chunks; -1 if there is none."""
    queue, entry, chunks = trial.queue, trial.entry, trial.now
    for p in range(len(room)):
        entry[p] = _NOWHERE
    queue[0] = start
    entry[start] = 2 * count
    head, tail = 0, 1
    while head < tail:
        p = queue[head]
        head += 1
        trial.counters[_VISITS] += count
        for c in range(count):
            q, way = _NOWHERE, 0
            if chunks[CHUNK_FROM, c] == p and left[chunks[CHUNK_EXPERT, c]] > 0:
                q, way = chunks[CHUNK_TO, c], 2 * c
            elif chunks[CHUNK_TO, c] == p and chunks[CHUNK_TOKENS, c] > smallest:
                q, way = chunks[CHUNK_FROM, c], 2 * c + 1
            if q >= 0 and entry[q] < 0:
                entry[q] = way
                if room[q] > 0:
                    return q
                queue[tail] = q
                tail += 1
    return _NOWHERE


@kernel
def _flow(start: int, end: int, state: State, left: Int64, smallest: int, trial: Trial) -> None:
    """Send as many tokens as can go the way that was found."""
    entry, chunks = trial.entry, trial.now
    tokens = min(state.excess[start], state.room[end])
    p = end
    while p != start:
        c, back = entry[p] // 2, entry[p] % 2 == 1
        tokens = min(tokens, chunks[CHUNK_TOKENS, c] - smallest if back else left[chunks[CHUNK_EXPERT, c]])
        p = chunks[CHUNK_TO, c] if back else chunks[CHUNK_FROM, c]
    p = end
    while p != start:
        c, back = entry[p] // 2, entry[p] % 2 == 1
        more = -tokens if back else tokens
        chunks[CHUNK_TOKENS, c] += more
        left[chunks[CHUNK_EXPERT, c]] -= more
        p = chunks[CHUNK_TO, c] if back else chunks[CHUNK_FROM, c]
    state.load[start] -= tokens
    state.load[end] += tokens
    state.excess[start] -= tokens
    state.room[end] -= tokens


@kernel
def _settle(target: float, domain: Domain, costs: Costs, state: State, left: Int64, count: int, trial: Trial) -> int:
    """Let tokens flow until no more can; the tokens that stay above the limits at the target."""
    load, received, room, excess = state.load, state.received, state.room, state.excess
    for p in range(len(load)):
        above = load[p] - limit_at(target, domain.speed[p], domain.cap[p], received[p], costs.transfer, costs.memory)
        excess[p], room[p] = max(above, 0), max(-above, 0)
    trial.counters[_VISITS] += len(load)
    stuck = 0
    for p in range(len(load)):
        while excess[p] > 0:
            end = _find_room(p, room, left, count, costs.smallest, trial)
            if end < 0:
                break
            _flow(p, end, state, left, costs.smallest, trial)
        stuck += excess[p]
    return stuck


@kernel
def _holds(expert: int, host: int, chunks: Int64, count: int) -> bool:
    held = False
    for c in range(count):
        held |= chunks[CHUNK_EXPERT, c] == expert and chunks[CHUNK_TO, c] == host
    return held


@kernel
def _take_out(c: int, state: State, left: Int64, chunks: Int64, count: int) -> int:
    """Return a chunk home; the number of chunks left."""
    tokens, host = chunks[CHUNK_TOKENS, c], chunks[CHUNK_TO, c]
    left[chunks[CHUNK_EXPERT, c]] += tokens
    state.load[chunks[CHUNK_FROM, c]] += tokens
    state.load[host] -= tokens
    state.received[host] -= 1
    for row in range(4):
        chunks[row, c] = chunks[row, count - 1]
    return count - 1


@kernel
def _put_in(domain: Domain, smallest: int, state: State, left: Int64, count: int, trial: Trial) -> int:
    """Send a chunk of the least size away from a position with excess; the number of chunks now.

    The expert is the largest or any; the receiver that with most room or, one time in four, any with a free slot.
    """
    chunks, counters, first = trial.now, trial.counters, domain.first
    positions = len(domain.speed)
    sender = _random(counters, positions)
    while state.excess[sender] == 0:
        sender = (sender + 1) % positions
    begin, owned = first[sender], first[sender + 1] - first[sender]
    expert, start, any_expert = _NOWHERE, _random(counters, max(owned, 1)), _random(counters, 2) == 0
    for i in range(owned):
        e = begin + (start + i) % owned
        if left[e] >= smallest and (expert < 0 or left[e] > left[expert]):
            expert = e
            if any_expert:
                break
    if expert < 0:
        return count
    host, start, any_host = _NOWHERE, _random(counters, positions), _random(counters, 4) == 0
    for i in range(positions):
        p = (start + i) % positions
        free = p != sender and state.received[p] < domain.spare[p]
        if free and (host < 0 or (state.room[p] > state.room[host] and not any_host)):
            host = p if not _holds(expert, p, chunks, count) else host
    if host < 0:
        return count
    chunks[CHUNK_EXPERT, count], chunks[CHUNK_FROM, count] = expert, sender
    chunks[CHUNK_TO, count], chunks[CHUNK_TOKENS, count] = host, smallest
    left[expert] -= smallest
    state.load[sender] -= smallest
    state.load[host] += smallest
    state.received[host] += 1
    return count + 1


@kernel
def _change(
    target: float, domain: Domain, costs: Costs, state: State, left: Int64, count: int, trial: Trial
) -> tuple[int, int]:
    """Take some chunks out and put others in; the number of chunks, and the tokens above the limits."""
    taken = min(1 + _random(trial.counters, _RUINED), count)
    for _ in range(taken):
        count = _take_out(_random(trial.counters, count), state, left, trial.now, count)
    stuck = _settle(target, domain, costs, state, left, count, trial)
    for _ in range(taken + _RECREATED):
        if stuck == 0:
            break
        more = _put_in(domain, costs.smallest, state, left, count, trial)
        if more > count:
            count = more
            stuck = _settle(target, domain, costs, state, left, count, trial)
    return count, stuck


@kernel
def _keep(domain: Domain, state: State, left: Int64, count: int, trial: Trial) -> None:
    for p in range(len(state.load)):
        trial.load[p], trial.received[p] = state.load[p], state.received[p]
    for e in range(domain.first[0], domain.first[-1]):
        trial.left[e] = left[e]
    _copy_chunks(trial.now, trial.before, count)


@kernel
def _restore(domain: Domain, state: State, left: Int64, count: int, trial: Trial) -> None:
    for p in range(len(state.load)):
        state.load[p], state.received[p] = trial.load[p], trial.received[p]
    for e in range(domain.first[0], domain.first[-1]):
        left[e] = trial.left[e]
    _copy_chunks(trial.before, trial.now, count)


@kernel
def search_replicas(
    floor: float, domain: Domain, costs: Costs, state: State, left: Int64, best: Int64, count: int, trial: Trial
) -> int:
    """Improve the chunks of a domain, until they are within the tolerance of a target below which none were found.

    Targets are halved between the highest that was out of reach and the best plan, as in `domain_search`.

    Args:
        floor: Proven lower bound.
        domain: The devices.
        costs: What replicas cost; `costs.search` limits the chunks looked at.
        state: The loads with the chunks before, those of some other plan after.
        left: int64[experts], tokens at home with these chunks; scratch.
        best: int64[4, slots], the chunks, replaced by better ones.
        count: Their number.
        trial: Memory.

    Returns:
        The number of chunks in `best`.
    """
    counters = trial.counters
    counters[_RANDOM], counters[_VISITS] = _SEED, 0
    _copy_chunks(best, trial.now, count)
    best_count = count
    best_time, best_short = finish_time(domain, costs, state)
    step = floor * max(costs.tolerance, _FINEST)
    failed, idle, passes = floor, 0, 0
    target = floor + step if best_short == 0 else best_time + floor
    stuck = _settle(target, domain, costs, state, left, count, trial)
    fewest = stuck
    while counters[_VISITS] < costs.search:
        time, short = finish_time(domain, costs, state)
        if short < best_short or (short == best_short and time < best_time):
            best_time, best_short, best_count = time, short, count
            _copy_chunks(trial.now, best, count)
        if stuck == 0 or idle == _PATIENCE:
            failed = max(failed, target) if stuck > 0 else failed
            if best_time <= failed + step:
                failed, passes = floor, passes + 1
            if best_short > 0 or best_time <= floor + step or passes == _PASSES:
                break
            target = max((failed + best_time) / 2, failed + step)
            stuck = _settle(target, domain, costs, state, left, count, trial)
            fewest, idle = stuck, 0
            continue
        _keep(domain, state, left, count, trial)
        changed, after = _change(target, domain, costs, state, left, count, trial)
        if after > stuck:
            _restore(domain, state, left, count, trial)
        else:
            count, stuck = changed, after
        idle = 0 if stuck < fewest else idle + 1
        fewest = min(fewest, stuck)
    return best_count
