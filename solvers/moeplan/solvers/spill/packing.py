"""Packing at a given target: which device hands how many tokens of which expert to which other device.

Devices appear by *position*: sorted by domain, so that a domain is the range [low, high), and the experts of position p
are ``w[first[p]:first[p + 1]]``. A device may be loaded up to its limit at the target; what is above is its excess,
what is below its room. A chunk moves tokens of one expert from a device with excess to one with room.

The point of the method is what happens to room that the sender does not need. When the last spare slot of a receiver is
used, the chunk fills all of its room even if the sender's excess is smaller: the sender then has that room itself, with
its own slots still free, and the next device can use it. Each chunk thus settles one device exactly and no room is
lost, unless no expert is large enough to carry it. (A star of home devices around each receiver, as in UltraEP and
LLEP, loses it.) Room passed on that nobody needed in the end is returned by `take_back`.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.arrays import Float64, Int64
from moeplan.solvers.kernel import kernel

__all__ = [
    "CHUNK_EXPERT",
    "CHUNK_FROM",
    "CHUNK_TO",
    "CHUNK_TOKENS",
    "RULES",
    "finish_time",
    "pack",
    "replay",
    "start_at_home",
    "take_back",
]

CHUNK_EXPERT, CHUNK_FROM, CHUNK_TO, CHUNK_TOKENS = range(4)
"""Rows of a table of chunks."""

RULES = 3
"""Ways to choose a receiver and an expert; `pack` takes one of them."""

_POSITIONS = 2**16
"""A count and a position share a word, count first: the plain maximum of words finds both, in vector instructions."""


@kernel
def limit_at(target: float, speed: float, cap: int, received: int, transfer: float, memory: int) -> int:
    """Tokens that a device may compute within `target` and its memory, when it has received that many replicas."""
    within_time = max((target - transfer * received) * speed, 0.0)
    return np.int64(min(within_time, float(cap - memory * received)))


@kernel
def settle(
    p: int,
    target: float,
    spare: Int64,
    cap: Int64,
    speed: Float64,
    costs: Float64,
    load: Int64,
    received: Int64,
    room: Int64,
    excess: Int64,
) -> None:
    """Recompute room and excess of position p. Room too small for a replica counts as none."""
    transfer, memory, smallest = costs[0], np.int64(costs[1]), np.int64(costs[2])
    excess[p] = max(load[p] - limit_at(target, speed[p], cap[p], received[p], transfer, memory), 0)
    room[p] = 0
    if received[p] < spare[p]:
        free = limit_at(target, speed[p], cap[p], received[p] + 1, transfer, memory) - load[p]
        if free >= smallest:
            room[p] = free


@kernel
def neediest(excess: Int64, low: int, high: int) -> int:
    """Position with the largest excess, -1 if none has any."""
    word = np.int64(-1)
    for p in range(low, high):
        word = max(word, excess[p] * _POSITIONS + p)
    return word % _POSITIONS if word >= _POSITIONS else np.int64(-1)


@kernel
def receiver(room: Int64, low: int, high: int, need: int, largest: int, last_slot: Int64, wasteful: bool) -> int:
    """Position that takes a chunk: the snuggest room for `need`, else the largest room; -1 if there is no room.

    Args:
        room: Room of each position.
        low: First position of the domain.
        high: End of the domain.
        need: Tokens that the sender would like to send, at most `largest`.
        largest: Tokens that the sender's largest expert can fill.
        last_slot: Whether a position has one spare slot left.
        wasteful: Accept a room that the chunk leaves partly unused for good even if a smaller one would be filled.
    """
    never = np.int64(2**62)
    snug, full = never, np.int64(-1)
    for p in range(low, high):
        word = room[p] * _POSITIONS + p
        if room[p] >= need:
            snug = min(snug, word)
        else:
            full = max(full, word)
    fills = full >= _POSITIONS
    if snug < never:
        p = snug % _POSITIONS
        if wasteful or not fills or not last_slot[p] or room[p] <= largest:
            return p
    return full % _POSITIONS if fills else np.int64(-1)


@kernel
def largest_expert(left: Int64, begin: int, end: int) -> int:
    """Index in [begin, end) of the expert with most tokens left, -1 for an empty range."""
    best = np.int64(-1)
    for i in range(begin, end):
        if best < 0 or left[i] > left[best]:
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
def start_at_home(w: Int64, first: Int64, load: Int64, received: Int64) -> None:
    """The loads when every token stays at its expert's home."""
    for p in range(len(load)):
        load[p] = 0
        received[p] = 0
        for i in range(first[p], first[p + 1]):
            load[p] += w[i]


@kernel
def pack(
    target: float,
    rule: int,
    low: int,
    high: int,
    w: Int64,
    first: Int64,
    spare: Int64,
    cap: Int64,
    speed: Float64,
    costs: Float64,
    load: Int64,
    received: Int64,
    room: Int64,
    excess: Int64,
    last_slot: Int64,
    left: Int64,
    chunks: Int64,
) -> tuple[int, int]:
    """Move chunks inside one domain until no device exceeds its limit at `target`, or nothing more can move.

    Args:
        target: Time that no device should exceed, in tokens at speed 1.
        rule: 0 avoids lost room; 1 prefers finishing senders; 2 is 0 but sends the largest expert.
        low: First position of the domain.
        high: End of the domain.
        w: int64[experts] tokens by position; read only.
        first: int64[positions + 1].
        spare: int64[positions], spare slots; cap: token caps; speed: speeds.
        cap: int64[positions].
        speed: float64[positions].
        costs: float64[3], transfer tokens, replica tokens, fewest tokens of a chunk.
        load: int64[positions]; in: loads at home, out: loads after the chunks. So is `received`.
        received: Replicas received.
        room: Scratch of one word per position; so are `excess` and `last_slot`.
        excess: Scratch.
        last_slot: Scratch.
        left: int64[experts], out: tokens of each expert that are still at home.
        chunks: int64[4, slots], out.

    Returns:
        Number of chunks, and tokens above the limits that could not be moved (0: the target is met).
    """
    smallest = np.int64(costs[2])
    for i in range(first[low], first[high]):
        left[i] = w[i]
    for p in range(low, high):
        settle(p, target, spare, cap, speed, costs, load, received, room, excess)
        last_slot[p] = received[p] + 1 == spare[p]
    count, stuck = 0, np.int64(0)
    while True:
        sender = neediest(excess, low, high)
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
        target_p = receiver(room, low, high, min(need, largest), largest, last_slot, rule == 1)
        if target_p < 0:
            for p in range(low, high):
                stuck += excess[p]
            return count, stuck
        tokens = min(largest, room[target_p])
        if not last_slot[target_p]:
            tokens = min(tokens, need)
        if rule != 2:
            expert = smallest_covering(left, begin, end, tokens, expert)
        chunks[CHUNK_EXPERT, count] = expert
        chunks[CHUNK_FROM, count] = sender
        chunks[CHUNK_TO, count] = target_p
        chunks[CHUNK_TOKENS, count] = tokens
        count += 1
        left[expert] -= tokens
        load[sender] -= tokens
        load[target_p] += tokens
        received[target_p] += 1
        last_slot[target_p] = received[target_p] + 1 == spare[target_p]
        settle(sender, target, spare, cap, speed, costs, load, received, room, excess)
        settle(target_p, target, spare, cap, speed, costs, load, received, room, excess)


@kernel
def replay(chunks: Int64, count: int, load: Int64, received: Int64) -> None:
    """Apply chunks to the loads at home."""
    for c in range(count):
        tokens = chunks[CHUNK_TOKENS, c]
        load[chunks[CHUNK_FROM, c]] -= tokens
        load[chunks[CHUNK_TO, c]] += tokens
        received[chunks[CHUNK_TO, c]] += 1


@kernel
def take_back(
    target: float,
    chunks: Int64,
    count: int,
    cap: Int64,
    speed: Float64,
    costs: Float64,
    load: Int64,
    received: Int64,
) -> int:
    """Return tokens to their home where it has room left at `target`; drop chunks that become empty.

    Last chunk first: a device receives room from a chunk before it passes room on, so what a chunk returns can be
    returned further by the earlier ones. Senders never gain load above their limit.

    Returns:
        Number of chunks left; they keep their order.
    """
    transfer, memory, smallest = costs[0], np.int64(costs[1]), np.int64(costs[2])
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
            chunks[:, kept] = chunks[:, c]
            kept += 1
    return kept


@kernel
def finish_time(
    low: int, high: int, cap: Int64, speed: Float64, costs: Float64, load: Int64, received: Int64
) -> tuple[float, int]:
    """Largest device time of a domain, and tokens above its memory caps."""
    worst, short = 0.0, np.int64(0)
    for p in range(low, high):
        worst = max(worst, load[p] / speed[p] + costs[0] * received[p])
        short += max(load[p] + np.int64(costs[1]) * received[p] - cap[p], 0)
    return worst, short
