"""The Triton kernels of a pass. Only one-block kernels wait; kernels that move data never do.

Symmetric memory is named by what this rank sees of it. ``peers`` is int64[ranks]: where each rank's memory begins as
seen from the beginning of this rank's, in units of 16 bytes, so that compilers see what accesses are aligned.
``EACH`` is the number of elements in 16 bytes. Rows of a rank's computation are numbered ``0..rows-1``, experts at
home from 0 and lent ones from the place where their region begins; ``device * rows + row`` names a row of the group.
Tokens of the group are numbered ``rank * TOKENS + token``, ``GROUP_TOKENS`` in all. A token travels once to each rank
that computes one of its choices, and the sum of that rank's results travels back (as in DeepEP).

With ``TRITON_INTERPRET=1`` the same kernels run on CPU memory that processes share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from moeplan.runtime_client.device.routes import LOAN

__all__ = [
    "CHUNK",
    "ON_GPU",
    "activate",
    "activate_backward",
    "arrange",
    "blocks_beside",
    "collect",
    "convert",
    "count",
    "fetch",
    "give_back",
    "hand_out",
    "lanes",
    "meet",
    "meet_for_loans",
    "offer",
    "place",
    "plan",
    "power_of_2",
    "processors",
    "take_back",
    "total",
]

CHUNK = 128
"""Pairs whose order a block of `count` finds by comparing all with all."""

ON_GPU = not triton.knobs.runtime.interpret
_GPU = tl.constexpr(ON_GPU)
_CHUNK = tl.constexpr(CHUNK)
_LOAN = tl.constexpr(LOAN)
_UNFILLED = tl.constexpr(2**31 - 1)


def program(function: Callable[..., Any]) -> Any:
    """A Triton kernel, or a part of one, compiled once for all numbers and for all places of single words."""
    numbers = ["rank", "layer", "tokens", "pairs", "chunks", "excess", "limit", "number", "gathered", "low", "apart"]
    numbers += ["replicas", "first", "home", "loans", "end", "ends", "fills"]
    return triton.jit(function, do_not_specialize=numbers)


# Signals


@program
def fence() -> tl.tensor:
    """A fence of the system: all processors see what this thread did before it ahead of what follows."""
    if _GPU:
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


if ON_GPU:

    @program
    def clock(waited: tl.tensor) -> tl.tensor:
        """Nanoseconds."""
        return tl.extra.cuda.globaltimer().to(tl.int64)

else:

    def clock(waited: tl.tensor) -> tl.tensor:
        """A microsecond for each question, at which other ranks may have the processor for a millisecond."""
        time.sleep(0.001)
        return waited * 1000


@program
def meet_peers(
    state: tl.tensor,
    flags: tl.tensor,
    abort: tl.tensor,
    peers: tl.tensor,
    rank: tl.tensor,
    limit: tl.tensor,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """Tell every rank that this one is here, and wait until all are. Returns the number of the meeting.

    A rank that waits longer than `limit` nanoseconds tells all that it does not wait any more: ``abort`` holds 1 + the
    rank that it missed, and no meeting waits from then on.
    """
    lanes = tl.arange(0, LANES)
    here = lanes < RANKS
    number = tl.load(state) + 1
    fence()
    tl.debug_barrier()
    offsets = tl.load(peers + lanes, mask=here, other=0) * 2
    tl.atomic_xchg(flags + offsets + rank, tl.zeros([LANES], tl.int64) + number, mask=here, sem="release", scope="sys")
    waited = tl.zeros([], tl.int64)
    start = clock(waited)
    seen = tl.load(flags + lanes, mask=here, other=number, volatile=True)
    stopped = tl.load(abort, volatile=True)
    while (tl.min(seen) < number) & (stopped == 0):
        waited += 1
        if clock(waited) - start > limit:
            missing = tl.min(tl.where(seen < number, lanes, RANKS)).to(tl.int64)
            tl.atomic_xchg(abort + offsets, tl.zeros([LANES], tl.int64) + missing + 1, mask=here, scope="sys")
        seen = tl.load(flags + lanes, mask=here, other=number, volatile=True)
        stopped = tl.load(abort, volatile=True)
    fence()
    tl.debug_barrier()
    tl.store(state, number)
    return number


@program
def meet(
    state: tl.tensor,
    flags: tl.tensor,
    abort: tl.tensor,
    peers: tl.tensor,
    rank: tl.tensor,
    limit: tl.tensor,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """One block: a meeting of all ranks. What any rank's kernels wrote before it, all ranks' kernels after it see."""
    meet_peers(state, flags, abort, peers, rank, limit, RANKS, LANES)


@program
def meet_for_loans(
    state: tl.tensor,
    flags: tl.tensor,
    abort: tl.tensor,
    peers: tl.tensor,
    rank: tl.tensor,
    limit: tl.tensor,
    answer: tl.tensor,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    MOST: tl.constexpr,
    REPLICAS: tl.constexpr,
) -> None:
    """`meet` if the plan has more than so many replicas of any expert, which all ranks see alike."""
    if tl.load(answer + MOST) > REPLICAS:
        meet_peers(state, flags, abort, peers, rank, limit, RANKS, LANES)


# Counts and plan


@program
def count(
    index: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
    tallies: tl.tensor,
    pairs: tl.tensor,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    lanes = tl.arange(0, _CHUNK)
    pair = chunk * _CHUNK + lanes
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


@program
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


@program
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


@program
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
    mine = tl.load(before + (pair // _CHUNK) * COLUMNS + expert, mask=known, other=0)
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


# Rows and weights on their way


@program
def hand_out(
    source: tl.tensor,
    target: tl.tensor,
    arrived: tl.tensor,
    peers: tl.tensor,
    answer: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    AGAIN: tl.constexpr,
    FULLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A block for each `BLOCK` tokens: write each token once to every rank that computes one of its choices.

    If it is done `AGAIN`, then only where a rank has more rows than the `SPAN` of a round, of which nothing was kept.

    Args:
        source: [tokens, WIDTH].
        target: int32[tokens * CHOICES].
        arrived: [ranks, TOKENS, WIDTH] in symmetric memory, out.
        answer: The plan.
    """
    if AGAIN and tl.load(answer + FULLEST) <= SPAN:
        return
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    row = (rank * TOKENS + token).to(tl.int64)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < WIDTH)[None, :]
        values = tl.load(source + token.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=there[:, None] & inside)
        for choice in tl.static_range(CHOICES):
            goal = tl.load(target + token * CHOICES + choice, mask=there, other=-1)
            leads = leads_to(target, token, there, goal, choice, CHOICES, ROWS, ROWS, ROWS)
            units = tl.load(peers + goal // ROWS, mask=leads, other=0)
            to = arrived + units[:, None] * EACH + row[:, None] * WIDTH + column[None, :]
            tl.store(to, values, mask=leads[:, None] & inside)


@program
def offer(
    experts: tl.tensor,
    offered: tl.tensor,
    answer: tl.tensor,
    ELEMENTS: tl.constexpr,
    LENT: tl.constexpr,
    LOANS: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Write lent experts to where borrowers can read them, in the type that computes.

    Args:
        experts: [owned, ELEMENTS], this rank's.
        offered: [most that a rank lends, ELEMENTS] in symmetric memory, out: those that this rank lends, by row.
        answer: The plan.
    """
    place = tl.full([], -1, tl.int64)
    for loan in range(tl.load(answer + LENT)):
        at = answer + LOANS + _LOAN * loan
        if tl.load(at + 3) == 0:  # its first borrower
            place += 1
            mine = experts + tl.load(at).to(tl.int64) * ELEMENTS
            for first in range(tl.program_id(0) * PIECE, ELEMENTS, tl.num_programs(0) * PIECE):
                piece = first + tl.arange(0, PIECE)
                value = tl.load(mine + piece, mask=piece < ELEMENTS).to(offered.dtype.element_ty)
                tl.store(offered + place * ELEMENTS + piece, value, mask=piece < ELEMENTS)


@program
def fetch(
    offered: tl.tensor,
    lent: tl.tensor,
    kept: tl.tensor,
    answer: tl.tensor,
    peers: tl.tensor,
    rank: tl.tensor,
    EACH: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BORROWED: tl.constexpr,
    SHARED: tl.constexpr,
    SHARERS: tl.constexpr,
    OWNERS: tl.constexpr,
    OTHERS: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Read borrowed experts from their owners. Of one with several borrowers each reads a part, and then those of the
    `OTHERS` from them: it leaves its owner once.

    Reading leaves the way to memory free for kernels beside it, which writing faster than a link takes it would block.

    Args:
        offered: [most that a rank lends, ELEMENTS] in symmetric memory.
        lent: [slots, ELEMENTS] in symmetric memory: parts that others read, out where they are read from the owner.
        kept: [slots, ELEMENTS], out.
        answer: The plan.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    for slot in range(tl.load(answer + BORROWED)):
        to = tl.full([], slot, tl.int64) * ELEMENTS
        owner, place = tl.load(answer + OWNERS + 2 * slot), tl.load(answer + OWNERS + 2 * slot + 1)
        begin, end = tl.load(answer + SHARED + slot), tl.load(answer + SHARED + slot + 1)
        for sharer in range(begin, end):
            device, other = tl.load(answer + SHARERS + 2 * sharer), tl.load(answer + SHARERS + 2 * sharer + 1)
            if (device != rank) == OTHERS:
                if OTHERS:
                    whole = lent + tl.load(peers + device) * EACH + other.to(tl.int64) * ELEMENTS
                else:
                    whole = offered + tl.load(peers + owner) * EACH + place.to(tl.int64) * ELEMENTS
                each = (block * (end - begin) + sharer - begin) * PIECE
                for first in range(each, ELEMENTS, blocks * (end - begin) * PIECE):
                    piece = first + tl.arange(0, PIECE)
                    value = tl.load(whole + piece, mask=piece < ELEMENTS)
                    tl.store(kept + to + piece, value, mask=piece < ELEMENTS)
                    if not OTHERS and end - begin > 1:
                        tl.store(lent + to + piece, value, mask=piece < ELEMENTS)


@program
def convert(
    source: tl.tensor,
    out: tl.tensor,
    OWNED: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Elements `BEGIN` to `END` of each expert, [OWNED, ELEMENTS], in another type."""
    each: tl.constexpr = (END - BEGIN + PIECE - 1) // PIECE
    for nth in range(tl.program_id(0), OWNED * each, tl.num_programs(0)):
        element = BEGIN + nth % each * PIECE + tl.arange(0, PIECE)
        at = tl.full([], nth // each, tl.int64) * ELEMENTS + element
        value = tl.load(source + at, mask=element < END)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=element < END)


@program
def leads_to(
    target: tl.tensor,
    token: tl.tensor,
    there: tl.tensor,
    goal: tl.tensor,
    choice: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """Whether this choice, which goes to `goal`, is the token's first that goes to its rank and round."""
    leads = goal >= 0
    for earlier in tl.static_range(choice):
        other = tl.load(target + token * CHOICES + earlier, mask=there, other=-1)
        leads = leads & ((other < 0) | (computed_by(other, ROWS, AWAY, SPAN) != computed_by(goal, ROWS, AWAY, SPAN)))
    return leads


@program
def computed_by(goal: tl.tensor, ROWS: tl.constexpr, AWAY: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """A number for the rank and the round that compute a row of the group."""
    return goal // ROWS * (AWAY // SPAN) + goal % ROWS % AWAY // SPAN


@program
def in_round(row: tl.tensor, low: tl.tensor, JOINED: tl.constexpr, AWAY: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """Place of a row among those of the round that begins at row `low` of each region; -1 if it is not one of them."""
    place = row - low
    begin = tl.zeros_like(row)
    if not JOINED:
        place = tl.where(row >= AWAY, place - AWAY, place)
        begin = tl.where(row >= AWAY, SPAN, 0)
    return tl.where((row >= 0) & (place >= 0) & (place < SPAN), begin + place, -1)


@program
def arrange(
    arrived: tl.tensor,
    where: tl.tensor,
    share: tl.tensor,
    rows: tl.tensor,
    scale: tl.tensor,
    kept_where: tl.tensor,
    answer: tl.tensor,
    low: tl.tensor,
    CHOICES: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    JOINED: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENDS: tl.constexpr,
    FILLS: tl.constexpr,
    OWNED: tl.constexpr,
    REPLICAS: tl.constexpr,
) -> None:
    """Tokens that have arrived to the rows of a round; in the forward pass, also what backward needs.

    Rows between those of an expert and the next become zeros.

    Args:
        arrived: [GROUP_TOKENS, WIDTH].
        where: int32[GROUP_TOKENS, CHOICES], their rows.
        share: float32[GROUP_TOKENS, CHOICES], weights, read in the forward pass.
        rows: [rows of a round, WIDTH], out.
        scale: float32[rows of a round], out in the forward pass: the weight of each row.
        kept_where: As `where`, out in the forward pass.
        answer: The plan.
        low: First row of the round.
    """
    for start in range(tl.program_id(0) * BLOCK, GROUP_TOKENS, tl.num_programs(0) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < GROUP_TOKENS
        used = tl.zeros([BLOCK], tl.int1)
        for choice in tl.static_range(CHOICES):
            whole = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
            row = in_round(whole, low, JOINED, AWAY, SPAN)
            used = used | (row >= 0)
            if not BACKWARD:
                value = tl.load(share + token * CHOICES + choice, mask=row >= 0, other=0.0)
                tl.store(scale + row, value, mask=row >= 0)
                tl.store(kept_where + token * CHOICES + choice, whole, mask=inside)
        for first in range(0, WIDTH, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (column < WIDTH)[None, :]
            at = arrived + token.to(tl.int64)[:, None] * WIDTH + column[None, :]
            values = tl.load(at, mask=used[:, None] & mask)
            for choice in tl.static_range(CHOICES):
                whole = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
                row = in_round(whole, low, JOINED, AWAY, SPAN)
                to = rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                tl.store(to, values, mask=(row >= 0)[:, None] & mask)
    clear(
        rows, scale, answer, low, tl.program_id(0), tl.num_programs(0), JOINED, AWAY, SPAN, WIDTH, BACKWARD, BLOCK,
        COLUMNS, ENDS, FILLS, OWNED, REPLICAS,
    )  # fmt: skip


@program
def clear(
    rows: tl.tensor,
    scale: tl.tensor,
    answer: tl.tensor,
    low: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    JOINED: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENDS: tl.constexpr,
    FILLS: tl.constexpr,
    OWNED: tl.constexpr,
    REPLICAS: tl.constexpr,
) -> None:
    """Zeros into what `arrange` leaves between the rows of experts, and into their weights; the share of one block."""
    for replica in range(block, REPLICAS, blocks):
        begin = 0
        if not JOINED and replica >= OWNED:
            begin = AWAY
        end = begin + tl.load(answer + ENDS + replica)
        for start in range(begin + tl.load(answer + FILLS + replica), end, BLOCK):
            whole = start + tl.arange(0, BLOCK)
            row = tl.where(whole < end, in_round(whole, low, JOINED, AWAY, SPAN), -1)
            if not BACKWARD:
                tl.store(scale + row, tl.zeros([BLOCK], tl.float32), mask=row >= 0)
            for first in range(0, WIDTH, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                to = rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                nothing = tl.zeros([BLOCK, COLUMNS], rows.dtype.element_ty)
                tl.store(to, nothing, mask=(row >= 0)[:, None] & (column < WIDTH)[None, :])


@program
def take_back(
    gradient: tl.tensor,
    borrowed: tl.tensor,
    answer: tl.tensor,
    peers: tl.tensor,
    scale: tl.tensor,
    EACH: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LENT: tl.constexpr,
    LOANS: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Add what borrowers found to the gradients of experts that were lent, in float32 and in the order of the list.

    Args:
        gradient: [owned, ELEMENTS], changed in place.
        borrowed: [slots, ELEMENTS] in symmetric memory, what borrowers found.
        answer: The plan.
        scale: float, what the sums are multiplied by.
    """
    for first in range(tl.program_id(0) * PIECE, ELEMENTS, tl.num_programs(0) * PIECE):
        piece = first + tl.arange(0, PIECE)
        inside = piece < ELEMENTS
        # Loans of one expert follow one another: it is read and written once.
        before = tl.full([], -1, tl.int64)
        sums = tl.zeros(piece.shape, tl.float32)
        for loan in range(tl.load(answer + LENT)):
            at = answer + LOANS + _LOAN * loan
            mine, device, slot = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2).to(tl.int64)
            if mine != before:
                if before >= 0:
                    tl.store(gradient + before * ELEMENTS + piece, sums * scale, mask=inside)
                sums = tl.load(gradient + mine * ELEMENTS + piece, mask=inside, other=0.0).to(tl.float32)
                before = mine
            away = tl.load(peers + device) * EACH
            sums += tl.load(borrowed + away + slot * ELEMENTS + piece, mask=inside, other=0.0).to(tl.float32)
        if before >= 0:
            tl.store(gradient + before * ELEMENTS + piece, sums * scale, mask=inside)


@program
def give_back(
    at_home: tl.tensor,
    away: tl.tensor,
    where: tl.tensor,
    share: tl.tensor,
    to_weight: tl.tensor,
    returned: tl.tensor,
    returned_weight: tl.tensor,
    peers: tl.tensor,
    low: tl.tensor,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    JOINED: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sum each token's results of a round and write them to its source.

    Sums are taken in float32, in the order of the choices, weighted in the forward pass.

    Args:
        at_home: [SPAN, WIDTH], results.
        away: [SPAN, WIDTH], those of lent experts, where they are not `JOINED`.
        where: int32[GROUP_TOKENS, CHOICES], the row of each pair, -1 where it is not computed here.
        share: float32[GROUP_TOKENS, CHOICES], the weights, read in the forward pass.
        to_weight: float32[rows of a round], gradients of the routers' weights, read in the backward pass.
        returned: [TOKENS, CHOICES, WIDTH] in symmetric memory, out at the token's first choice of this rank and round.
        returned_weight: float32[TOKENS, CHOICES] in symmetric memory, out in the backward pass.
        low: First row of the round.
    """
    for start in range(tl.program_id(0) * BLOCK, GROUP_TOKENS, tl.num_programs(0) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < GROUP_TOKENS
        units = tl.load(peers + token // TOKENS, mask=inside, other=0)
        pair = (token % TOKENS) * CHOICES
        lead = tl.full([BLOCK], CHOICES, tl.int32)
        for choice in tl.static_range(CHOICES):
            row = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
            row = in_round(row, low, JOINED, AWAY, SPAN)
            lead = tl.where((row >= 0) & (lead == CHOICES), choice, lead)
            if BACKWARD:
                value = tl.load(to_weight + row, mask=row >= 0, other=0.0)
                tl.store(returned_weight + units * 4 + pair + choice, value, mask=row >= 0)
        to = (pair + lead).to(tl.int64)
        for first in range(0, WIDTH, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (column < WIDTH)[None, :]
            sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
            for choice in tl.static_range(CHOICES):
                row = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
                row = in_round(row, low, JOINED, AWAY, SPAN)
                here = row >= 0
                if not JOINED:
                    apart = row >= SPAN
                    at = away + (row - SPAN).to(tl.int64)[:, None] * WIDTH + column[None, :]
                    lent_values = tl.load(at, mask=apart[:, None] & mask, other=0.0).to(tl.float32)
                    here = here & (row < SPAN)
                at = at_home + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                values = tl.load(at, mask=here[:, None] & mask, other=0.0).to(tl.float32)
                if not JOINED:
                    values += lent_values
                if not BACKWARD:
                    values *= tl.load(share + token * CHOICES + choice, mask=row >= 0, other=0.0)[:, None]
                sums += values
            at = returned + units[:, None] * EACH + to[:, None] * WIDTH + column[None, :]
            tl.store(at, sums.to(returned.dtype.element_ty), mask=(lead < CHOICES)[:, None] & mask)


@program
def collect(
    returned: tl.tensor,
    target: tl.tensor,
    out: tl.tensor,
    gradients: tl.tensor,
    answer: tl.tensor,
    abort: tl.tensor,
    host_words: tl.tensor,
    tokens: tl.tensor,
    replicas: tl.tensor,
    apart: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    ABORTED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add up in float32 what each token got back from the ranks; not a number where the pass has failed.

    Args:
        returned: [tokens, CHOICES, WIDTH], the sum of a rank and round at the token's first choice that went there.
        target: int32[tokens * CHOICES].
        out: [tokens, WIDTH], out.
        gradients: Of the weights of experts, `apart` elements from each other; the first element is not a number where
            the pass has failed.
        replicas: Experts that have gradients.
    """
    stopped = tl.load(abort, volatile=True)
    failed = (tl.load(answer) != 0) | (stopped != 0)
    if failed & (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        nothing = tl.full([], float("nan"), tl.float32).to(gradients.dtype.element_ty)
        for replica in range(replicas):
            tl.store(gradients + tl.full([], replica, tl.int64) * apart, nothing)
    if (stopped != 0) & (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(host_words + ABORTED, stopped)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < tokens
    mask = (column < WIDTH)[None, :]
    sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for choice in tl.static_range(CHOICES):
        goal = tl.load(target + token * CHOICES + choice, mask=inside, other=-1)
        leads = leads_to(target, token, inside, goal, choice, CHOICES, ROWS, AWAY, SPAN)
        at = returned + (token.to(tl.int64) * CHOICES + choice)[:, None] * WIDTH + column[None, :]
        sums += tl.load(at, mask=leads[:, None] & mask, other=0.0).to(tl.float32)
    sums = tl.where(failed, float("nan"), sums)
    to = out + token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None] & mask)


# Activations


@program
def activation(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The activation of float32 values."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.maximum(x, 0.0)
    return y


@program
def slope(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The derivative of `activation`."""
    if NAME == "silu":
        gate = tl.sigmoid(x)
        y = gate * (1.0 + x * (1.0 - gate))
    elif NAME == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        y = (x > 0.0).to(tl.float32)
    return y


@program
def activate(
    first: tl.tensor,
    out: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``act(gate) * up`` of the rows before `end`, or ``act(up)``.

    Args:
        first: [rows, WIDTH or 2 * WIDTH], gate before up.
        out: [rows, WIDTH], out.
        end: int32, number of rows.
    """
    rows = tl.load(end)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        for left in range(0, WIDTH, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
            if GATED:
                at = first + row[:, None] * (2 * WIDTH) + column[None, :]
                value = activation(tl.load(at, mask=mask).to(tl.float32), NAME)
                value *= tl.load(at + WIDTH, mask=mask).to(tl.float32)
            else:
                at = first + row[:, None] * WIDTH + column[None, :]
                value = activation(tl.load(at, mask=mask).to(tl.float32), NAME)
            tl.store(out + row[:, None] * WIDTH + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@program
def activate_backward(
    gradient: tl.tensor,
    first: tl.tensor,
    scale: tl.tensor,
    to_first: tl.tensor,
    scaled: tl.tensor,
    to_weight: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The backward of `activate` for results that are weighted afterwards, and the gradients of the weights.

    With ``a`` the activations, ``w`` the weight of a row and ``g`` its gradient before weighting, `gradient` is that of
    ``a`` for w = 1. The gradient of the weight is then ``gradient . a``, that of the activations ``w * gradient``, and
    that of the second matrix needs ``w * a``.

    Args:
        gradient: [rows, WIDTH].
        first: As in `activate`.
        scale: float32[rows], the weights.
        to_first: As `first`, out.
        scaled: [rows, WIDTH], ``w * a``, out.
        to_weight: float32[rows], out.
        end: int32, number of rows.
    """
    rows = tl.load(end)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        used = row < rows
        weight = tl.load(scale + row, mask=used, other=0.0)[:, None]
        dots = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for left in range(0, WIDTH, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            mask = used[:, None] & (column < WIDTH)[None, :]
            narrow = row[:, None] * WIDTH + column[None, :]
            raw = tl.load(gradient + narrow, mask=mask, other=0.0).to(tl.float32)
            wide = row[:, None] * (2 * WIDTH) + column[None, :] if GATED else narrow
            gate = tl.load(first + wide, mask=mask, other=0.0).to(tl.float32)
            active = activation(gate, NAME)
            if GATED:
                up = tl.load(first + wide + WIDTH, mask=mask, other=0.0).to(tl.float32)
                tl.store(to_first + wide + WIDTH, (weight * raw * active).to(to_first.dtype.element_ty), mask=mask)
                turn = weight * raw * up * slope(gate, NAME)
                active *= up
            else:
                turn = weight * raw * slope(gate, NAME)
            tl.store(to_first + wide, turn.to(to_first.dtype.element_ty), mask=mask)
            tl.store(scaled + narrow, (weight * active).to(scaled.dtype.element_ty), mask=mask)
            dots += raw * active
        tl.store(to_weight + row, tl.sum(dots, axis=1), mask=used)


def lanes(ranks: int) -> int:
    """Lanes of a block that looks at all ranks at once."""
    return max(power_of_2(ranks), 2)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return int(triton.next_power_of_2(size))


def processors(device: torch.device) -> int:
    """Blocks that fill the device when each does many rows; two on CPUs."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def blocks_beside(device: torch.device) -> int:
    """Blocks that fill the links to the device's memory, and leave room for others on its processors."""
    return max(processors(device) // 4, 1)
