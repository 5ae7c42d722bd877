"""Recorded routing: ``counts[step, layer, source, expert]`` in an ``.npz`` file, read one step at a time.

Steps are read in order through a small buffer, so a trace may be larger than memory, compressed or not. Optional
scalars beside ``counts`` describe it: ``first_step`` (number of the first recorded step), ``top_k`` (experts per
token) and ``tokens_per_rank`` (tokens that each source routes per step). An optional integer array ``layer_numbers``
has the number in the model of each layer, where dense layers count too. An optional integer array ``pairs[layer,
expert, next_expert]`` counts how many tokens of all steps and sources went from an expert to one of the next layer; a
token with k experts per layer counts k * k times.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeplan.planner.errors import FileError
from moeplan.solvers.problem.arrays import MAX_TOKENS, Int64

__all__ = ["Trace", "TraceError", "Window"]

MOST_BYTES = 2**29
"""Memory for the steps of a window that are read together."""


class TraceError(FileError):
    """A trace file cannot be used; says which file, what it holds, and what it should."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive steps, and the step after them, of some layers.

    Attributes:
        step: Index in the trace of the step after the window.
        history: int64[steps, layers, sources, experts].
        next: int64[layers, sources, experts].
    """

    step: int
    history: Int64
    next: Int64


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace on disk. Make it with `Trace.open`.

    Attributes:
        path: The file.
        steps: Number of steps.
        layers: Number of MoE layers.
        sources: Number of ranks whose tokens were counted.
        experts: Number of experts per layer.
        dtype: Integer type of the counts.
        first_step: Training step of the first recorded one.
        top_k: Experts per token, if known.
        tokens_per_rank: Tokens that each source routes per step, if known.
        layer_numbers: Number in the model of each layer, if known.
    """

    path: Path
    steps: int
    layers: int
    sources: int
    experts: int
    dtype: np.dtype[Any]
    first_step: int = 0
    top_k: int | None = None
    tokens_per_rank: int | None = None
    layer_numbers: tuple[int, ...] | None = None

    @classmethod
    def open(cls, path: Path | str) -> Trace:
        """Read a trace's header.

        Raises:
            TraceError: the file is missing, broken, or not a trace.
        """
        path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                if "counts.npy" not in archive.namelist():
                    arrays = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
                    raise TraceError(path, f"has no array named `counts`; holds {arrays}")
                with archive.open("counts.npy") as file:
                    shape, fortran, dtype = _header(file)
                scalars = {
                    name: _scalar(archive, path, name)
                    for name in ("first_step", "top_k", "tokens_per_rank")
                    if f"{name}.npy" in archive.namelist()
                }
                numbers = _layer_numbers(archive, path, shape[1]) if len(shape) == 4 else None
        except FileNotFoundError:
            raise TraceError(path, "no such file; give the path of an .npz trace") from None
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
            if isinstance(error, FileError):
                raise
            cause = error.strerror if isinstance(error, OSError) else error
            raise TraceError(path, f"is not a readable .npz file ({cause})") from None
        if dtype.kind not in "iu":
            raise TraceError(path, "must hold integers", "counts", f"array of {dtype}")
        if len(shape) != 4:
            raise TraceError(path, "must be [step, layer, source, expert]", "counts", f"array of shape {shape}")
        if 0 in shape:
            raise TraceError(path, "is empty", "counts", f"array of shape {shape}")
        if fortran:
            raise TraceError(path, "must be in C order; save np.ascontiguousarray(counts)", "counts", "Fortran order")
        return cls(path, *shape, dtype=dtype, **scalars, layer_numbers=numbers)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Int64]:
        """Steps `start` to `stop`, each int64[layers, sources, experts].

        Raises:
            TraceError: the file ends early, is corrupt, or holds a count that is negative or above 2**53.
        """
        stop = self.steps if stop is None else min(stop, self.steps)
        shape = (self.layers, self.sources, self.experts)
        size = int(np.prod(shape)) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("counts.npy") as file:
                _header(file)
                _skip(file, start * size)
                for step in range(start, stop):
                    data = file.read(size)
                    if len(data) < size:
                        reason = f"should have {self.steps} steps"
                        raise TraceError(self.path, reason, "counts", f"ends in step {step}")
                    counts = np.frombuffer(data, self.dtype).reshape(shape)
                    for extreme in (counts.min(), counts.max()):
                        if not 0 <= extreme <= MAX_TOKENS:
                            while file.read(1 << 20):  # to the end, where a damaged file shows
                                pass
                            raise TraceError(self.path, "must be 0 to 2**53", f"counts[{step}]", extreme)
                    yield counts.astype(np.int64)
        except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise TraceError(self.path, f"is damaged ({error})") from None

    def pairs(self) -> Int64 | None:
        """int64[layers - 1, experts, experts] transitions between consecutive layers; None where none were recorded.

        Raises:
            TraceError: the array does not suit the trace, or the file is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                if "pairs.npy" not in archive.namelist():
                    return None
                with archive.open("pairs.npy") as file:
                    pairs: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
            raise TraceError(self.path, f"is damaged ({error})") from None
        wanted = (self.layers - 1, self.experts, self.experts)
        if pairs.dtype.kind not in "iu" or pairs.shape != wanted:
            found = f"array of {pairs.dtype}, shape {pairs.shape}"
            raise TraceError(self.path, f"must hold integers {wanted}", "pairs", found)
        if pairs.size and pairs.min() < 0:
            raise TraceError(self.path, "must be at least 0", "pairs", pairs.min())
        return pairs.astype(np.int64)

    def passes(self, layers: Sequence[int], steps: int) -> Iterator[list[int]]:
        """Parts of `layers`, each of as many as memory holds for that many steps: a pass over the trace for each."""
        together = max(1, MOST_BYTES // (steps * self.sources * self.experts * 8))
        for start in range(0, len(layers), together):
            yield list(layers[start : start + together])

    def by_layer(self, layers: Sequence[int], start: int, stop: int) -> Iterator[Int64]:
        """Steps `start` to `stop` of each of `layers`, int64[steps, sources, experts], in as many passes as needed.

        Raises:
            TraceError: as `read`.
        """
        for part in self.passes(layers, 2 * (stop - start)):  # the caller may still hold those of the pass before
            steps = np.empty((len(part), stop - start, self.sources, self.experts), np.int64)
            for index, counts in enumerate(self.read(start, stop)):
                steps[:, index] = counts[part]
            yield from steps

    def windows(self, length: int, every: int, first: int = 0, layers: Sequence[int] | None = None) -> Iterator[Window]:
        """Windows of `length` steps, starting one every `every` steps from step `first`, each with the step after it.

        They hold the given layers in that order, all by default; `passes` says how many suit memory.

        Raises:
            TraceError: the trace is shorter than a window and one step.
        """
        chosen = list(range(self.layers) if layers is None else layers)
        if self.steps <= length:
            reason = f"has {self.steps} steps; a window of {length} and the step after it need {length + 1}"
            raise TraceError(self.path, reason)
        history: deque[Int64] = deque(maxlen=length)
        for step, counts in enumerate(self.read()):
            of_layers = counts[chosen]
            if step >= first + length and (step - first - length) % every == 0:
                yield Window(step, np.stack(history), of_layers)
            history.append(of_layers)

    def window_count(self, length: int, every: int) -> int:
        """Number of windows that `windows` yields."""
        return max(0, -(-(self.steps - length) // every))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, bool(fortran), dtype


def _scalar(archive: zipfile.ZipFile, path: Path, name: str) -> int:
    with archive.open(f"{name}.npy") as file:
        value: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise TraceError(path, "must be one integer", name, f"array of {value.dtype}, shape {value.shape}")
    return int(value.reshape(-1)[0])


def _layer_numbers(archive: zipfile.ZipFile, path: Path, layers: int) -> tuple[int, ...] | None:
    if "layer_numbers.npy" not in archive.namelist():
        return None
    with archive.open("layer_numbers.npy") as file:
        value: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    rising = value.ndim == 1 and len(value) == layers and value.dtype.kind in "iu" and bool((np.diff(value) > 0).all())
    if not rising or (layers and value[0] < 0):
        found = f"array of {value.dtype}, shape {value.shape}"
        raise TraceError(path, f"must be {layers} rising integers, one for each layer", "layer_numbers", found)
    return tuple(value.tolist())


def _skip(file: IO[bytes], size: int) -> None:
    while size > 0:
        read = len(file.read(min(size, 1 << 20)))
        if read == 0:
            return
        size -= read
