"""The document of a page, as JSON: the same form for a trace and for a running job, so that one front end reads both.

A document is a head and chunks of steps, in order:

    head   {"kind": "trace" | "job", "title", "layers": [..], "experts", "devices", "slots", "sources", "speed": [..],
            "strategies": [{"name", "label", "about"}], "cost": null | {"step_s_per_token", "weight_bytes", "text"},
            "thinned": n, "notes": [..]}
    chunk  {"steps": [..], "demand": i4[steps, layers, experts],
            "strategies": [{"layouts": i4[versions, layers, devices, slots], "version": [one per step],
                            "loads": i4[steps, layers, devices, slots],
                            "seconds": null | {"compute", "lost", "traffic", "moves": [one per step]}}]}
    plans  [{"strategy", "version", "step", "reason", "detail", "changed", "moved", "gain_s", "move_s", "created",
             "layers": [{"layer", "before", "predicted", "gap", "moved"}]}]

Loads are tokens of each slot. Imbalance is not in it: the front end computes it from loads, as a reader could by hand.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.api.job_plans import Decision, JobPlan, Reason
from moeplan.solvers.problem.arrays import Int64

__all__ = ["Seconds", "StrategySteps", "chunk", "packed", "plan_row", "script_json"]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Modelled seconds of a strategy, one value per step shown, with those of the steps left out before it.

    Attributes:
        compute: Slowest device's compute, all layers.
        lost: The part of it that the mean device waits.
        traffic: Exchange of tokens.
        moves: Weights sent.
    """

    compute: Sequence[float]
    lost: Sequence[float]
    traffic: Sequence[float]
    moves: Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class StrategySteps:
    """A strategy in the steps of a chunk.

    Attributes:
        layouts: int32[versions, layers, devices, slots], experts, -1 for an empty slot.
        version: Index of the layouts in force, one per step.
        loads: int64[steps, layers, devices, slots], tokens.
        seconds: None where no expert's cost is known.
    """

    layouts: npt.NDArray[np.int32]
    version: Sequence[int]
    loads: Int64
    seconds: Seconds | None


def packed(array: npt.NDArray[np.integer]) -> dict[str, object]:
    """An array as JSON: little-endian 32-bit integers, or doubles for numbers above 2**31, deflated, base64."""
    dtype = "<i4" if array.max(initial=0) < 2**31 else "<f8"
    data = np.ascontiguousarray(array.astype(dtype)).tobytes()
    return {"dtype": dtype, "shape": list(array.shape), "data": base64.b64encode(zlib.compress(data, 9)).decode()}


def chunk(steps: Sequence[int], demand: Int64, strategies: Sequence[StrategySteps]) -> dict[str, object]:
    """Some steps of a document.

    Args:
        steps: Their numbers.
        demand: int64[steps, layers, experts], tokens of all sources.
        strategies: In the order of the head.
    """
    return {
        "steps": list(steps),
        "demand": packed(demand),
        "strategies": [
            {
                "layouts": packed(strategy.layouts),
                "version": list(strategy.version),
                "loads": packed(strategy.loads),
                "seconds": None
                if strategy.seconds is None
                else {
                    name: [float(f"{value:.6g}") for value in getattr(strategy.seconds, name)]
                    for name in ("compute", "lost", "traffic", "moves")
                },
            }
            for strategy in strategies
        ],
    }


def plan_row(strategy: int, decision: Decision, plan: JobPlan | None) -> dict[str, object]:
    """A decision as a row of the table of plans.

    Args:
        strategy: Index of the strategy that made it.
        decision: To move or to stay.
        plan: The plan that it brought; None if it was to stay.
    """
    changed = () if plan is None else plan.layers_after(plan.version - 1)
    return {
        "strategy": strategy,
        "version": None if plan is None else plan.version,
        "step": None if decision.reason is Reason.INITIAL else decision.step,
        "reason": decision.reason.value,
        "detail": decision.detail,
        "changed": decision.changed_layers,
        "moved": sum(layer.moved_replicas for layer in changed),
        "gain_s": decision.cost_before_s - decision.cost_after_s,
        "move_s": decision.move_cost_s,
        "horizon": decision.horizon_steps,
        "created": None if plan is None or plan.created is None else plan.created.isoformat(),
        "layers": [
            {
                "layer": layer.layer,
                "before": layer.imbalance_before,
                "predicted": layer.imbalance,
                "gap": layer.gap,
                "moved": layer.moved_replicas,
            }
            for layer in changed
        ],
    }


def script_json(document: object) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    return json.dumps(document, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
