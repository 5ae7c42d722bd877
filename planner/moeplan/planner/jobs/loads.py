"""Tokens of each slot under layouts, step by step: what a worker does for the live page."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["LoadsTask", "slot_loads"]


@dataclass(frozen=True, slots=True, eq=False)
class LoadsTask:
    """Steps of a job, and the layouts to judge them by.

    Attributes:
        cluster: Its devices.
        demand: int64[steps, layers, experts].
        layouts: Of each strategy and step, one layout per layer.
        rule: How tokens are divided: even or optimal, the rules that need no sources.
    """

    cluster: Cluster
    demand: Int64
    layouts: tuple[tuple[tuple[Layout, ...], ...], ...]
    rule: SplitRule


def slot_loads(task: LoadsTask) -> Int64:
    """int64[strategies, steps, layers, devices, slots], tokens of each slot."""
    from moeplan.solvers import Demand, Problem, evaluate  # the compiler loads slowly

    steps, layers, experts = task.demand.shape
    devices, slots = task.cluster.devices, task.cluster.max_slots
    # Judged without limits: slots and memory are what plans must keep, and this only counts.
    cluster = replace(task.cluster, slots=np.where(task.cluster.slots > 0, experts, 0), memory_bytes=None)
    found = np.zeros((len(task.layouts), steps, layers, devices, slots), np.int64)
    for step in range(steps):
        for layer in range(layers):
            problem = Problem(cluster, Demand.of(task.demand[step, layer]))
            for strategy, layouts in enumerate(task.layouts):
                quota = evaluate(problem, layouts[step][layer], task.rule).split.quota[0]
                found[strategy, step, layer, :, : quota.shape[1]] = quota[:, :slots]
    return found
