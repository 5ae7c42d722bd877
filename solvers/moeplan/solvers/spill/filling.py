"""Packing at a given target: which device hands how many tokens of which expert to which other device.

All arrays are one domain's; devices appear by *position* 0..n-1, and the tokens of the experts at home on position p
are ``w[first[p]:first[p + 1]]``. A device may be loaded up to its limit at the target; what is above is its excess,
what is below its room. A chunk moves tokens of one expert from a device with excess to one with room.

The point of the method is what happens to room that the sender does not need. When the last spare slot of a receiver is
used, the chunk fills all of its room even if the sender's excess is smaller: the sender then has that room itself, with
its own slots still free, and the next device can use it. Each chunk thus settles one device exactly and no room is
lost, unless no expert is large enough to carry it. (If only devices below the target receive, as in UltraEP and LLEP,
the room is lost.) Room passed on that nobody needed in the end is returned by `take_back`.
"""

from __future__ import annotations

from typing import NamedTuple

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = [
    "CHUNK_EXPERT",
    "CHUNK_FROM",
    "CHUNK_TO",
    "CHUNK_TOKENS",
    "Costs",
    "Domain",
    "State",
    "finish_time",
    "go_home",
    "pack",
    "replay",
    "take_back",
]

CHUNK_EXPERT, CHUNK_FROM, CHUNK_TO, CHUNK_TOKENS = range(4)
"""Rows of a table of chunks."""

_POSITIONS = 2**16
"""A count and a position share a word, count first: the plain maximum of words finds both, in vector instructions."""


class Domain(NamedTuple):
    """The devices of one domain.

    Attributes:
        first: int64[positions + 1], experts of each position.
        spare: int64[positions], spare slots.
        cap: int64[positions], token caps.
        speed: float64[positions].
    """

    first: Int64
    spare: Int64
    cap: Int64
    speed: Float64


class Costs(NamedTuple):
    """Costs of replicas, and the thresholds of what is worth doing.

    Attributes:
        transfer: Time of receiving a replica, in tokens at speed 1.
        memory: Tokens of a cap that a replica takes.
        smallest: Fewest tokens of a chunk.
        tolerance: Accepted distance from the lower bound, as a fraction.
        threshold: Imbalance of the homes up to which nothing moves.
        search: Chunks that `replica_search` may look at; 0 where packing alone comes near the optimum.
        quick: 1 to leave it at packing but where a cap is exceeded, else 0.
    """

    transfer: float
    memory: int
    smallest: int
    tolerance: float
    threshold: float
    search: int
    quick: int


class State(NamedTuple):
    """Where a domain stands while chunks are moved: int64[positions] each.

    Attributes:
        at_home: Tokens with every token at home; read only.
        load: Tokens with the chunks so far.
        received: Replicas received so far.
        room: Scratch: room for one more replica.
        excess: Scratch: tokens above the limit.
    """

    at_home: Int64
    load: Int64
    received: Int64
    room: Int64
    excess: Int64


@kernel
def limit_at(target: float, speed: float, cap: int, received: int, transfer: float, memory: int) -> int:
    """Tokens that a device may compute within `target` and its memory, when it has received that many replicas."""
    within_time = max((target - transfer * received) * speed, 0.0)
    return int(min(within_time, float(cap - memory * received)))


@kernel
def standing(
    target: float,
    load: int,
    speed: float,
    cap: int,
    received: int,
    spare: int,
    transfer: float,
    memory: int,
    smallest: int,
) -> tuple[int, int]:
    """Excess of a device, and its room for one more replica; room too small for a replica counts as none."""
    excess = max(load - limit_at(target, speed, cap, received, transfer, memory), 0)
    if received >= spare:
        return excess, 0
    room = limit_at(target, speed, cap, received + 1, transfer, memory) - load
    return excess, room if room >= smallest else 0


@kernel
def neediest(excess: Int64) -> int:
    """Position with the largest excess, -1 if none has any."""
    word = -1
    for p in range(len(excess)):
        word = max(word, excess[p] * _POSITIONS + p)
    return word % _POSITIONS if word >= _POSITIONS else -1


@kernel
def receiver(room: Int64, need: int, largest: int, received: Int64, spare: Int64, wasteful: bool) -> int:
    """Position that takes a chunk: the snuggest room for `need`, else the largest room; -1 if there is no room.

    Room that the sender's largest expert cannot fill would be lost with the last spare slot: then the largest of the
    rooms that are too small for `need` comes first, unless `wasteful`.

    Args:
        room: Room of each position.
        need: Tokens that the sender would like to send, at most `largest`.
        largest: Tokens that the sender's largest expert can fill.
        received: Replicas that each position has received.
        spare: Its spare slots.
        wasteful: Take the snuggest room whatever is lost.
    """
    never = 2**62
    snug, full = never, 0
    for p in range(len(room)):
        word = room[p] * _POSITIONS + p
        snug = min(snug, word if room[p] >= need else never)
        full = max(full, word if room[p] < need else 0)
    smaller = full % _POSITIONS if full >= _POSITIONS else -1
    if snug == never:
        return smaller
    p = snug % _POSITIONS
    loses = room[p] > largest and received[p] + 1 == spare[p]
    return smaller if loses and smaller >= 0 and not wasteful else p


@kernel
def largest_expert(left: Int64, begin: int, end: int) -> int:
    """Index in [begin, end) of the expert with most tokens left, -1 for an empty range."""
    best = begin if begin < end else -1
    for i in range(begin + 1, end):
        if left[i] > left[best]:
            best = i
    return best


@kernel
def smallest_covering(left: Int64, begin: int, end: int, tokens: int, best: int) -> int:
    """Index in [begin, end) of the expert with the fewest tokens left that still covers `tokens`, as `best` does."""
    for i in range(begin, end):
        if tokens <= left[i] < left[best]:
            best = i
    return best


@kernel
def go_home(state: State) -> None:
    """The state without replicas. (A loop: compiled slice assignment takes longer than the rest of a short call.)"""
    at_home, load, received = state.at_home, state.load, state.received
    for p in range(len(load)):
        load[p] = at_home[p]
        received[p] = 0


@kernel
def pack(
    target: float, wasteful: bool, w: Int64, domain: Domain, costs: Costs, state: State, left: Int64, chunks: Int64
) -> tuple[int, int]:
    """Move chunks until no device exceeds its limit at `target`, or nothing more can move.

    Args:
        target: Time that no device should exceed, in tokens at speed 1.
        wasteful: See `receiver`; the second thing to try.
        w: int64[experts], tokens of each expert; read only.
        domain: The devices.
        costs: What replicas cost.
        state: All tokens at home before, the loads with the chunks after.
        left: int64[experts], scratch: tokens of each expert that are still at home.
        chunks: int64[4, slots], out.

    Returns:
        Number of chunks, and tokens above the limits that could not be moved (0: the target is met).
    """
    first, spare, cap, speed = domain.first, domain.spare, domain.cap, domain.speed
    load, received, room, excess = state.load, state.received, state.room, state.excess
    transfer, memory, smallest = costs.transfer, costs.memory, costs.smallest
    for i in range(first[0], first[-1]):
        left[i] = w[i]
    for p in range(len(load)):
        excess[p], room[p] = standing(
            target, load[p], speed[p], cap[p], received[p], spare[p], transfer, memory, smallest
        )
    count, stuck = 0, 0
    while True:
        sender = neediest(excess)
        if sender < 0:
            return count, stuck
        begin, end = first[sender], first[sender + 1]
        expert = largest_expert(left, begin, end)
        if expert < 0 or left[expert] < smallest:
            stuck += excess[sender]
            excess[sender] = 0
            continue
        largest = left[expert]
        need = max(excess[sender], smallest)
        taker = receiver(room, min(need, largest), largest, received, spare, wasteful)
        if taker < 0:
            for p in range(len(excess)):
                stuck += excess[p]
            return count, stuck
        tokens = min(largest, room[taker])
        if received[taker] + 1 < spare[taker]:
            tokens = min(tokens, need)
        expert = smallest_covering(left, begin, end, tokens, expert)
        chunks[CHUNK_EXPERT, count] = expert
        chunks[CHUNK_FROM, count] = sender
        chunks[CHUNK_TO, count] = taker
        chunks[CHUNK_TOKENS, count] = tokens
        count += 1
        left[expert] -= tokens
        load[sender] -= tokens
        load[taker] += tokens
        received[taker] += 1
        for p in (sender, taker):
            excess[p], room[p] = standing(
                target, load[p], speed[p], cap[p], received[p], spare[p], transfer, memory, smallest
            )


@kernel
def replay(chunks: Int64, count: int, state: State) -> None:
    """Apply chunks to the loads at home."""
    load, received = state.load, state.received
    for c in range(count):
        tokens = chunks[CHUNK_TOKENS, c]
        load[chunks[CHUNK_FROM, c]] -= tokens
        load[chunks[CHUNK_TO, c]] += tokens
        received[chunks[CHUNK_TO, c]] += 1


@kernel
def take_back(target: float, chunks: Int64, count: int, domain: Domain, costs: Costs, state: State) -> int:
    """Return tokens to their home where it has room left at `target`; drop chunks that become empty.

    Last chunk first: a device passes room on before it is given room, so what a chunk returns can be returned further
    by earlier ones. No device gains load above its limit.

    Returns:
        Number of chunks left; they keep their order.
    """
    cap, speed, load, received = domain.cap, domain.speed, state.load, state.received
    transfer, memory, smallest = costs.transfer, costs.memory, costs.smallest
    for c in range(count - 1, -1, -1):
        p, q, tokens = chunks[CHUNK_FROM, c], chunks[CHUNK_TO, c], chunks[CHUNK_TOKENS, c]
        back = limit_at(target, speed[p], cap[p], received[p], transfer, memory) - load[p]
        back = tokens if back >= tokens else max(min(back, tokens - smallest), 0)
        load[p] += back
        load[q] -= back
        chunks[CHUNK_TOKENS, c] = tokens - back
        received[q] -= back == tokens
    kept = 0
    for c in range(count):
        if chunks[CHUNK_TOKENS, c] > 0:
            for row in range(4):
                chunks[row, kept] = chunks[row, c]
            kept += 1
    return kept


@kernel
def finish_time(domain: Domain, costs: Costs, state: State) -> tuple[float, int]:
    """Largest device time of a domain, and tokens above its memory caps."""
    cap, speed, load, received = domain.cap, domain.speed, state.load, state.received
    worst, short = 0.0, 0
    for p in range(len(load)):
        worst = max(worst, load[p] / speed[p] + costs.transfer * received[p])
        short += max(load[p] + costs.memory * received[p] - cap[p], 0)
    return worst, short
