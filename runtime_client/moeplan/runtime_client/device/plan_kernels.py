"""Triton kernels of what ranks agree on: counts, the plan that the host makes of them, and the rows of tokens."""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.programs import program
from moeplan.runtime_client.device.signal_kernels import clock, fence, meet_peers

__all__ = ["count", "place", "plan", "total"]

_UNFILLED = tl.constexpr(2**31 - 1)


@program("pairs")
def count(
    index: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
    tallies: tl.tensor,
    pairs: tl.tensor,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A block for each `CHUNK` pairs: how often each expert is chosen, and how often before by the same chunk.

    Args:
        index: int64[pairs].
        weight: [pairs].
        order: int32[pairs], out: choices of the same expert by earlier pairs of the chunk.
        tallies: int32[chunks, COLUMNS], out: choices of each expert; choices out of range; weights not finite.
        pairs: Number of pairs.
    """
    chunk = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + lanes
    inside = pair < pairs
    expert = tl.load(index + pair, mask=inside, other=0).to(tl.int32)
    wide = tl.load(index + pair, mask=inside, other=0)
    outside = (wide < 0) | (wide >= EXPERTS)
    expert = tl.where(inside & ~outside, expert, EXPERTS)
    share = tl.load(weight + pair, mask=inside, other=0.0).to(tl.float32)
    # Infinite or not a number: the difference is not a number.
    bad = (share - share) != 0.0
    same = (expert[:, None] == expert[None, :]) & (lanes[None, :] < lanes[:, None])
    tl.store(order + pair, tl.sum(same.to(tl.int32), axis=1), mask=inside)
    for first in range(0, EXPERTS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        chosen = tl.sum((expert[:, None] == column[None, :]).to(tl.int32), axis=0)
        tl.store(tallies + chunk * COLUMNS + column, chosen, mask=column < EXPERTS)
    tl.store(tallies + chunk * COLUMNS + EXPERTS, tl.sum((inside & outside).to(tl.int32)))
    tl.store(tallies + chunk * COLUMNS + EXPERTS + 1, tl.sum(bad.to(tl.int32)))


@program("rank", "chunks", "excess", "layer", "number", "gathered")
def total(
    tallies: tl.tensor,
    table: tl.tensor,
    peers: tl.tensor,
    rank: tl.tensor,
    chunks: tl.tensor,
    excess: tl.tensor,
    layer: tl.tensor,
    number: tl.tensor,
    told: tl.tensor,
    gathered: tl.tensor,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    TOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """A block for each `BLOCK` columns: tallies become those of earlier chunks, and totals go to all ranks.

    Args:
        tallies: int32[chunks, COLUMNS], changed in place.
        table: int32[ranks, ROW] in symmetric memory; this rank's row is written on every rank. Behind the totals
            it holds `excess`, `layer`, `number`, `told` and `gathered`.
        number: Of the pass of the layer.
        told: int32[TOLD], what else the rank tells.
        gathered: How often it has gathered experts.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    carry = tl.zeros([BLOCK], tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        where = tallies + chunk[:, None] * COLUMNS + column[None, :]
        mask = (chunk < chunks)[:, None] & inside[None, :]
        values = tl.load(where, mask=mask, other=0)
        sums = tl.cumsum(values, axis=0)
        tl.store(where, carry[None, :] + sums - values, mask=mask)
        carry += tl.sum(values, axis=0)
    for peer in range(RANKS):
        row = table + tl.load(peers + peer) * 4 + rank * ROW
        tl.store(row + column, carry, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(row + COLUMNS, excess)
            tl.store(row + COLUMNS + 1, layer)
            tl.store(row + COLUMNS + 2, number)
            words = tl.arange(0, 8)
            tl.store(row + COLUMNS + 3 + words, tl.load(told + words, mask=words < TOLD, other=0), mask=words < TOLD)
            tl.store(row + COLUMNS + 3 + TOLD, gathered)


@program("rank", "limit", "layer")
def plan(
    state: tl.tensor,
    flags: tl.tensor,
    abort: tl.tensor,
    peers: tl.tensor,
    rank: tl.tensor,
    limit: tl.tensor,
    table: tl.tensor,
    answer: tl.tensor,
    host_words: tl.tensor,
    host_table: tl.tensor,
    host_answer: tl.tensor,
    layer: tl.tensor,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    TABLE: tl.constexpr,
    ANSWER: tl.constexpr,
    REQUEST: tl.constexpr,
    LAYER: tl.constexpr,
    ANSWERED: tl.constexpr,
    ABORTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one warp: meet, hand the counts of all ranks to the host's planner, and fetch its answer.

    Each warp would ask for the answer on its own, over a link that takes a microsecond for each question.

    Args:
        table: int32[TABLE], counts of all ranks.
        answer: int32[ANSWER], out; its first word is not zero where there is no plan.
        host_words: int64 words in host memory: the request, its layer, the last request answered, what was aborted.
        host_table: int32[TABLE] in host memory.
        host_answer: int32[ANSWER] in host memory.
        layer: Number of the layer, for messages.
    """
    number = meet_peers(state, flags, abort, peers, rank, limit, RANKS, LANES)
    for first in range(0, TABLE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(host_table + at, tl.load(table + at, mask=at < TABLE, other=0, volatile=True), mask=at < TABLE)
    tl.store(host_words + LAYER, layer)
    tl.debug_barrier()
    fence()
    stopped = tl.load(abort, volatile=True)
    if stopped == 0:
        tl.store(host_words + REQUEST, number)
    waited = tl.zeros([], tl.int64)
    start = clock(waited)
    answered = tl.load(host_words + ANSWERED, volatile=True)
    while (answered != number) & (stopped == 0):
        waited += 1
        if clock(waited) - start > limit:
            lanes = tl.arange(0, LANES)
            offsets = tl.load(peers + lanes, mask=lanes < RANKS, other=0) * 2
            missing = tl.zeros([LANES], tl.int64) + rank + 1
            tl.atomic_xchg(abort + offsets, missing, mask=lanes < RANKS, scope="sys")
        answered = tl.load(host_words + ANSWERED, volatile=True)
        stopped = tl.load(abort, volatile=True)
    fence()
    tl.debug_barrier()
    stopped = tl.load(abort, volatile=True)
    if stopped == 0:
        for first in range(0, ANSWER, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(answer + at, tl.load(host_answer + at, mask=at < ANSWER, other=0, volatile=True), mask=at < ANSWER)
    else:
        for first in range(0, ANSWER, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(answer + at, (at == 0).to(tl.int32), mask=at < ANSWER)
        tl.store(host_words + ABORTED, stopped)


@program("pairs", "rank")
def place(
    index: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
    before: tl.tensor,
    answer: tl.tensor,
    target: tl.tensor,
    where: tl.tensor,
    share: tl.tensor,
    peers: tl.tensor,
    pairs: tl.tensor,
    rank: tl.tensor,
    RANKS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    BEGIN: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The row of the group that each pair goes to, -1 where there is no plan; every rank learns which go to it.

    The pairs of an expert, in their order, go to its replicas in the order of their devices, so many to each.

    Args:
        index: int64[pairs].
        weight: [pairs].
        order: int32[pairs], as `count` left it.
        before: int32[chunks, COLUMNS], as `total` left the tallies.
        answer: The plan; see `routes`.
        target: int32[pairs], out.
        where: int32[ranks, PAIRS] in symmetric memory, out: the row of each pair on the rank whose memory it is, -1 if
            it goes elsewhere, or if the source has no such pair.
        share: float32[ranks, PAIRS] in symmetric memory, out: the weights.
        pairs: Number of pairs of this rank.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    planned = tl.load(answer) == 0
    wide = tl.load(index + pair, mask=inside, other=0)
    known = inside & (wide >= 0) & (wide < EXPERTS)
    expert = tl.where(known, wide, 0).to(tl.int32)
    mine = tl.load(before + (pair // CHUNK) * COLUMNS + expert, mask=known, other=0)
    mine += tl.load(order + pair, mask=known, other=0)
    first = tl.load(answer + FIRST + expert)
    end = tl.load(answer + FIRST + expert + 1)
    chosen = first
    for step in range(1, tl.load(answer + 1)):
        begin = tl.load(answer + BEGIN + first + step, mask=first + step < end, other=_UNFILLED)
        chosen += (begin <= mine).to(tl.int32)
    chosen = tl.where(planned, chosen, 0)
    goal = tl.load(answer + TARGET + chosen) + mine - tl.load(answer + BEGIN + chosen)
    goal = tl.where(planned & known, goal, -1)
    tl.store(target + pair, goal, mask=inside)
    value = tl.load(weight + pair, mask=inside, other=0.0).to(tl.float32)
    for peer in range(RANKS):
        at = tl.load(peers + peer) * 4 + rank * PAIRS + pair
        here = (goal >= 0) & (goal // ROWS == peer)
        tl.store(where + at, tl.where(here, goal % ROWS, -1), mask=pair < PAIRS)
        tl.store(share + at, value, mask=here)
