"""A safetensors file of whole numbers, which may have been cut off: its head says where every tensor lies.

Eight bytes with the length of the head, the head as JSON (``{name: {dtype, shape, data_offsets}}``), then the bytes of
the tensors. Source: the format's description in huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["TensorFile"]

LENGTH = 8
INTEGERS = {f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}


@dataclass(frozen=True, slots=True)
class _Place:
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorFile:
    """A file whose head was read. Make it with `TensorFile.open`.

    Attributes:
        path: The file.
        places: Type, shape and place of each tensor, by name.
        data: All bytes after the head that are there.
    """

    path: Path
    places: Mapping[str, _Place]
    data: npt.NDArray[np.uint8]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read a head.

        Raises:
            TraceError: the file cannot be read, is of another kind, or ends in its head.
        """
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(LENGTH), "little")
                head = json.loads(file.read(min(length, path.stat().st_size)))
            places = {
                str(name): _Place(
                    str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"])
                )
                for name, entry in head.items()
                if name != "__metadata__"
            }
            data = np.memmap(path, np.uint8, "r")[LENGTH + length :]
        except (OSError, ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise TraceError(path, f"is no safetensors file, or was cut off in its head ({cause})") from None
        return cls(path, places, data)

    def whole(self) -> set[str]:
        """Names of the tensors of which all bytes are there."""
        return {name for name, place in self.places.items() if place.stop <= len(self.data)}

    def read(self, name: str) -> Int64:
        """A whole tensor of whole numbers.

        Raises:
            TraceError: it holds other numbers, or its place contradicts its shape.
        """
        place = self.places[name]
        if place.dtype not in INTEGERS:
            raise TraceError(self.path, f"must be one of {', '.join(INTEGERS)}", name, place.dtype)
        part = self.data[place.start : place.stop]
        if len(part) != INTEGERS[place.dtype].itemsize * math.prod(place.shape) or min(place.shape, default=0) < 0:
            raise TraceError(self.path, f"must have the bytes of shape {place.shape}", name, f"{len(part)} bytes")
        return part.view(INTEGERS[place.dtype]).reshape(place.shape).astype(np.int64)
