"""Checking and freezing the arrays that cross the library's edge."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import short

__all__ = ["Bool", "Float64", "Int32", "Int64", "any_array", "floats", "integers", "read_only"]

T = TypeVar("T", bound=np.generic)

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

MAX_TOKENS = 2**53
"""Largest count held: beyond it, float64 no longer represents every integer and costs would be inexact."""

_LIMITS = {kind: (int(np.iinfo(kind).min), int(np.iinfo(kind).max)) for kind in (np.int32, np.int64)}


def any_array(field: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """`values` as an array.

    Raises:
        ProblemError: the lists have no common shape, or entries are masked.
    """
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.getmaskarray(values).any():
            raise ProblemError(field, "array with masked entries", "must have a value everywhere; fill them first")
        values = values.data
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        raise ProblemError(field, short(values), "must be an array of numbers whose lists have equal lengths") from None
    if array.dtype.kind not in "biuf":
        raise ProblemError(field, short(values), "must hold numbers, of lists of equal lengths")
    return array


def integers(
    field: str,
    values: npt.ArrayLike,
    *,
    ndim: int,
    dtype: type[Any] = np.int64,
    low: int | None = None,
    high: int | None = None,
) -> npt.NDArray[Any]:
    """A read-only C-contiguous integer copy of `values`.

    Raises:
        ProblemError: `values` is not an integer array of `ndim` dimensions within [low, high].
    """
    array = any_array(field, values)
    if array.dtype.kind not in "iu":
        raise ProblemError(field, f"array of {array.dtype}", "must hold integers; round or cast it first")
    if array.ndim != ndim:
        raise ProblemError(field, f"array of shape {array.shape}", f"must have {ndim} dimension(s)")
    if array.size:
        smallest, largest = int(array.min()), int(array.max())
        limits = _LIMITS[dtype]
        low = limits[0] if low is None else low
        high = limits[1] if high is None else high
        if smallest < low:
            raise ProblemError(f"{field}{_where(array, smallest)}", smallest, f"must be at least {low}")
        if largest > high:
            raise ProblemError(f"{field}{_where(array, largest)}", largest, f"must be at most {high}")
    frozen = np.array(array, dtype=dtype, order="C")
    frozen.flags.writeable = False
    return frozen


def floats(field: str, values: npt.ArrayLike, *, ndim: int, positive: bool = False) -> Float64:
    """A read-only C-contiguous float64 copy of `values`, all finite and non-negative (or positive).

    Raises:
        ProblemError: a value is not a finite number, or is negative (or zero, if `positive`).
    """
    frozen = np.array(any_array(field, values), dtype=np.float64, order="C")
    if frozen.ndim != ndim:
        raise ProblemError(field, f"array of shape {frozen.shape}", f"must have {ndim} dimension(s)")
    bad = ~np.isfinite(frozen) | (frozen <= 0 if positive else frozen < 0)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        value = frozen[index]
        raise ProblemError(
            f"{field}[{', '.join(map(str, index))}]",
            value,
            f"must be finite and {'above' if positive else 'at least'} 0",
        )
    frozen.flags.writeable = False
    return frozen


def read_only(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """The same numbers, not to be written: to numba another type, for which all kernels would be compiled again."""
    view = array.view()
    view.flags.writeable = False
    return view


def _where(array: npt.NDArray[Any], value: int) -> str:
    index = np.argwhere(array == value)[0]
    return f"[{', '.join(str(int(i)) for i in index)}]" if array.ndim else ""
