"""Writing trace files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["write_trace"]


def write_trace(path: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    """Write a trace file, compressed, in one step, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    temporary.replace(path)
