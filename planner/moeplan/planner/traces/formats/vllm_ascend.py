"""Loads as vllm-ascend's offline planner takes them (examples/eplb/eplb_strategy.py): a saved tensor [layers, experts].

The engine records no loads by itself: its ``expert_map.json`` is a layout, for `moeplan evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, counts_of, load_torch, start_of
from moeplan.planner.traces.trace import TraceError

__all__ = ["is_vllm_ascend", "read_vllm_ascend"]


def is_vllm_ascend(path: Path) -> bool:
    """True if the file is a saved object that no other format claims."""
    return start_of(path).startswith(b"PK") and path.suffix in (".pt", ".pth")


def read_vllm_ascend(paths: Sequence[Path]) -> Recording:
    """Each file is a step."""
    loads = [_loads(path) for path in paths]
    for path, load in zip(paths, loads, strict=True):
        if load.shape != loads[0].shape:
            raise TraceError(path, f"must be as large as {paths[0]}, {loads[0].shape}", "tensor", load.shape)
    layers, experts = loads[0].shape
    return Recording(range(layers), 1, experts, (load[:, np.newaxis] for load in loads), total=len(loads))


def _loads(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    if start_of(path).lstrip().startswith(b"{"):
        raise TraceError(path, "is a layout, not a recording; judge it with `moeplan evaluate TRACE --layout`")
    loads: np.ndarray[tuple[int, int], np.dtype[np.int64]] = counts_of(path, "tensor", load_torch(path), 2)
    return loads
