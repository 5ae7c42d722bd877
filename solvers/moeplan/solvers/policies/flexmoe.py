"""FlexMoE: expand the hottest expert, shrink the coldest, migrate, while the modelled time falls (arXiv 2304.03946).

Placement changes one replica ("vExpert") at a time, from the layout in force. Nothing happens until the imbalance
reaches a trigger; then each round proposes to replace a replica of the expert with the lightest replicas by one of the
expert with the heaviest, and, when that no longer helps, to exchange a replica of the slowest device with one of the
fastest. A proposal stands if the slowest device gets faster.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.solvers.construct.fill import fill
from moeplan.solvers.construct.packing import swap
from moeplan.solvers.construct.repair import repair
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule

TRIGGER = 1.05
"""Largest load over mean load from which the layout is adjusted."""


@policy("flexmoe", source="FlexMoE, arXiv 2304.03946", split=SplitRule.EVEN)
def flexmoe(problem: Problem, parameters: SolveParameters) -> Layout:
    """From the current layout: expand, shrink and migrate single replicas while the slowest device gets faster."""
    start = problem.current or Layout.contiguous(problem.experts, problem.capacity)
    lost = not start.placed.any(axis=0).all()  # experts that were only on devices that failed
    if lost or (start.placed.sum(axis=1) > problem.capacity).any():
        unlimited = replace(problem, constraints=Constraints(), max_moves=None)
        kept = repair(unlimited, unlimited.limits, start.slots, stay=True)
        assert kept is not None  # without limits it always finds one
        start = Layout(kept, problem.experts)
    width = max(start.slots.shape[1], problem.cluster.max_slots)
    slots = np.full((problem.devices, width), EMPTY, np.int32)
    slots[:, : start.slots.shape[1]] = start.slots
    fill(slots, problem.mean_load, problem.capacity, NEVER)
    slots = slots[:, : problem.cluster.max_slots].copy()  # replicas come first; a failed device may have had more
    _adjust(slots, problem.mean_load, problem.cluster.speed, TRIGGER)
    return Layout(slots, problem.experts)


@kernel
def _adjust(slots: Int32, loads: Float64, speed: Float64, trigger: float) -> None:
    experts = len(loads)
    mean = loads.sum() / speed.sum()
    for _ in range(experts):
        replicas = np.zeros(experts, np.int32)
        for e in slots.reshape(-1):
            if e >= 0:
                replicas[e] += 1
        load = _even_loads(slots, loads, replicas)
        level = (load / speed).max()
        if level <= trigger * mean:
            return
        if not _expand(slots, loads, replicas, speed, level):
            break
    replicas = np.zeros(experts, np.int32)
    for e in slots.reshape(-1):
        if e >= 0:
            replicas[e] += 1
    swap(slots, loads / replicas, speed, experts, NEVER)


@kernel
def _even_loads(slots: Int32, loads: Float64, replicas: Int32) -> Float64:
    load = np.empty(len(slots))
    for d in range(len(slots)):
        load[d] = _even_load(slots[d], loads, replicas)
    return load


@kernel
def _even_load(held: Int32, loads: Float64, replicas: Int32) -> float:
    load = 0.0
    for e in held:
        if e >= 0:
            load += loads[e] / replicas[e]
    return load


@kernel
def _coldest(slots: Int32, share: Float64, replicas: Int32, hot: int) -> int:
    """The expert of the lightest replicas among those with several, on a device without `hot`; -1 if there is none."""
    cold = -1
    for d in range(len(slots)):
        if not (slots[d] == hot).any():
            for e in slots[d]:
                if e >= 0 and replicas[e] > 1 and (cold < 0 or share[e] < share[cold]):
                    cold = e
    return cold


@kernel
def _expand(slots: Int32, loads: Float64, replicas: Int32, speed: Float64, level: float) -> bool:
    """Replace a replica of the lightest expert that has one to spare by one of the heaviest, if that lowers `level`.

    Only devices without the heaviest expert count; of several the one where `level` falls most.
    """
    share = loads / replicas
    hot = int(share.argmax())
    cold = _coldest(slots, share, replicas, hot)
    if cold < 0:
        return False
    after = replicas.copy()
    after[hot] += 1
    after[cold] -= 1
    rest = _even_loads(slots, loads, after) / speed  # but for the device that changes
    first = rest.argmax()
    second = 0.0
    for d in range(len(slots)):
        if d != first:
            second = max(second, rest[d])
    best_d, best_c = -1, -1
    best = level
    for d in range(len(slots)):
        if (slots[d] == hot).any():
            continue
        for c in range(slots.shape[1]):
            if slots[d, c] != cold:
                continue
            slots[d, c] = hot
            own = _even_load(slots[d], loads, after) / speed[d]
            slots[d, c] = cold
            reached = max(own, second if d == first else rest[first])
            if reached < best:
                best, best_d, best_c = reached, d, c
    if best_d < 0:
        return False
    slots[best_d, best_c] = hot
    return True
