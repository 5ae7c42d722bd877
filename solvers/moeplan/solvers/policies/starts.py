"""Layouts that `hybrid` begins its search with: constructions from the mean load, repaired where limits ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np

from moeplan.solvers.construct import sliding_window as window
from moeplan.solvers.construct.fill import fill
from moeplan.solvers.construct.packing import pack, swap
from moeplan.solvers.construct.partition import grouping
from moeplan.solvers.construct.regions import narrowings
from moeplan.solvers.construct.repair import repair, table
from moeplan.solvers.construct.replica_counts import adams_replicas
from moeplan.solvers.construct.tiers import tiered
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.base import base
from moeplan.solvers.policies.eplb import eplb
from moeplan.solvers.policies.flexmoe import flexmoe
from moeplan.solvers.policies.laer import laer
from moeplan.solvers.policies.static import static
from moeplan.solvers.policies.symi import symi
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.clock import NEVER, end_of, time_now
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import EMPTY, placed_in
from moeplan.solvers.problem.limits import Limits, broken
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.judging import rule_of, score_of

__all__ = [
    "BLOCK_STARTS",
    "constructions",
    "current_layouts",
    "of_block",
    "of_regions",
    "repairs",
    "widened",
    "window_applies",
    "window_layout",
]

TIERS = (2, 4, 8)
"""Tiers of experts between which spare slots are shifted, for an even split."""

MOST_FOR_BASE = 1_024
"""Slots up to which BASE's layout is tried: its linear assignment takes their cube, minutes for ten thousand."""

BASE_S, BASE_FROM_SOURCES_S = 1.2e-9, 6e-9
"""Seconds that it takes for each slot, device and expert, and where it looks at where tokens come from."""

PUBLISHED_TAKE = 2
"""Time that the slowest published policies take over that of longest-first packing with swaps; but for `base`."""

ROUNDS = 1_000
"""Most exchanges of a construction's own descent, or the number of experts where there are more."""

BLOCK_STARTS = 4
"""Constructions of each, the first ones."""


def constructions(problem: Problem, parameters: SolveParameters, deadline: float | None) -> Iterator[Int32]:
    """int32[devices, width] layouts from the mean load, the one most likely to be perfect first.

    There is at least one, and none more that would not be whole by the deadline, a time on `time.perf_counter`.
    """
    loads, capacity, speed = problem.mean_load, problem.capacity, problem.cluster.speed
    end = end_of(deadline)
    first = False
    if window_applies(problem):
        yield window_layout(problem, end)
    elif (capacity == capacity[0]).all() and (speed == speed[0]).all():
        slots = grouping(loads, problem.devices, int(capacity[0]), ROUNDS, end)
        fill(slots, loads, capacity, end)
        yield widened(slots, problem)
    else:
        first = True
    start = time_now()
    replicas = adams_replicas(loads, int(capacity.sum()), problem.devices)
    slots = pack(loads, replicas, capacity, speed, NEVER if first else end)
    if time_now() >= end and not first:
        return
    swap(slots, loads / replicas, speed, max(ROUNDS, problem.experts), end)
    fill(slots, loads, capacity, end)
    took = time_now() - start
    yield widened(slots, problem)
    for published in (eplb, flexmoe, laer, symi, static, base):
        if published is base and (capacity.sum() > MOST_FOR_BASE or time_now() + _base_s(problem) >= end):
            continue
        if time_now() + PUBLISHED_TAKE * took >= end:
            return
        try:
            slots = widened(published(problem, parameters).slots.copy(), problem)
        except ProblemError:  # EPLB's groups may not fit its nodes
            continue
        if rule_of(problem) is not SplitRule.OPTIMAL:
            yield slots.copy()  # a further replica may hurt where its tokens are not divided for the best
        fill(slots, loads, capacity, end)
        yield slots
    if rule_of(problem) is SplitRule.EVEN:
        for tiers in TIERS:
            slots = tiered(loads, capacity, speed, min(tiers, problem.experts), end)
            replicas = np.maximum(np.bincount(slots[slots != EMPTY], minlength=problem.experts), 1)
            swap(slots, loads / replicas, speed, ROUNDS, end)
            yield widened(slots, problem)


def _base_s(problem: Problem) -> float:
    """Seconds that BASE's layout takes: an assignment of a few experts a device for each of its slots."""
    each = BASE_S if problem.demand.sources == 1 else BASE_FROM_SOURCES_S
    return each * int(problem.capacity.sum()) * problem.devices * problem.experts


def current_layouts(problem: Problem) -> Iterator[Int32]:
    """The current layout, int32[devices, width], as it is, and with its empty slots put to use."""
    if problem.current is None:
        return
    slots = table(problem, problem.current.placed)
    yield slots
    filled = slots.copy()
    fill(filled, problem.mean_load, problem.capacity, NEVER)
    yield filled


def window_applies(problem: Problem) -> bool:
    """True if the sliding window lays out the mean load."""
    return window.applies(problem.experts, problem.capacity, problem.cluster.speed)


def window_layout(problem: Problem, end: float) -> Int32:
    """The layout of the sliding window for the mean load, with its spare slots put to use."""
    experts, width = np.arange(problem.experts), int(problem.capacity[0])
    slots = window.sliding_window(problem.mean_load, experts, problem.devices, width)
    fill(slots, problem.mean_load, problem.capacity, end)
    return widened(slots, problem)


def widened(slots: Int32, problem: Problem) -> Int32:
    """The same layout with one column per slot of the widest device."""
    missing = problem.cluster.max_slots - slots.shape[1]
    return np.pad(slots, ((0, 0), (0, missing)), constant_values=EMPTY) if missing else slots


def of_block(problem: Problem, devices: Int64, experts: Int64) -> Problem:
    """The problem of some devices and experts, apart from all others."""
    cluster = Cluster(problem.capacity[devices], np.zeros(len(devices), np.int64), problem.cluster.speed[devices])
    demand = Demand.of(problem.loads[:, np.newaxis, experts], problem.demand.weights)
    return Problem(cluster, demand, tail=problem.tail, split_rule=problem.split_rule)


def of_regions(problem: Problem, region: Int32, parameters: SolveParameters, deadline: float | None) -> Int32:
    """The best construction of every region alone, int32[devices, width]; `region` is int32[units], that of each."""
    slots = np.full((problem.devices, problem.cluster.max_slots), EMPTY, np.int32)
    for r in range(problem.limits.regions):
        devices = np.flatnonzero((problem.limits.region == r) & (problem.capacity > 0))
        experts = np.flatnonzero(region[problem.limits.unit] == r)
        if len(experts):
            part = of_block(problem, devices, experts)
            found = list(islice(constructions(part, parameters, deadline), BLOCK_STARTS))
            best = found[0] if len(found) == 1 else min(found, key=lambda slots: score_of(part, slots))
            slots[devices, : best.shape[1]] = np.where(best == EMPTY, EMPTY, experts[best])
    return slots


def repairs(
    problem: Problem, wanted: Int32, deadline: Callable[[], float | None], *, near: bool = False
) -> Iterator[tuple[Int32, Limits]]:
    """A layout, int32[devices, width], repaired under each narrowing of the limits that allows it, or the nearest one.

    A repair uses every slot, so where a further replica may hurt, the layout comes first as it is, if it may.
    """
    placed = placed_in(wanted, problem.experts)
    valid = bool(placed.any(axis=0).all() and (placed.sum(axis=1) <= problem.capacity).all())
    if rule_of(problem) is not SplitRule.OPTIMAL and valid and broken(problem.limits, placed) is None:
        yield wanted, next(narrowings(problem, placed, deadline))
    in_force = problem.current is not None and wanted is problem.current.slots
    kept = problem.limits.moves_limited and not in_force  # units stay where they are, or nearly
    narrowed = chain(
        narrowings(problem, problem.limits.held, deadline) if kept and problem.limits.regions > 1 else (),
        islice(narrowings(problem, placed, deadline), 1 if near and not in_force else None),
    )
    for limits in narrowed:
        stay = problem.current is not None and (in_force or limits.moves_limited)
        slots = repair(problem, limits, wanted, stay=stay)
        if slots is not None:
            yield slots, limits
