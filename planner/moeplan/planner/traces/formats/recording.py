"""A recording that somebody else's program made, as steps that a trace can hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = [
    "MOST_EXPERTS",
    "Reader",
    "Recording",
    "counts_of",
    "experts_of",
    "json_lines",
    "load_torch",
    "start_of",
    "whole_numbers",
]


@dataclass(slots=True)
class Recording:
    """Counts of a foreign recording, read as they are asked for.

    Attributes:
        layer_numbers: Number in the model of each MoE layer, dense ones counted, where the format tells; else 0, 1, ...
        sources: Ranks whose tokens are told apart; 1 where they are not.
        experts: Experts per layer.
        steps: int64[layers, sources, experts] of each step, in order; may be read once.
        first_step: Number of the first step.
        total: Number of steps, where it is known before they are read.
        dropped: What was left out, in words; complete when all steps were read.
    """

    layer_numbers: Sequence[int]
    sources: int
    experts: int
    steps: Iterator[Int64]
    first_step: int = 0
    total: int | None = None
    dropped: list[str] = field(default_factory=list)


MOST_EXPERTS = 2**16
"""Numbers of experts are below this: what is not is no number of one, and arrays would be as large."""

Reader = Callable[[Sequence[Path]], Recording]
"""Opens the files of a recording.

Raises:
    TraceError: a file is missing, broken, or of another format.
"""


def start_of(path: Path, size: int = 4096) -> bytes:
    """The first bytes of a file; none of a folder or a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def json_lines(path: Path, dropped: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file with one in each line. A last line that was cut off is dropped, and said.

    Raises:
        TraceError: the file cannot be read, or another line is no JSON object.
    """
    broken: int | None = None
    try:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                if broken is not None:
                    raise TraceError(path, f"line {broken} is no JSON object")
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    broken = number
                    continue
                if not isinstance(value, dict):
                    raise TraceError(path, f"line {number} is no JSON object")
                yield value
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(path, f"cannot be read ({error})") from None
    if broken is not None:
        dropped.append(f"{path}: line {broken}, which was cut off")


def load_torch(path: Path) -> Any:
    """The content of a file that ``torch.save`` wrote, with nothing executed.

    Raises:
        TraceError: torch is not installed, or the file is broken or holds other objects than tensors and numbers.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise TraceError(path, "needs torch to be read; install it with `pip install 'moeplan[torch]'`") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken file can raise nearly anything
        cause = str(error).split("\n", maxsplit=1)[0][:200]
        raise TraceError(path, f"is no file of tensors that torch.load(weights_only=True) reads ({cause})") from None


def whole_numbers(path: Path, part: str, value: object, *ndims: int) -> npt.NDArray[np.integer[Any]]:
    """`value`, a tensor or nested lists, as an array: of a tensor the very memory, which may be a file's.

    Raises:
        TraceError: it is not an array of whole numbers with as many dimensions as one of `ndims`.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # RuntimeError: a tensor that is no array, such as one of gradients
        array = np.asarray(None)
    if array.dtype.kind not in "iu" or array.ndim not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise TraceError(path, f"must be whole numbers in {wanted} dimensions", part, f"{array.dtype}{array.shape}")
    return array


def counts_of(path: Path, part: str, value: object, ndim: int) -> Int64:
    """`value`, a tensor or nested lists, as int64 counts.

    Raises:
        TraceError: it is not an array of whole numbers, at least 0, with `ndim` dimensions.
    """
    array = whole_numbers(path, part, value, ndim)
    if array.size and array.min() < 0:
        raise TraceError(path, "must be at least 0", part, array.min())
    return array.astype(np.int64)


def experts_of(path: Path, part: str, experts: npt.NDArray[np.integer[Any]]) -> int:
    """How many experts there are where these are named.

    Raises:
        TraceError: none is, or the number of one is too large.
    """
    count = int(experts.max(initial=-1)) + 1
    if not 1 <= count <= MOST_EXPERTS:
        raise TraceError(path, f"must name experts below {MOST_EXPERTS}", part, "none" if count == 0 else count - 1)
    return count
