"""Triton kernels of products of rows with the matrices of their experts.

The rows of an expert follow one another from a multiple of `TILE` on. Where they end within a tile, rows of zeros fill
it, so a tile has rows of one expert only, and nothing needs to be left out of sums over rows.
"""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.kernels import program
from moeplan.runtime_client.device.routes import LOAN

__all__ = ["differentiate", "multiply"]

_LOAN = tl.constexpr(LOAN)


@program
def place_of(
    nth: tl.tensor, height: tl.tensor, ACROSS: tl.constexpr, SIDE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of the nth tile, in strips of nearly equal height, at most `SIDE`, so that both factors of tiles
    that are computed at the same time fit into the cache.
    """
    strips = (height + SIDE - 1) // SIDE
    side = (height + strips - 1) // strips
    strip = nth // (side * ACROSS)
    here = tl.minimum(height - strip * side, side)
    return strip * side + nth % (side * ACROSS) % here, nth % (side * ACROSS) // here


@program
def multiply(
    rows: tl.tensor,
    matrices: tl.tensor,
    out: tl.tensor,
    ends: tl.tensor,
    replicas: tl.tensor,
    first: tl.tensor,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TURNED: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
) -> None:
    """Rows of each expert times its matrix, by as many blocks as there are.

    Args:
        rows: Descriptor of [rows, DEPTH], in parts [TILE, PIECE].
        matrices: Descriptor of [replicas, DEPTH, WIDTH], in parts [1, PIECE, COLUMNS]; if `TURNED` of
            [replicas, WIDTH, DEPTH], in parts [1, COLUMNS, PIECE].
        out: Descriptor of [rows, WIDTH], in parts [TILE, COLUMNS].
        ends: int32, ends of experts' rows, multiples of `TILE`, those of the first of these replicas in place `first`.
        replicas: How many, at most `LANES`.
    """
    lane = tl.arange(0, LANES)
    end_of = tl.load(ends + first + lane, mask=lane < replicas, other=0)
    begin_of = tl.load(ends + first + lane - 1, mask=(first + lane > 0) & (lane < replicas), other=0)
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    after = tl.cumsum((end_of - begin_of) // TILE * across)
    for tile in range(tl.program_id(0), tl.max(after), tl.num_programs(0)):
        done = after <= tile
        done = done & (lane < replicas)
        expert = tl.sum(done.to(tl.int32))
        begin = tl.load(ends + first + expert - 1, mask=first + expert > 0, other=0)
        height = (tl.load(ends + first + expert) - begin) // TILE
        down, right = place_of(tile - tl.max(tl.where(done, after, 0)), height, across, SIDE)
        row = begin + down * TILE
        sums = tl.zeros([TILE, COLUMNS], tl.float32)
        for depth in range(0, DEPTH, PIECE):
            part = rows.load([row, depth])
            if TURNED:
                matrix = matrices.load([expert, right * COLUMNS, depth]).reshape(COLUMNS, PIECE).T
            else:
                matrix = matrices.load([expert, depth, right * COLUMNS]).reshape(PIECE, COLUMNS)
            sums = tl.dot(part, matrix, sums)
        out.store([row, right * COLUMNS], sums.to(out.dtype))


@program
def differentiate(
    left: tl.tensor,
    right: tl.tensor,
    out: tl.tensor,
    ends: tl.tensor,
    fills: tl.tensor,
    answer: tl.tensor,
    replicas: tl.tensor,
    first: tl.tensor,
    loans: tl.tensor,
    scale: tl.tensor,
    BORROWED: tl.constexpr,
    LENT: tl.constexpr,
    MORE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
) -> None:
    """The gradient of each expert's matrix: the sum over its rows of their products, each with each.

    Args:
        left: Descriptor of [rows, HEIGHT], in parts [PIECE, TILE].
        right: Descriptor of [rows, WIDTH], in parts [PIECE, COLUMNS].
        out: [replicas, HEIGHT, WIDTH], out, the replicas `LENGTH` elements apart; if there is `MORE`, added to what is
            there.
        ends: int32, ends of rows as in `multiply`, those of the first replica in place `first`.
        fills: int32, as `ends`, where the zeros behind an expert's rows begin; at its begin if it has no rows.
        answer: The plan, for experts at home that are lent, which are not scaled: `take_back` does, when it has added
            what borrowers found. Or, where `BORROWED` is not negative, for how many of the replicas are borrowed.
        replicas: How many; at most so many are borrowed.
        loans: Place of loans in the plan.
        scale: float, what gradients are multiplied by.
    """
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (HEIGHT + TILE - 1) // TILE
    count = replicas
    if BORROWED >= 0:
        count = tl.load(answer + BORROWED)
    if MORE and tl.load(ends + first + replicas - 1) == tl.load(ends + first - 1, mask=first > 0, other=0):
        count = 0
    for tile in range(tl.program_id(0), count * (down * across), tl.num_programs(0)):
        expert = tile // (down * across)
        above, beside = place_of(tile % (down * across), down, across, SIDE)
        begin = tl.load(ends + first + expert - 1, mask=first + expert > 0, other=0)
        sums = tl.zeros([TILE, COLUMNS], tl.float32)
        for row in range(begin, tl.load(fills + first + expert), PIECE):
            part = left.load([row, above * TILE])
            sums = tl.dot(part.T, right.load([row, beside * COLUMNS]), sums)
        if BORROWED < 0:
            sent = 0
            for loan in range(tl.load(answer + LENT)):
                sent += (tl.load(answer + loans + _LOAN * loan) == expert).to(tl.int32)
            sums = sums * tl.where(sent > 0, 1.0, scale)
        i = above * TILE + tl.arange(0, TILE)
        j = beside * COLUMNS + tl.arange(0, COLUMNS)
        to = out + expert.to(tl.int64) * LENGTH + i[:, None] * WIDTH + j[None, :]
        inside = (i < HEIGHT)[:, None] & (j < WIDTH)[None, :]
        if MORE:
            sums += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, sums.to(out.dtype.element_ty), mask=inside)
