"""Arrays, counts of tokens and layouts, to and from tensors; and how errors name their fields."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import MAX_TOKENS, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.v1 import tensor_pb2

__all__ = [
    "field",
    "read_array",
    "read_counts",
    "read_layout",
    "read_layouts",
    "write_array",
    "write_counts",
    "write_layout",
    "write_layouts",
]

LONGEST_EMPTY = 65_536
"""Longest side of a tensor without data: memory may be taken for a side although no data back it."""

_DTYPES: dict[int, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_SMALL = _DTYPES[tensor_pb2.DATA_TYPE_INT32]
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@contextmanager
def field(prefix: str) -> Iterator[None]:
    """Errors raised inside name their field relative to `prefix`, for instance ``problems[3]``."""
    try:
        yield
    except ProblemError as error:
        raise type(error)(f"{prefix}.{error.field}", error.value, error.reason) from None


def read_array(name: str, tensor: tensor_pb2.Tensor) -> npt.NDArray[Any]:
    """A read-only view of a tensor's data.

    Raises:
        ProblemError: the type is not known, or the data do not fill the shape exactly.
    """
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise ProblemError(f"{name}.type", tensor.type, "must be INT32, INT64, FLOAT32 or FLOAT64")
    shape, data = tuple(tensor.shape), tensor.data  # a copy each time that a message is asked for them
    longest = max(len(data), LONGEST_EMPTY)
    if len(shape) > 8 or min(shape, default=0) < 0 or max(shape, default=0) > longest:
        raise ProblemError(f"{name}.shape", list(shape[:8]), f"must be at most 8 numbers, each 0 to {longest}")
    size = math.prod(shape, start=dtype.itemsize)
    if size != len(data):
        raise ProblemError(f"{name}.data", f"{len(data)} bytes", f"shape {list(shape)} of {dtype.name} has {size}")
    return np.frombuffer(data, dtype).reshape(shape)


def read_counts(name: str, tensor: tensor_pb2.Tensor, most: int = MAX_TOKENS) -> Int64:
    """Whole numbers from 0 to `most`, at least 2**31, sent as integers or as floats.

    Raises:
        ProblemError: a value is negative, too large, broken or not a number.
    """
    array = read_array(name, tensor)
    if array.size:
        small = array.dtype == _SMALL  # which holds nothing too large, and is what ranks send
        if not (array.min() >= 0 and (small or array.max() <= most)):
            bad = ~((array >= 0) & (array <= most))
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ProblemError(f"{name}[{', '.join(map(str, index))}]", array[index], f"must be 0 to {most}")
    counts = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(counts, array):
        index = tuple(int(i) for i in np.argwhere(counts != array)[0])
        raise ProblemError(f"{name}[{', '.join(map(str, index))}]", array[index], "must be a whole number of tokens")
    return counts


def write_array(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """A tensor of the array's type; other integers travel as int64."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _CODES:
        dtype = np.dtype("<f8") if array.dtype.kind == "f" else np.dtype("<i8")
    return tensor_pb2.Tensor(
        shape=array.shape,
        type=tensor_pb2.DataType.ValueType(_CODES[dtype]),
        data=array.astype(dtype, copy=False).tobytes(),
    )


def write_counts(tokens: Int64) -> tensor_pb2.Tensor:
    """Counts in half the bytes where they allow it: messages under 64 KiB need no second round trip for room."""
    small = tokens.size and tokens.max() <= np.iinfo(np.int32).max
    return write_array(tokens.astype(np.int32) if small else tokens)


def read_layout(name: str, tensor: tensor_pb2.Tensor, experts: int | None = None, *, partial: bool = False) -> Layout:
    """A layout.

    Args:
        name: What errors call it.
        tensor: int32[devices, width], expert in each slot, -1 for an empty one.
        experts: Number of experts; by default as many as the largest says, since each has a replica.
        partial: It may lack experts, which were lost with their devices.

    Raises:
        ProblemError: the tensor is no layout of `experts` experts.
    """
    slots = read_array(name, tensor)
    if slots.dtype.kind != "i" or slots.ndim != 2:
        raise ProblemError(name, f"{slots.dtype} of shape {list(slots.shape)}", "must be int32[devices, width]")
    if experts is None:
        experts = int(slots.max(initial=EMPTY)) + 1
    try:
        return Layout.partial(slots, experts) if partial else Layout(slots, experts)
    except ProblemError as error:
        place = error.field.removeprefix("layout").removeprefix(".slots")
        raise ProblemError(name + place, error.value, error.reason) from None


def write_layout(layout: Layout) -> tensor_pb2.Tensor:
    """The tensor of a layout."""
    return write_array(layout.slots)


def read_layouts(
    name: str, tensor: tensor_pb2.Tensor, layers: int, experts: int, *, checked: bool = False
) -> tuple[Layout, ...]:
    """Layouts of all layers; if `checked`, which takes the compiler of kernels, they were so before they were stored.

    Raises:
        ProblemError: the tensor does not hold `layers` layouts of `experts` experts.
    """
    tables = read_array(name, tensor)
    if tables.dtype.kind != "i" or tables.ndim != 3 or len(tables) != layers:
        found = f"{tables.dtype} of shape {list(tables.shape)}"
        raise ProblemError(name, found, f"must be int32[{layers}, devices, width]")
    layouts = []
    for index, table in enumerate(tables):
        with field(f"{name}[{index}]"):
            layouts.append(Layout.trusted(table, experts) if checked else Layout(table, experts))
    return tuple(layouts)


def write_layouts(layouts: Sequence[Layout]) -> tensor_pb2.Tensor:
    """The tensor of the layouts of all layers, int32[layers, devices, width], as wide as the widest of them."""
    width = max(layout.slots.shape[1] for layout in layouts)
    tables = np.full((len(layouts), layouts[0].devices, width), EMPTY, np.int32)
    for table, layout in zip(tables, layouts, strict=True):
        table[:, : layout.slots.shape[1]] = layout.slots
    return write_array(tables)
