"""The last steps of a run's counts, to be written as a trace."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import torch.distributed as dist

from moeplan.solvers.arrays import Int64

__all__ = ["TraceRing"]


class TraceRing:
    """Keeps the newest steps of this rank's counts.

    Args:
        limit: Most steps to keep; the oldest go first.

    Raises:
        ValueError: `limit` is below 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit = {limit}: must be at least 1")
        self._steps: deque[Int64] = deque(maxlen=limit)
        self._added = 0

    def add(self, counts: Int64) -> None:
        """Add the next step, int64[layers, experts]."""
        self._steps.append(counts)
        self._added += 1

    def save(self, path: Path | str, group: dist.ProcessGroup | None = None, *, top_k: int | None = None) -> None:
        """Write the trace ``counts[step, layer, source, expert]``; every rank calls it, the first one writes.

        Args:
            path: The .npz file.
            group: Ranks that are the sources, in order; all by default.
            top_k: Experts per token, to be kept with it.

        Raises:
            ValueError: there are no steps, or ranks hold different ones; raised on every rank.
        """
        first = self._added - len(self._steps)
        mine = first, np.stack(self._steps) if self._steps else np.zeros((0, 0, 0), np.int64)
        tables = [mine]
        if dist.is_initialized():
            tables = [mine] * dist.get_world_size(group)
            dist.all_gather_object(tables, mine, group=group)
        if any((begin, table.shape) != (first, mine[1].shape) for begin, table in tables) or not self._steps:
            held = [(begin, len(table)) for begin, table in tables]
            raise ValueError(f"(first step, steps) of each rank = {held}: must be the same, and not empty")
        if dist.is_initialized() and dist.get_rank(group):
            return
        counts = np.stack([table for _, table in tables], axis=2)
        facts = {} if top_k is None else {"top_k": top_k}
        np.savez_compressed(path, counts=counts.astype(np.int32), first_step=first, **facts)  # type: ignore[arg-type]
