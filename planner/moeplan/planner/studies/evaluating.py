"""Layouts in force, judged beside what a new plan would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.planner.jobs.job_plan import move_time_s
from moeplan.planner.studies.planning import PlannedLayer, PlanRequest
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Demand, Layout, Problem, evaluate

__all__ = ["LayerVerdict", "Verdict", "in_force", "verdict"]


class LayerVerdict(TypedDict):
    """One layer: of the layout in force and of a new plan, on the window and on the step after it.

    `imbalance`, `next_step` and `seconds` (a step of the layer by the cost model) are of the layout in force; those
    with `planned` in their name are of the plan. Seconds are of the step after the window, or else of its last one.
    `move_seconds` go by until the replicas of the plan are copied.
    """

    layer: int
    imbalance: float
    planned: float
    bound: float
    next_step: float | None
    next_step_planned: float | None
    moves: int
    seconds: float
    seconds_planned: float
    move_seconds: float


class Verdict(TypedDict):
    """All layers, and the mean and the 95th percentile of what `next_step` has, or else `imbalance`.

    `pays_after_steps` is the number of steps after which the plan has saved what moving to it takes; None where it
    saves nothing.
    """

    layers: list[LayerVerdict]
    mean: float
    mean_planned: float
    p95: float
    p95_planned: float
    moves: int
    seconds: float
    seconds_planned: float
    move_seconds: float
    pays_after_steps: float | None


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


def verdict(request: PlanRequest, planned: Sequence[PlannedLayer]) -> Verdict:
    """The verdict of plans that were made from the layouts in force.

    Args:
        request: What was planned; its cluster and expert are the model of time.
        planned: The plans.
    """
    expert, cluster = request.expert, request.cluster
    layers = []
    for each in planned:
        after, old, new = each.next_step, request.current[each.layer], each.plan.layout
        assert each.window.before is not None, "a layout in force holds every expert"
        problem = Problem(cluster, Demand.of(each.judged), expert)
        times = [evaluate(problem, layout, each.plan.split.rule).cost.mean_s for layout in (old, new)]
        move_s, moves = move_time_s(cluster, expert.weight_bytes, old, new)
        layers.append(
            LayerVerdict(
                layer=each.layer,
                imbalance=each.window.before,
                planned=each.window.after,
                bound=each.plan.bound,
                next_step=None if after is None else after.before,
                next_step_planned=None if after is None else after.after,
                moves=moves,
                seconds=times[0],
                seconds_planned=times[1],
                move_seconds=move_s,
            )
        )
    now = [row["imbalance"] if row["next_step"] is None else row["next_step"] for row in layers]
    later = [row["planned"] if row["next_step_planned"] is None else row["next_step_planned"] for row in layers]
    seconds, seconds_planned, move_seconds = (
        sum(row[name] for row in layers) for name in ("seconds", "seconds_planned", "move_seconds")
    )
    saved = seconds - seconds_planned
    return Verdict(
        layers=layers,
        mean=float(np.mean(now)),
        mean_planned=float(np.mean(later)),
        p95=float(np.quantile(now, 0.95)),
        p95_planned=float(np.quantile(later, 0.95)),
        moves=sum(row["moves"] for row in layers),
        seconds=seconds,
        seconds_planned=seconds_planned,
        move_seconds=move_seconds,
        pays_after_steps=move_seconds / saved if saved > 0 else None,
    )
