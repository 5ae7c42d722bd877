"""From candidates to the next version of a job's layouts: which are taken, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeplan.api.job_plans import Decision, JobPlan, LayerPlan, Reason
from moeplan.api.jobs import JobSpec
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.layout import Layout, placed_in
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["Candidate", "back_to", "decide", "initial_plan", "move_time_s", "replica_time_s"]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A policy's offer for one layer, beside the layout in force on the same forecast.

    Attributes:
        layer: Index of the layer.
        layout: New layout.
        split_rule: Rule by which ranks divide tokens, and by which the cost was counted.
        cost_s: Cost of the new layout, seconds.
        imbalance: Largest load per speed over the mean of the new layout, averaged over the scenarios.
        bound: No layout has a smaller imbalance.
        gap: ``imbalance / bound - 1``.
        cost_before_s: Cost of the layout in force, seconds.
        imbalance_before: Imbalance of the layout in force.
        seconds: Time that the policy took.
    """

    layer: int
    layout: Layout
    split_rule: SplitRule
    cost_s: float
    bound: float
    gap: float
    imbalance: float
    cost_before_s: float
    imbalance_before: float
    seconds: float


def initial_plan(spec: JobSpec, version: int, incarnation: int) -> JobPlan:
    """The plan that a job begins with."""
    rule = spec.split_rule or SplitRule.OPTIMAL
    layers = tuple(LayerPlan(index, version, layout, rule) for index, layout in enumerate(spec.initial))
    return JobPlan(version, incarnation, layers, Decision(Reason.INITIAL, changed_layers=len(layers)))


def move_time_s(cluster: Cluster, replica_bytes: int, before: Layout, after: Layout) -> tuple[float, int]:
    """Seconds to send the replicas that `after` needs where `before` has none, and how many that is.

    Devices receive at the same time, each its own arrivals one after the other, over the link between nodes if there
    are several: what the busiest device needs.
    """
    # Not kept with the layouts: a job holds many of them, and devices x experts is far more than their slots.
    had, has = placed_in(before.slots, before.experts), placed_in(after.slots, after.experts)
    arrivals = (has & ~had).sum(axis=1)
    busiest = int(arrivals.max(initial=0))
    return busiest * replica_time_s(cluster, replica_bytes), int(arrivals.sum())


def replica_time_s(cluster: Cluster, replica_bytes: int) -> float:
    """Seconds to send one replica, over the link between nodes if there are several."""
    link = cluster.inter_node if cluster.nodes > 1 else cluster.intra_node
    return link.latency_s + replica_bytes / link.bytes_per_s


def decide(
    spec: JobSpec, current: JobPlan, candidates: list[Candidate], step: int, window_steps: int
) -> tuple[Decision, tuple[LayerPlan, ...]]:
    """Take, layer by layer, the new layouts that are worth their moves.

    Args:
        spec: The job.
        current: Plan in force.
        candidates: New layouts, at most one per layer.
        step: Newest step in the window.
        window_steps: Steps in the window.

    Returns:
        The decision, and all layers of the next version (those of `current`, where they stay).
    """
    payback = spec.replan.payback
    version = current.version + 1
    layers = list(current.layers)
    before_s = after_s = moving_s = 0.0
    changed = cheaper = 0
    for candidate in candidates:
        old = current.layers[candidate.layer]
        gain_s = candidate.cost_before_s - candidate.cost_s
        before_s += candidate.cost_before_s
        seconds, moved = move_time_s(spec.cluster, spec.moved_bytes, old.layout, candidate.layout)
        better = gain_s > 0 and not np.array_equal(old.layout.slots, candidate.layout.slots)
        cheaper += better
        if not better or (payback and gain_s * payback.horizon_steps <= payback.cost_factor * seconds):
            after_s += candidate.cost_before_s
            continue
        after_s += candidate.cost_s
        moving_s += seconds
        changed += 1
        layers[candidate.layer] = LayerPlan(
            layer=candidate.layer,
            version=version,
            layout=candidate.layout,
            split_rule=candidate.split_rule,
            cost_s=candidate.cost_s,
            bound=candidate.bound,
            gap=candidate.gap,
            imbalance=candidate.imbalance,
            imbalance_before=candidate.imbalance_before,
            moved_replicas=moved,
        )
    if changed:
        reason = Reason.GAIN_PAYS if payback else Reason.GAIN
    else:
        reason = Reason.GAIN_TOO_SMALL if cheaper else Reason.NO_GAIN
    decision = Decision(
        reason=reason,
        step=step,
        window_steps=window_steps,
        cost_before_s=before_s,
        cost_after_s=after_s,
        move_cost_s=moving_s,
        horizon_steps=payback.horizon_steps if payback else 0,
        changed_layers=changed,
    )
    return decision, tuple(layers)


def back_to(current: JobPlan, in_force: JobPlan, detail: str) -> JobPlan:
    """A new version with the layouts of `in_force`, after `current` could not be applied."""
    version = current.version + 1
    layers = tuple(
        replace(old, version=version) if old.layout != new.layout else new
        for old, new in zip(in_force.layers, current.layers, strict=True)
    )
    changed = sum(layer.version == version for layer in layers)
    decision = Decision(Reason.APPLY_FAILED, step=current.decision.step, changed_layers=changed, detail=detail)
    return JobPlan(version, current.incarnation, layers, decision)
