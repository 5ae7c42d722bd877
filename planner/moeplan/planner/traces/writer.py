"""Writing trace files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeplan.planner.traces.formats.recording import Recording
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import MAX_TOKENS

__all__ = ["write_recording", "write_trace"]

BLOCK = 1 << 20


def write_trace(path: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    """Write a trace file, compressed, in one step, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def write_recording(path: Path, recording: Recording, on_step: Callable[[], None] = lambda: None) -> int:
    """Write a recording as a trace, one step at a time, so that it may be larger than memory.

    The steps are first written to a file beside `path`, as the head of a trace tells their number.

    Returns:
        The number of steps.

    Raises:
        TraceError: the recording holds no step, or a count that no plan can hold.
    """
    shape = (len(recording.layer_numbers), recording.sources, recording.experts)
    if 0 in shape:
        raise TraceError(path, "must have layers, sources and experts", "the recording", shape)
    if (
        not 0
        <= min(recording.first_step, *recording.layer_numbers)
        <= max(recording.first_step, *recording.layer_numbers)
        <= MAX_TOKENS
    ):
        raise TraceError(path, "numbers of its first step and of layers must be 0 to 2**53")
    temporary = path.with_name(path.name + ".part")
    steps = 0
    try:
        with tempfile.TemporaryFile(dir=path.parent) as spool:
            for counts in recording.steps:
                if counts.shape != shape:
                    raise TraceError(path, f"must be {shape}", f"step {steps}", counts.shape)
                if counts.max(initial=0) > MAX_TOKENS:
                    raise TraceError(path, "must be 0 to 2**53", f"step {steps}", counts.max())
                spool.write(np.ascontiguousarray(counts, np.int64).data)
                steps += 1
                on_step()
            if not steps:
                raise TraceError(path, "the recording holds no whole step")
            spool.seek(0)
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                with archive.open("counts.npy", "w", force_zip64=True) as file:
                    head = {"descr": "<i8", "fortran_order": False, "shape": (steps, *shape)}
                    np.lib.format.write_array_header_2_0(file, head)
                    while block := spool.read(BLOCK):
                        file.write(block)
                for name, value in (
                    ("first_step", np.array(recording.first_step)),
                    ("layer_numbers", np.array(recording.layer_numbers, np.int64)),
                ):
                    with archive.open(f"{name}.npy", "w") as file:
                        np.lib.format.write_array(file, value, allow_pickle=False)
        temporary.replace(path)
    finally:
        if temporary.exists():
            os.unlink(temporary)
    return steps
