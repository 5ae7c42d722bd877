"""Splits within the memory that is left for activations.

A device whose memory holds `cap` tokens beside its replicas computes at most min(speed * M, cap) tokens when the
largest load per speed is M: it acts as a slower device. So the best split under caps is the best split of slower
devices, for the least M at which these get through; bisection finds it.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.layout import EMPTY
from moeplan.solvers.problem.problem import ExpertSpec, Problem
from moeplan.solvers.split.flow import optimal_quota

__all__ = ["best_quota", "memory_limited", "planning_speed", "quota_in_memory", "token_caps"]

HALVINGS = 40

FIRST_STEP = 1 / 64
"""Part of the least level without the limit that bisection first goes beyond it: as a rule memory costs little."""


def memory_limited(cluster: Cluster, expert: ExpertSpec) -> bool:
    """True if the tokens that a device may compute depend on its replicas."""
    return cluster.memory_bytes is not None and expert.activation_bytes > 0


def token_caps(cluster: Cluster, expert: ExpertSpec, replicas: Int64) -> Float64 | None:
    """float64[devices]: tokens whose activations fit beside so many replicas, int64[devices]; None without a limit."""
    if not memory_limited(cluster, expert):
        return None
    assert cluster.memory_bytes is not None
    left = cluster.memory_bytes - replicas * (expert.weight_bytes + expert.state_bytes)
    caps: Float64 = np.maximum(0, left // expert.activation_bytes).astype(np.float64)
    return caps


def quota_in_memory(cluster: Cluster, expert: ExpertSpec, slots: Int32, loads: Int64) -> tuple[Int64, Bool, bool]:
    """The split of least largest load per speed that fits into memory.

    Args:
        cluster: Devices.
        expert: What replicas and tokens occupy.
        slots: int32[devices, width], a valid layout.
        loads: int64[scenarios, experts].

    Returns:
        quota int64[scenarios, devices, width] and tight bool[scenarios, devices], as of `flow.optimal_quota`, and
        whether memory suffices; where it does not in a scenario, that and the later ones are split without the limit.
    """
    speed = cluster.speed
    quota, tight = optimal_quota(slots, loads, speed)
    if not memory_limited(cluster, expert):
        return quota, tight, True
    caps = token_caps(cluster, expert, (slots != EMPTY).sum(axis=1))
    assert caps is not None
    for s in np.flatnonzero((quota.sum(axis=2) > caps).any(axis=1)):
        low = float((quota[s].sum(axis=1) / speed).max())
        found = None
        high, step = float(loads[s].sum() / speed.min()), low * FIRST_STEP
        for _ in range(HALVINGS):
            level = high if found is None else min((low + high) / 2, low + step)
            slower = np.maximum(np.minimum(speed, caps / level), 1e-9 / level)
            trial, cut = optimal_quota(slots, loads[s : s + 1], slower)
            if (trial[0].sum(axis=1) <= np.minimum(caps, level * speed * (1 + 1e-12))).all():
                found, high = (trial[0], cut[0]), level
            elif found is None:
                break
            else:
                low, step = level, 2 * step
            if high - low < 0.5 / speed.max():
                break
        if found is None:
            return quota, tight, False
        quota[s], tight[s] = found
    return quota, tight, True


def best_quota(problem: Problem, slots: Int32) -> tuple[Int64, Bool, bool]:
    """`quota_in_memory` of a problem's demand."""
    return quota_in_memory(problem.cluster, problem.expert, slots, problem.loads)


def planning_speed(problem: Problem) -> Float64:
    """float64[devices]: speeds by which a search that knows no memory should plan.

    As the module says, for the scenario with most tokens and devices with all their slots in use.
    """
    speed = problem.cluster.speed
    caps = token_caps(problem.cluster, problem.expert, problem.capacity.astype(np.int64))
    total = float(problem.loads.sum(axis=1).max())
    if caps is None or total == 0 or caps[problem.capacity > 0].sum() < total:
        return speed
    low, high = 0.0, total / float(speed.min())
    for _ in range(HALVINGS):
        level = (low + high) / 2
        low, high = (
            (low, level) if np.minimum(caps, speed * level)[problem.capacity > 0].sum() >= total else (level, high)
        )
    slower: Float64 = np.maximum(np.minimum(speed, caps / high), speed * 1e-6)
    return slower
