"""Triton kernels of lent experts on their way to borrowers, and of their gradients back. None of them waits."""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.programs import program
from moeplan.runtime_client.device.routes import LOAN

__all__ = ["convert", "fetch", "offer", "take_back"]

_LOAN = tl.constexpr(LOAN)


@program()
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


@program()
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


@program("rank")
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


@program()
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
