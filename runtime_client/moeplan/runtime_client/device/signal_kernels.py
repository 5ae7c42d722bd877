"""Triton kernels of one block that wait for other ranks: meetings."""

from __future__ import annotations

import time

import triton
import triton.language as tl

from moeplan.runtime_client.device.programs import program

__all__ = ["clock", "fence", "meet", "meet_for_loans", "meet_peers"]

_ON_GPU = not triton.knobs.runtime.interpret
_GPU = tl.constexpr(_ON_GPU)


@program()
def fence() -> tl.tensor:
    """A fence of the system: all processors see what this thread did before it ahead of what follows."""
    if _GPU:
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


if _ON_GPU:

    @program()
    def clock(waited: tl.tensor) -> tl.tensor:
        """Nanoseconds."""
        return tl.extra.cuda.globaltimer().to(tl.int64)

else:

    def clock(waited: tl.tensor) -> tl.tensor:
        """A microsecond for each question, at which other ranks may have the processor for a millisecond."""
        time.sleep(0.001)
        return waited * 1000


@program("rank", "limit")
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


@program("rank", "limit")
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


@program("rank", "limit")
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
