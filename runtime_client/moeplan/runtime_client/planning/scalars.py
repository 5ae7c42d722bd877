"""A step in a few numbers, for experiment trackers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.runtime_client.planning.session import PlannerSession
from moeplan.solvers.problem.arrays import Int64

__all__ = ["step_scalars"]

LENT = ("weights.forward", "weights.backward")


def step_scalars(
    layers: Sequence[ExpertLayer], counts: Int64, session: PlannerSession | None = None
) -> dict[str, float]:
    """A step in the layers, as plain numbers by name. Any one rank may log them.

    Args:
        layers: The model's expert layers, in order.
        counts: int64[layers, ranks, experts], tokens of every rank in the step, one micro-batch.
        session: The session, if layouts are planned; call this before its `step`, which may change them.

    Returns:
        ``moeplan/imbalance`` and ``moeplan/worst_imbalance``: largest load of a rank over the mean, of the layers on
        average and of the worst one. ``moeplan/balanced_share``: estimate of the share of the force-balanced speed that
        the experts reach, the mean rank's tokens over the busiest one's, all layers together.
        ``moeplan/replicas``: replicas beyond one per expert, all layers. ``moeplan/bytes_lent``: bytes of weights that
        this rank has sent to replicas since the layers' ``traffic`` was last cleared. ``moeplan/plan_version``: that of
        the layouts in force, 0 for those of the start.

    Raises:
        ValueError: counts are of another number of layers.
        TypeError: a layer is neither fully sharded nor resident.
    """
    if len(counts) != len(layers):
        raise ValueError(f"counts = array of shape {counts.shape}: must be [{len(layers)} layers, ranks, experts]")
    most, mean, imbalance, replicas, lent = 0.0, 0.0, [], 0, 0
    for layer, table in zip(layers, counts, strict=True):
        loads, more = _loads(layer, np.ascontiguousarray(table))
        most += float(loads.max())
        mean += float(loads.mean())
        imbalance.append(float(loads.max() / loads.mean()) if loads.any() else 1.0)
        replicas += more
        lent += sum(layer.traffic[purpose] for purpose in LENT)
    return {
        "moeplan/imbalance": float(np.mean(imbalance)),
        "moeplan/worst_imbalance": max(imbalance),
        "moeplan/balanced_share": mean / most if most else 1.0,
        "moeplan/replicas": float(replicas),
        "moeplan/bytes_lent": float(lent),
        "moeplan/plan_version": float(0 if session is None else session.version),
    }


def _loads(layer: ExpertLayer, counts: Int64) -> tuple[Int64, int]:
    """int64[ranks], tokens that each rank computes, and replicas beyond one per expert."""
    if isinstance(layer, FullyShardedExperts):
        return layer.device_loads(counts), int((layer.layout.slots >= 0).sum()) - layer.experts
    if isinstance(layer, ResidentExperts):
        plan = layer.planner.plan(counts)
        return plan.load.copy(), plan.replicas
    raise TypeError(f"{type(layer).__name__}: must be FullyShardedExperts or ResidentExperts")
