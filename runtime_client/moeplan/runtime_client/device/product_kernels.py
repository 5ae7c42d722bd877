"""Triton kernels of products of rows with the matrices of their experts.

The rows of an expert follow one another from a multiple of `TILE` on. Where they end within a tile, rows of zeros fill
it, so a tile has rows of one expert only, and nothing needs to be left out of sums over rows.
"""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.programs import program
from moeplan.runtime_client.device.routes import LOAN

__all__ = ["differentiate", "multiply", "sum_parts"]

_LOAN = tl.constexpr(LOAN)
_PARTS = tl.constexpr(8)
"""The most parts that the sums of a tile are made in."""
_ROWS = tl.constexpr(8)
"""Rows of a tile whose parts are added at a time."""


@program()
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


@program("ends", "replicas", "first")
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


@program()
def sum_over(
    left: tl.tensor,
    right: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    above: tl.tensor,
    beside: tl.tensor,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """[TILE, COLUMNS]: a tile of a gradient, over the rows from `begin` to `end`."""
    sums = tl.zeros([TILE, COLUMNS], tl.float32)
    for row in range(begin, end, PIECE):
        part = left.load([row, above * TILE])
        sums = tl.dot(part.T, right.load([row, beside * COLUMNS]), sums)
    return sums


@program()
def count_of(answer: tl.tensor, home: tl.tensor, BORROWED: tl.constexpr) -> tl.tensor:
    """How many replicas have gradients: those at home, and behind them those that are borrowed by the plan, unless
    `BORROWED`, where it says how many, is negative.
    """
    count = home
    if BORROWED >= 0:
        count += tl.load(answer + BORROWED)
    return count


@program()
def cut_of(
    ends: tl.tensor, fills: tl.tensor, count: tl.tensor, tiles: tl.tensor, LANES: tl.constexpr, MANY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Which tiles of gradients are summed in parts, as all blocks would wait for the few that compute them otherwise.

    Those of experts with so many rows that a tile of theirs takes long beside all that a block computes; of each
    expert the last, which there are too few of for all blocks.

    Returns:
        bool[LANES], the experts; how many tiles of each; in how many parts, 0 if none are.
    """
    lane = tl.arange(0, LANES)
    begin = tl.load(ends + lane - 1, mask=(lane > 0) & (lane < count), other=0)
    rows = tl.load(fills + lane, mask=lane < count, other=0) - begin
    heavy = (rows >= MANY) & (rows > tl.sum(rows) // 8)
    last = tiles % tl.num_programs(0)
    most = 2 * tl.num_programs(0) // tl.maximum(last * tl.sum(heavy.to(tl.int32)), 1)
    return heavy, last, tl.where((last > 0) & (most > 2), tl.minimum(most, _PARTS), 0)


@program("ends", "fills", "home")
def sum_parts(
    left: tl.tensor,
    right: tl.tensor,
    sums: tl.tensor,
    ends: tl.tensor,
    fills: tl.tensor,
    answer: tl.tensor,
    home: tl.tensor,
    BORROWED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
) -> None:
    """Sums of parts of the rows of what `cut_of` tells, for `differentiate`, which has the other arguments, too.

    Args:
        sums: float32[parts, TILE, COLUMNS], out: of each expert the parts of each of its tiles.
    """
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (HEIGHT + TILE - 1) // TILE
    tiles: tl.constexpr = down * across
    heavy, last, parts = cut_of(ends, fills, count_of(answer, home, BORROWED), tiles, LANES, MANY)
    nth = tl.cumsum(heavy.to(tl.int32)) - 1
    for part in range(tl.program_id(0), tl.sum(heavy.to(tl.int32)) * last * parts, tl.num_programs(0)):
        expert = tl.sum(tl.where(heavy & (nth == part // (last * parts)), tl.arange(0, LANES), 0))
        above, beside = place_of(tiles - last + part // parts % last, down, across, SIDE)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        fill = tl.load(fills + expert)
        size = ((fill - begin + PIECE - 1) // PIECE + parts - 1) // parts * PIECE
        begin += part % parts * size
        tile = sum_over(left, right, begin, tl.minimum(begin + size, fill), above, beside, TILE, COLUMNS, PIECE)
        cell = tl.arange(0, TILE)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(sums + part * (TILE * COLUMNS) + cell, tile)


@program()
def write(
    tile: tl.tensor,
    to: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    MORE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    total: tl.tensor,
    line: tl.tensor,
    LOW: tl.constexpr,
    PART: tl.constexpr,
    SCALE: tl.constexpr,
) -> None:
    """Write a tile of a gradient to its place in [HEIGHT, WIDTH], or add it there if there is `MORE`.

    Elements `LOW` to ``LOW + PART - 1`` go to a line of [lines, PART] instead, scaled, unless `line` is negative.
    """
    i = row + tl.arange(0, tile.shape[0])
    j = column + tl.arange(0, tile.shape[1])
    at = to + i[:, None] * WIDTH + j[None, :]
    inside = (i < HEIGHT)[:, None] & (j < WIDTH)[None, :]
    if MORE:
        tile += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    kept = tile.to(to.dtype.element_ty)
    begin, end = row * WIDTH, tl.minimum(row + tile.shape[0], HEIGHT) * WIDTH
    if PART > 0 and ((line >= 0) & (end > LOW) & (begin < LOW + PART)):
        element = i[:, None] * WIDTH + j[None, :]
        apart = (element >= LOW) & (element < LOW + PART)
        wide = kept.to(tl.float64 if total.dtype.element_ty == tl.float64 else tl.float32)
        tl.store(total + line * PART + (element - LOW), wide * SCALE, mask=inside & apart)
        if (begin < LOW) | (end > LOW + PART):  # not all of it
            tl.store(at, kept, mask=inside & (apart == 0))
    else:
        tl.store(at, kept, mask=inside)


@program()
def keep(
    tile: tl.tensor,
    out: tl.tensor,
    lent: tl.tensor,
    expert: tl.tensor,
    home: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    BORROWED: tl.constexpr,
    LENGTH: tl.constexpr,
    APART: tl.constexpr,
    MORE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    total: tl.tensor,
    line: tl.tensor,
    LOW: tl.constexpr,
    PART: tl.constexpr,
    SCALE: tl.constexpr,
) -> None:
    """`write` a tile to the gradient of its expert: among those of experts at home, or of borrowed ones."""
    if BORROWED >= 0 and expert >= home:
        place = (expert - home).to(tl.int64) * APART
        write(tile, lent + place, row, column, MORE, HEIGHT, WIDTH, total, line, 0, 0, 1.0)
    else:
        place = expert.to(tl.int64) * LENGTH
        write(tile, out + place, row, column, MORE, HEIGHT, WIDTH, total, line, LOW, PART, SCALE)


@program("ends", "fills", "home", "loans")
def differentiate(
    left: tl.tensor,
    right: tl.tensor,
    out: tl.tensor,
    lent: tl.tensor,
    sums: tl.tensor,
    ends: tl.tensor,
    fills: tl.tensor,
    answer: tl.tensor,
    total: tl.tensor,
    line: tl.tensor,
    home: tl.tensor,
    loans: tl.tensor,
    scale: tl.tensor,
    BORROWED: tl.constexpr,
    LENT: tl.constexpr,
    MORE: tl.constexpr,
    LENGTH: tl.constexpr,
    APART: tl.constexpr,
    LOW: tl.constexpr,
    PART: tl.constexpr,
    SCALE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
) -> None:
    """The gradient of each expert's matrix: the sum over its rows of their products, each with each.

    Args:
        left: Descriptor of [rows, HEIGHT], in parts [PIECE, TILE].
        right: Descriptor of [rows, WIDTH], in parts [PIECE, COLUMNS].
        out: [home, HEIGHT, WIDTH], out, experts at home, `LENGTH` elements apart; if there is `MORE`, added to what is
            there.
        lent: [spare, HEIGHT, WIDTH], out, likewise those that are borrowed, `APART` elements apart; not used if
            `BORROWED` is negative.
        sums: Of `sum_parts`; read only if some expert has `MANY` rows, if that is not 0.
        ends: int32, ends of rows as in `multiply`, of experts at home and of borrowed ones behind them.
        fills: int32, as `ends`, where the zeros behind an expert's rows begin; at its begin if it has no rows.
        answer: The plan: which experts at home are lent, which are not scaled, as `take_back` does that when it has
            added what borrowers found; and at `BORROWED`, unless that is negative, how many are borrowed.
        total: [lines, PART], out, if `PART` is not 0: elements `LOW` to ``LOW + PART - 1`` of gradients, multiplied by
            `SCALE` after they are rounded as `out` is, where experts at home would have them.
        line: int32[home], which line each has; a negative number for none, and all of it goes to `out`.
        home: How many experts are at home, with the borrowed ones at most `LANES`.
        loans: Place of loans in the plan.
        scale: float, what gradients of experts at home are multiplied by.
    """
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (HEIGHT + TILE - 1) // TILE
    tiles: tl.constexpr = down * across
    count = count_of(answer, home, BORROWED)
    if MANY > 0:
        heavy, last, parts = cut_of(ends, fills, count, tiles, LANES, MANY)
    if MORE and tl.load(ends + count - 1, mask=count > 0, other=0) == 0:
        count = 0
    for tile in range(tl.program_id(0), count * tiles, tl.num_programs(0)):
        expert = tile // tiles
        above, beside = place_of(tile % tiles, down, across, SIDE)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(fills + expert)
        here, cut = 0, 0
        if MANY > 0:
            here = tile % tiles - (tiles - last)
            if (parts > 0) & (here >= 0):
                lane = tl.arange(0, LANES)
                cut = tl.sum((heavy & (lane == expert)).to(tl.int32)) * parts
                here += tl.sum((heavy & (lane < expert)).to(tl.int32)) * last
        sent = (expert >= home).to(tl.int32)
        for loan in range(tl.load(answer + LENT, mask=expert < home, other=0)):
            sent += (tl.load(answer + loans + _LOAN * loan) == expert).to(tl.int32)
        factor = tl.where(sent > 0, 1.0, scale)
        own = tl.full([], -1, tl.int64)
        if PART > 0:
            own = tl.load(line + expert, mask=expert < home, other=-1).to(tl.int64)
        if cut > 0:
            for row in range(0, TILE, _ROWS):
                cell = (row + tl.arange(0, _ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                some = tl.zeros([_ROWS, COLUMNS], tl.float32)
                for part in range(cut):
                    some += tl.load(sums + (here * cut + part) * (TILE * COLUMNS) + cell)
                keep(
                    some * factor, out, lent, expert, home, above * TILE + row, beside * COLUMNS, BORROWED, LENGTH,
                    APART, MORE, HEIGHT, WIDTH, total, own, LOW, PART, SCALE,
                )  # fmt: skip
        else:
            whole = sum_over(left, right, begin, end, above, beside, TILE, COLUMNS, PIECE)
            keep(
                whole * factor, out, lent, expert, home, above * TILE, beside * COLUMNS, BORROWED, LENGTH, APART, MORE,
                HEIGHT, WIDTH, total, own, LOW, PART, SCALE,
            )  # fmt: skip
