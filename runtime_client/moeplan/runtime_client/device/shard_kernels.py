"""The Triton kernel that adds up gradients of sharded experts; like all that move data, it never waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

__all__ = ["add_replicas"]


def program(function: Callable[..., Any]) -> Any:
    """A Triton kernel, compiled once for all numbers."""
    return triton.jit(function, do_not_specialize=["rank", "begin", "end"])


@program
def add_replicas(
    arrived: tl.tensor,
    gradient: tl.tensor,
    order: tl.tensor,
    start: tl.tensor,
    total: tl.tensor,
    abort: tl.tensor,
    rank: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOUBLE: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Add up this rank's part of the gradients of each expert's replicas, in order; a block for each expert and piece.

    Args:
        arrived: [replicas, WIDTH], parts that other ranks sent, by replica.
        gradient: [end - begin, RANKS * WIDTH], gradients of the replicas `begin` to `end - 1`, which are this rank's.
        order: int64[replicas], replicas by expert.
        start: int64[experts + 1], where those of each expert begin in `order`.
        total: [experts, WIDTH], out; not a number if a meeting has failed.
        DOUBLE: Whether to add in float64 rather than in float32.
    """
    expert = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = at < WIDTH
    sums = tl.zeros([PIECE], tl.float64 if DOUBLE else tl.float32)
    first = tl.load(start + expert)
    for nth in range(first, tl.load(start + expert + 1)):
        row = tl.load(order + nth)
        part = arrived + row * WIDTH
        if (row >= begin) & (row < end):  # it was not sent
            part = gradient + ((row - begin) * RANKS + rank) * WIDTH
        sums += tl.load(part + at, mask=inside, other=0.0).to(sums.dtype)
    sums = tl.where(tl.load(abort, volatile=True) != 0, float("nan"), sums)
    tl.store(total + expert * WIDTH + at, sums.to(total.dtype.element_ty), mask=inside)
