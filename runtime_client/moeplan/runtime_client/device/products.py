"""Products of a pass on the device: rows with the matrices of their experts, and gradients of these matrices."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moeplan.runtime_client.device.launches import Blocks, Launch
from moeplan.runtime_client.device.routes import BORROWED, LENT, AnswerShape

__all__ = ["Owned", "Products", "Rows", "tile_rows"]


class _Tiles(NamedTuple):
    """What a block computes at a time.

    Attributes:
        rows: Rows of experts, a multiple of `few`.
        high: Rows of a gradient.
        wide: Columns of either.
        deep: Elements of a row that it reads at a time.
        few: Rows that it reads at a time for a gradient.
        many: Rows of an expert from which on tiles of its gradient may be summed in parts.
    """

    rows: int
    high: int
    wide: int
    deep: int
    few: int
    many: int


_ON_GPUS = _Tiles(128, 128, 256, 64, 64, 8192)
_ON_CPUS = _Tiles(8, 512, 512, 512, 8, 32)  # they interpret each operation

_REGISTERS = 176
"""Of each thread of products that kernels run beside, as their blocks need the rest; others have what they want."""

_SIDE = 8
"""Tiles above each other that are computed at the same time."""


def tile_rows(device: torch.device) -> int:
    """Rows of a tile: those of an expert begin at a multiple of it."""
    return _tiles(device).rows


def _tiles(device: torch.device) -> _Tiles:
    return _ON_GPUS if device.type == "cuda" else _ON_CPUS


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which rows of a round a product computes.

    Attributes:
        answer: The plan.
        part: The rows of its experts.
        ends: int32[replicas], where those of each expert end, counted from the first of the part: multiples of a tile.
        fills: int32[replicas], where zeros begin that fill up the last tile.
    """

    answer: Tensor
    part: slice
    ends: Tensor
    fills: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Owned:
    """Parts of gradients that are whole already, and where they go: what a rank owns of experts in its slots alone.

    Attributes:
        total: [experts, width], out: parts of the gradients of all experts.
        line: int32[replicas], the expert of each replica, -1 if there are others of it.
        begin: Element that the parts begin with, counted from the first of an expert, or of the matrix that is meant;
            below 0 if they begin before that.
        scale: What the parts are multiplied by, after they are rounded as the gradients are.
    """

    total: Tensor
    line: Tensor
    begin: int
    scale: float


class Products:
    """Products of matrices by expert, in the order of sums of the device's tiles.

    Sums do not depend on the number of rows, but for some of the gradients of experts that have most of them.

    Args:
        shape: Places in plans.
        device: This rank's.
        most: Rows of a product, at most.
    """

    def __init__(self, shape: AnswerShape, device: torch.device, most: int) -> None:
        self._shape = shape
        self._tiles = _tiles(device)
        is_gpu = device.type == "cuda"
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 2
        self._launches: dict[tuple[object, ...], Launch] = {}
        self._gradients: dict[tuple[object, ...], tuple[Launch, Launch]] = {}
        self._lanes = 1 << max(shape.owned + shape.spare - 1, 1).bit_length()
        # One expert cannot hold up all blocks if there are few rows: no tile of its gradient is summed in parts.
        cells = 2 * self._blocks * self._tiles.high * self._tiles.wide if most >= self._tiles.many else 0
        self._sums = torch.empty(cells, dtype=torch.float32, device=device)

    def apply(self, rows: Tensor, matrices: Tensor, ends: Tensor, out: Tensor | None = None) -> Tensor:
        """[rows, width]: each of ``rows`` [rows, depth] times its expert's of ``matrices`` [replicas, width, depth].

        Rows behind the last end are left as they are in memory. There may be more ends than matrices, which are then
        those of the last experts; rows of others are left as they are, too.

        Args:
            rows: Ordered by expert.
            matrices: Of the experts.
            ends: int32, ends of their rows, multiples of a tile.
            out: [rows, width], where to, if not to new memory.
        """
        out = rows.new_empty(len(rows), matrices.shape[1]) if out is None else out
        self._multiply(rows, matrices, ends, out, turned=True)
        return out

    def apply_back(self, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """[rows, depth]: each of ``rows`` [rows, width] times its expert's of ``matrices`` [replicas, width, depth]."""
        out = rows.new_empty(len(rows), matrices.shape[2])
        self._multiply(rows, matrices, ends, out, turned=False)
        return out

    def differentiate(
        self,
        left: Tensor,
        right: Tensor,
        rows: Rows,
        home: Tensor | None,
        lent: Tensor | None = None,
        *,
        scale: float = 1.0,
        more: bool = False,
        owned: Owned | None = None,
    ) -> None:
        """Gradients of experts' matrices, the sum over rows of ``left`` times ``right``.

        Args:
            left: [rows, height].
            right: [rows, width].
            rows: Which belong to which expert: to those at home, and behind them to lent ones.
            home: [replicas, height, width], out, in any distance: of the experts at home; None if `rows` has none.
            lent: [spare, height, width], out, likewise: of the lent ones, as many as are borrowed; None if there are
                none, or theirs are not wanted.
            scale: What gradients of experts at home are multiplied by, but for those that are lent.
            more: Whether they are added to what is there.
            owned: Where parts of those at home go instead; not with `more`.
        """
        to = [part for part in (home, lent) if part is not None]  # one stands in for the other, and is not written so
        height, width = to[0].shape[1:]
        tiles, spares = self._tiles, lent is not None
        low, part, factor = 0, 0, 1.0
        if owned is not None:
            low, part, factor = owned.begin, owned.total.shape[1], owned.scale
        apart = to[0].stride(0), to[-1].stride(0)
        launches = self._gradients.get(key := (height, width, *apart, spares, more, low, part, factor))
        if launches is None:
            many = tiles.many if len(self._sums) else 0
            sizes = {"HEIGHT": height, "WIDTH": width, "LANES": self._lanes, "MANY": many}
            sizes |= {"TILE": tiles.high, "COLUMNS": tiles.wide, "PIECE": tiles.few, "SIDE": _SIDE}
            of = {"BORROWED": BORROWED if spares else -1}
            launches = self._gradients[key] = (
                Launch(_kernels().sum_parts, 8, **of, **sizes),
                Launch(
                    _kernels().differentiate, 8, None if more or owned else _REGISTERS, **of, LENT=LENT, MORE=more,
                    LENGTH=apart[0], APART=apart[1], LOW=low, PART=part, SCALE=factor, **sizes,
                ),
            )  # fmt: skip
        parts, whole = launches
        grid, at_home = (self._blocks, 1, 1), 0 if home is None else len(home)
        factors = Blocks(left, (tiles.few, tiles.high)), Blocks(right, (tiles.few, tiles.wide))
        if len(self._sums):
            parts(grid, *factors, self._sums, rows.ends, rows.fills, rows.answer, at_home)
        own = (to[0], rows.ends) if owned is None else (owned.total, owned.line)
        whole(
            grid, *factors, to[0], to[-1], self._sums, rows.ends, rows.fills, rows.answer, *own, at_home,
            self._shape.loans, scale,
        )  # fmt: skip

    def _multiply(self, rows: Tensor, matrices: Tensor, ends: Tensor, out: Tensor, *, turned: bool) -> None:
        depth, width, tiles = rows.shape[1], out.shape[1], self._tiles
        launch = self._launches.get(key := (width, depth, turned))
        if launch is None:
            launch = self._launches[key] = Launch(
                _kernels().multiply, 8, LANES=self._lanes, WIDTH=width, DEPTH=depth, TURNED=turned, TILE=tiles.rows,
                COLUMNS=tiles.wide, PIECE=tiles.deep, SIDE=_SIDE,
            )  # fmt: skip
        launch(
            (self._blocks, 1, 1), Blocks(rows, (tiles.rows, tiles.deep)),
            Blocks(matrices, (1, tiles.wide, tiles.deep) if turned else (1, tiles.deep, tiles.wide)),
            Blocks(out, (tiles.rows, tiles.wide)), ends, len(matrices), len(ends) - len(matrices),
        )  # fmt: skip


def _kernels() -> ModuleType:
    """The module of kernels, which needs Triton."""
    from moeplan.runtime_client.device import product_kernels

    return product_kernels
