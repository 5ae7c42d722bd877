"""The last steps of a run, written as a trace that the planner reads: ``counts[step, layer, source, expert]``."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.solvers.problem.arrays import Int64

__all__ = ["TraceRing"]


class TraceRing:
    """Counts of the last steps, in memory until they are written.

    Args:
        limit: Steps to keep; older ones fall out.
        top_k: Experts per token, if it should be in the file.
        tokens_per_rank: Tokens that each source routes per step, if it should be in the file.

    Attributes:
        first_step: Number of the oldest step kept, counted from 0 at the first `add`.
    """

    def __init__(self, limit: int, *, top_k: int | None = None, tokens_per_rank: int | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit = {limit}: must be at least 1 step")
        self._steps: deque[Int64] = deque(maxlen=limit)
        self._scalars = {"top_k": top_k, "tokens_per_rank": tokens_per_rank}
        self.first_step = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, counts: Int64 | None) -> None:
        """Append a step.

        Args:
            counts: int64[layers, experts] of this rank, or int64[layers, sources, experts] gathered from several; None,
                which `Recorder.step` returns at first, is passed over.

        Raises:
            ValueError: the shape differs from that of the steps before.
        """
        if counts is None:
            return
        step = counts[:, None, :] if counts.ndim == 2 else counts
        if step.ndim != 3 or (self._steps and step.shape != self._steps[0].shape):
            expected = self._steps[0].shape if self._steps else "[layers, experts] or [layers, sources, experts]"
            raise ValueError(f"counts of shape {counts.shape}: must be {expected}, as [layers, sources, experts]")
        self.first_step += len(self._steps) == self._steps.maxlen
        self._steps.append(step.copy())

    def save(self, path: Path | str) -> None:
        """Write the steps kept, in place of what was at `path`, whole or not at all.

        Raises:
            ValueError: no step has been added.
            OSError: the file cannot be written.
        """
        if not self._steps:
            raise ValueError("no steps: add counts before save")
        counts = np.stack(self._steps)
        if counts.max() <= np.iinfo(np.int32).max:
            counts = counts.astype(np.int32)
        arrays: dict[str, Any] = {"counts": counts, "first_step": np.int64(self.first_step)}
        arrays |= {name: np.int64(value) for name, value in self._scalars.items() if value is not None}
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
