"""DeepEP's redundancy mapping: int32[ranks, slots], the experts whose weights each rank prefetches, -1 for none.

One array per layer in an ``.npz`` file, named ``layer_{number}``. Experts stay at home, contiguous over the ranks, so
only replicas beyond those are in it. Source: DeepEP 2.5, ``EPBuffer.lb_prefetch_weights``.
"""

from __future__ import annotations

import io

import numpy as np

from moeplan.planner.exports.model_layouts import ModelLayouts
from moeplan.solvers import Layout, ProblemError
from moeplan.solvers.problem.arrays import Int32

__all__ = ["write_deepep"]


def write_deepep(model: ModelLayouts) -> bytes:
    """The file's content."""
    mappings = {f"layer_{layer}": _beyond_home(layout) for layer, layout in model.layouts.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **mappings)
    return buffer.getvalue()


def _beyond_home(layout: Layout) -> Int32:
    """Replicas of a layout beyond those at home, int32[ranks, slots], in the order of experts, -1 behind them.

    Raises:
        ProblemError: experts cannot be dealt evenly to ranks, or one is not at home.
    """
    each, left = divmod(layout.experts, layout.devices)
    if left:
        raise ProblemError("experts", layout.experts, f"must be a multiple of the ranks ({layout.devices})")
    mapping = np.full((layout.devices, layout.slots.shape[1] - each), -1, np.int32)
    for device, slots in enumerate(layout.slots):
        held = set(slots[slots >= 0].tolist())
        home = range(device * each, (device + 1) * each)
        if away := sorted(set(home) - held):
            raise ProblemError(
                "layout", f"expert {away[0]} is not on rank {device}", "plan with `moeplan plan --for deepep`"
            )
        extra = sorted(held - set(home))
        mapping[device, : len(extra)] = extra
    return mapping
