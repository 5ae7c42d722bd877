"""Versions of a job's layouts, and why each is as it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["Decision", "JobPlan", "LayerPlan", "Reason"]


class Reason(Enum):
    """Why a plan is as it is; the values are the names in the API, the log and the metrics."""

    UNKNOWN = "unknown"
    """One that a newer server gives."""
    INITIAL = "initial"
    GAIN = "gain"
    GAIN_PAYS = "gain_pays"
    NO_GAIN = "no_gain"
    GAIN_TOO_SMALL = "gain_too_small"
    SOLVE_FAILED = "solve_failed"
    STORE_FAILED = "store_failed"
    APPLY_FAILED = "apply_failed"


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision to take a new plan or to stay, with its numbers.

    Attributes:
        reason: Why.
        step: Newest step taken into account.
        window_steps: Steps in the window.
        cost_before_s: Predicted cost of a step with the layouts in force, over all layers solved, seconds.
        cost_after_s: The same with the layouts decided for.
        move_cost_s: Time to send what moves, all layers, seconds.
        horizon_steps: Steps over which gains counted; 0 where moving is free.
        changed_layers: Layers whose layout changes.
        detail: More, for people.
    """

    reason: Reason
    step: int = 0
    window_steps: int = 0
    cost_before_s: float = 0.0
    cost_after_s: float = 0.0
    move_cost_s: float = 0.0
    horizon_steps: int = 0
    changed_layers: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """The layout of one layer since a version; the numbers are None for an initial layout.

    Attributes:
        layer: Index of the layer.
        version: Version of the job's plan that brought it.
        layout: Which expert sits in which slot.
        split_rule: Rule by which ranks divide tokens, and by which the numbers were counted.
        cost_s: Predicted cost of a step, averaged over the scenarios, seconds.
        bound: No layout with these slots has a smaller imbalance.
        gap: ``imbalance / bound - 1``.
        imbalance: Predicted largest load per speed over the mean, averaged over the scenarios.
        imbalance_before: That of the layout that it replaces, on the same forecast.
        moved_replicas: Replicas that arrive on devices that did not hold them.
    """

    layer: int
    version: int
    layout: Layout
    split_rule: SplitRule = SplitRule.OPTIMAL
    cost_s: float | None = None
    bound: float | None = None
    gap: float | None = None
    imbalance: float | None = None
    imbalance_before: float | None = None
    moved_replicas: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class JobPlan:
    """One version of all layers' layouts.

    Attributes:
        version: At least 1, and only growing.
        incarnation: Incarnation of the job that it was made for.
        layers: One per layer, in order; from `watch_plans` those that changed since the version before.
        decision: Why.
        solve_s: From the window's closing to the plan, seconds.
        created: When it was made, in UTC; None until it is.
    """

    version: int
    incarnation: int
    layers: tuple[LayerPlan, ...]
    decision: Decision
    solve_s: float = 0.0
    created: datetime | None = None

    def layers_after(self, version: int) -> tuple[LayerPlan, ...]:
        """Layers whose layout is newer than `version`."""
        return tuple(layer for layer in self.layers if layer.version > version)
