"""Copies between addresses of memory that ranks share, which copy engines do beside the processors.

What a copy costs the host does not depend on how many rows it has, so rows as far apart as each other are one copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moeplan.solvers.problem.arrays import Int64

__all__ = ["Copies", "Stretch", "stretches"]

_LARGEST_PITCH = 2**31 - 1
"""Most bytes between two rows of a copy, by the driver."""

_ANY_MEMORY = 4
"""CU_MEMORYTYPE_UNIFIED: the driver finds out by the address."""

_COPY = np.dtype(
    [
        (f"{side}{name}", np.int32 if name == "_type" else np.int64)
        for side in ("source", "out")
        for name in ("_x", "_y", "_type", "_host", "", "_array", "_pitch")
    ]
    + [("size", np.int64), ("rows", np.int64)],
    align=True,
)
"""CUDA_MEMCPY2D of the driver."""


class Stretch(NamedTuple):
    """Numbers in a list that are as far apart as each other: `length` of them from position `place` on.

    Attributes:
        place: Position of the first.
        first: The first.
        step: From each to the next, above 0.
        length: How many.
    """

    place: int
    first: int
    step: int
    length: int


def stretches(numbers: Sequence[int]) -> list[Stretch]:
    """A list in few stretches, in order; each is taken as long as it can be."""
    found: list[Stretch] = []
    for place, number in enumerate(numbers):
        if found:
            begin, first, step, length = found[-1]
            ahead = number - (first + (length - 1) * step)
            if ahead > 0 and (length == 1 or ahead == step):
                found[-1] = Stretch(begin, first, ahead, length + 1)
                continue
        found.append(Stretch(place, number, 1, 1))
    return found


class Copies:
    """Copies of rows of the same size, of which each is to addresses as far apart as each other, and from such.

    They are numbered, int64[copies], or have one number for all.

    Args:
        size: Bytes of each copy's rows.
        rows: Rows of each copy.
        out: Address of each copy's first row, or what is to be added to one; see `at`.
        out_pitch: Bytes from a row to the next there.
        source: As `out`, of what is copied.
        source_pitch: Likewise.
    """

    def __init__(
        self,
        size: Int64 | int,
        rows: Int64,
        out: Int64,
        out_pitch: Int64 | int,
        source: Int64,
        source_pitch: Int64 | int,
    ) -> None:
        self._table = table = np.zeros(len(rows), _COPY)
        table["source_type"] = table["out_type"] = _ANY_MEMORY
        table["size"], table["rows"] = size, rows
        table["out"], table["out_pitch"] = out, out_pitch
        table["source"], table["source_pitch"] = source, source_pitch
        self._far = bool((np.maximum(table["out_pitch"], table["source_pitch"]) > _LARGEST_PITCH).any())

    def at(self, out: int, source: Int64 | int) -> Copies:
        """The same copies elsewhere: addresses are added to theirs, int64[copies] or one for all."""
        moved = copy(self)
        moved._table = self._table.copy()
        moved._table["out"] += out
        moved._table["source"] += source
        return moved

    def start(self, stream: torch.cuda.Stream | None) -> None:
        """Queue the copies.

        Args:
            stream: Of the GPU whose copies these are, which the caller has made wait for whatever they need; None for
                memory of CPUs, which is copied at once.

        Raises:
            RuntimeError: the driver refused a copy.
        """
        table = _row_by_row(self._table) if self._far or stream is None else self._table
        if stream is None:
            for each in table:
                ctypes.memmove(int(each["out"]), int(each["source"]), int(each["size"]))
            return
        copy_rows, queue, first = _driver().cuMemcpy2DAsync_v2, stream.cuda_stream, table.ctypes.data
        for place in range(first, first + table.nbytes, _COPY.itemsize):
            if status := copy_rows(place, queue):
                raise RuntimeError(f"cuMemcpy2DAsync: error {status} of the driver")


def _row_by_row(table: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """A copy for each row."""
    nth = np.concatenate([np.arange(rows) for rows in table["rows"]]) if len(table) else 0
    table = table.repeat(table["rows"])
    for side in ("out", "source"):
        table[side] += nth * table[f"{side}_pitch"]
        table[f"{side}_pitch"] = table["size"]
    table["rows"] = 1
    return table


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpy2DAsync_v2.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    return driver
