"""The Triton kernels of sharded experts: showing parts, adding up gradients, and what is left if ranks do not meet."""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.programs import program

__all__ = ["add_replicas", "show", "spoil"]


@program("rank")
def show(
    shard: tl.tensor,
    shown: tl.tensor,
    weights: tl.tensor,
    slots: tl.tensor,
    wanted: tl.tensor,
    rank: tl.tensor,
    SHOWN: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Convert this rank's part of each expert, for others and for its own slots.

    By so many blocks, which leave room for kernels that run beside them.

    Args:
        shard: [EXPERTS, WIDTH].
        shown: [EXPERTS, WIDTH], out for the experts that others want.
        weights: [slots, RANKS * WIDTH], out in the columns that this rank owns.
        slots: int32[EXPERTS], the slot of each on this rank, -1 if it has none.
        wanted: bool[EXPERTS], those that others read.
        SHOWN: Whether others have them already, so that only the rank's own slots are filled.
    """
    pieces: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    for nth in range(tl.program_id(0).to(tl.int64), EXPERTS * pieces, BLOCKS):
        expert = nth // pieces
        at = nth % pieces * PIECE + tl.arange(0, PIECE)
        slot = tl.load(slots + expert).to(tl.int64)
        if not SHOWN or slot >= 0:
            part = tl.load(shard + expert * WIDTH + at, mask=at < WIDTH)
            if shown.dtype.element_ty != tl.float64:
                part = part.to(tl.float32)  # as torch does on the way from float64 to 16 bits
            part = part.to(shown.dtype.element_ty)
            if not SHOWN and tl.load(wanted + expert) != 0:
                tl.store(shown + expert * WIDTH + at, part, mask=at < WIDTH)
            if slot >= 0:
                tl.store(weights + (slot * RANKS + rank) * WIDTH + at, part, mask=at < WIDTH)


@program("rank", "begin", "end", "count")
def add_replicas(
    arrived: tl.tensor,
    gradient: tl.tensor,
    after: tl.tensor,
    order: tl.tensor,
    start: tl.tensor,
    added: tl.tensor,
    total: tl.tensor,
    abort: tl.tensor,
    failed: tl.tensor,
    rank: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    count: tl.tensor,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_AFTER: tl.constexpr,
    DOUBLE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Add up this rank's part of the gradients of experts' replicas, in order.

    By so many blocks, which leave room for kernels that run beside them.

    Args:
        arrived: [replicas, WIDTH], parts that other ranks sent, by replica.
        gradient: [end - begin, FIRST], gradients of the replicas `begin` to `end - 1`, which are this rank's: the first
            columns of RANKS * WIDTH, or all of them.
        after: [end - begin, ...], the other columns.
        order: int64[replicas], replicas by expert.
        start: int64[EXPERTS + 1], where those of each expert begin in `order`.
        added: int64[count], the experts.
        total: [EXPERTS, WIDTH], out for these; all of it is not a number if a meeting has failed.
        abort: int64, not 0 if one has.
        failed: int64 in memory of the host, out: the same.
        STRIDE: Elements from a row of `gradient` to the next, and ``STRIDE_AFTER`` of `after`; constants, so that
            compilers see what accesses are aligned.
        DOUBLE: Whether to add in float64 rather than in float32.
        SCALE: What the sums are multiplied by.
    """
    aborted = tl.load(abort, volatile=True)
    if tl.program_id(0) == 0:
        tl.store(failed, aborted)
    pieces: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    experts = tl.where(aborted != 0, EXPERTS, count)
    for item in range(tl.program_id(0).to(tl.int64), experts * pieces, BLOCKS):
        expert = item // pieces
        expert = tl.load(added + expert, mask=aborted == 0, other=expert)
        at = item % pieces * PIECE + tl.arange(0, PIECE)
        inside = at < WIDTH
        sums = tl.zeros([PIECE], tl.float64 if DOUBLE else tl.float32)
        for nth in range(tl.load(start + expert), tl.load(start + expert + 1)):
            row = tl.load(order + nth)
            if (row >= begin) & (row < end):  # it was not sent
                column = rank * WIDTH + at
                part = tl.load(gradient + (row - begin) * STRIDE + column, mask=inside & (column < FIRST), other=0.0)
                if FIRST < RANKS * WIDTH:
                    place = after + (row - begin) * STRIDE_AFTER + (column - FIRST)
                    part += tl.load(place, mask=inside & (column >= FIRST), other=0.0)
            else:
                part = tl.load(arrived + row * WIDTH + at, mask=inside, other=0.0)
            sums += part.to(sums.dtype)
        sums = tl.where(aborted != 0, float("nan"), sums * SCALE)
        tl.store(total + expert * WIDTH + at, sums.to(total.dtype.element_ty), mask=inside)


@program("count")
def spoil(
    weights: tl.tensor,
    abort: tl.tensor,
    failed: tl.tensor,
    count: tl.tensor,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Make the first element of each row not a number if a meeting has failed, and tell the host.

    Args:
        weights: [count, ROW].
        abort: int64, not 0 if a meeting has failed.
        failed: int64 in memory of the host, out: the same.
        count: Number of rows.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    aborted = tl.load(abort, volatile=True)
    if tl.program_id(0) == 0:
        tl.store(failed, aborted)
    if aborted != 0:
        nothing = tl.full([BLOCK], float("nan"), tl.float32).to(weights.dtype.element_ty)
        tl.store(weights + row.to(tl.int64) * ROW, nothing, mask=row < count)
