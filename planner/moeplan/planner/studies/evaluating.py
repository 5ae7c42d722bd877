"""Layouts in force, judged beside what a new plan would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.planner.studies.planning import PlannedLayer
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Layout

__all__ = ["LayerVerdict", "Verdict", "in_force", "verdict"]


class LayerVerdict(TypedDict):
    """Imbalance of one layer: of the layout in force and of a new plan, on the window and on the step after it."""

    layer: int
    imbalance: float
    planned: float
    bound: float
    next_step: float | None
    next_step_planned: float | None
    moves: int


class Verdict(TypedDict):
    """All layers, and the mean and the 95th percentile of what `next_step` has, or else `imbalance`."""

    layers: list[LayerVerdict]
    mean: float
    mean_planned: float
    p95: float
    p95_planned: float
    moves: int


def in_force(path: Path, layouts: Mapping[int, Layout], trace: Trace) -> dict[int, Layout]:
    """Layouts by layer of the trace.

    A file that numbers layers as the model does is matched by the numbers that the trace knows, one that counts MoE
    layers by their order.

    Raises:
        FileError: layers or experts of both do not match.
    """
    numbers = trace.layer_numbers or tuple(range(trace.layers))
    if set(numbers) <= set(layouts):
        found = {layer: layouts[number] for layer, number in enumerate(numbers)}
    elif set(layouts) <= set(range(trace.layers)):
        found = dict(layouts)
    else:
        have = f"{min(layouts)} to {max(layouts)}"
        raise FileError(
            path, f"does not suit the trace, whose layers are {numbers[0]} to {numbers[-1]}", "layers", have
        )
    for layer, layout in found.items():
        if layout.experts != trace.experts:
            raise FileError(path, f"must have {trace.experts} experts, as the trace", f"layer {layer}", layout.experts)
        if layout.slots.shape != found[min(found)].slots.shape:
            raise FileError(path, "must be as large as the first layer", f"layer {layer}", layout.slots.shape)
    return found


def verdict(planned: Sequence[PlannedLayer]) -> Verdict:
    """The verdict of plans that were made from the layouts in force."""
    layers = []
    for each in planned:
        after = each.next_step
        assert each.window.before is not None, "a layout in force holds every expert"
        layers.append(
            LayerVerdict(
                layer=each.layer,
                imbalance=each.window.before,
                planned=each.window.after,
                bound=each.plan.bound,
                next_step=None if after is None else after.before,
                next_step_planned=None if after is None else after.after,
                moves=0 if each.plan.moves is None else len(each.plan.moves.expert),
            )
        )
    now = [row["imbalance"] if row["next_step"] is None else row["next_step"] for row in layers]
    new = [row["planned"] if row["next_step_planned"] is None else row["next_step_planned"] for row in layers]
    return Verdict(
        layers=layers,
        mean=float(np.mean(now)),
        mean_planned=float(np.mean(new)),
        p95=float(np.quantile(now, 0.95)),
        p95_planned=float(np.quantile(new, 0.95)),
        moves=sum(row["moves"] for row in layers),
    )
