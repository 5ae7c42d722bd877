"""moeplan's own policy: bounds, constructions, and local search over scenarios, with few moves.

1. Bounds (see `bounds`) say when to stop.
2. Constructions from the mean load: the sliding window where spare slots make perfect balance attainable, groups of
   devices where they do not; longest-first packing with swaps; the published policies, so that none is ever better; and
   the current layout. Each is scored by what counts: the best split in every scenario, averaged. A layout that is
   perfect for the mean is fragile.
3. Local search (see `search`) from the best of them.
4. Interchangeable devices are renamed so that the fewest replicas move. A limit of moves holds throughout: a
   construction that exceeds it is dropped, and the search never steps over it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from moeplan.solvers import plan as plans
from moeplan.solvers import sliding_window as window
from moeplan.solvers.adams import adams_replicas
from moeplan.solvers.arrays import Int32
from moeplan.solvers.errors import ProblemError
from moeplan.solvers.fill import fill
from moeplan.solvers.flow import optimal_quota
from moeplan.solvers.grouping import grouping
from moeplan.solvers.layout import EMPTY, Layout
from moeplan.solvers.moves import keep_slots, relabel
from moeplan.solvers.packing import pack, swap
from moeplan.solvers.parameters import SolveParameters
from moeplan.solvers.policies.eplb import eplb
from moeplan.solvers.policies.flexmoe import flexmoe
from moeplan.solvers.policies.laer import laer
from moeplan.solvers.policies.static import static
from moeplan.solvers.policies.symi import symi
from moeplan.solvers.policy import policy
from moeplan.solvers.problem import Problem
from moeplan.solvers.risk import risk
from moeplan.solvers.search import improve

ROUNDS = 1_000
"""Most exchanges of a construction's own descent."""

PRICED = 0.8
"""Part of a search's work during which a move has a price: at first its part of the distance to the target, so that the
most useful moves come first, then less and less."""

WORK_PER_BURST = 2_000_000
"""Scenario x slot visits between two looks at the clock: a few milliseconds."""


@policy("hybrid", source="moeplan", split="optimal", honours=("max_moves",))
def hybrid(problem: Problem, parameters: SolveParameters) -> Layout:
    """Bounds, constructions, then local search over scenarios guided by the min cut, with few moves; the default."""
    start = time.perf_counter()
    if problem.demand.scenarios == 1 and problem.current is None and _window_applies(problem):
        return Layout(_window(problem), problem.experts)  # perfect, by the theorem
    target = risk(plans.bound(problem), problem.demand.weights, problem.tail) * (1 + parameters.target_gap)
    best, best_score = _start(problem), np.inf
    if best is not None:
        best_score = _score(problem, best)
    constructions = _constructions(problem, parameters)
    while best_score > target and (slots := next(constructions, None)) is not None:
        if problem.current is not None:
            slots = relabel(problem.current, slots, problem.capacity, problem.cluster)
            if problem.max_moves is not None and _arrivals(problem.current, slots) > problem.max_moves:
                continue
        score = _score(problem, slots)
        if score < best_score:
            best, best_score = slots, score
    assert best is not None
    if best_score > target:
        best = _search(problem, best, target, parameters, start)
    if problem.current is not None:
        keep_slots(problem.current.slots, best)
    return Layout(best, problem.experts)


def _start(problem: Problem) -> Int32 | None:
    """The current layout with its empty slots put to use, within the limit of moves; None if there is none."""
    if problem.current is None:
        return None
    slots = np.full((problem.devices, max(1, problem.cluster.max_slots)), EMPTY, np.int32)
    used = min(slots.shape[1], problem.current.slots.shape[1])
    slots[:, :used] = problem.current.slots[:, :used]
    filled = slots.copy()
    fill(filled, problem.mean_load, problem.capacity)
    within = problem.max_moves is None or _arrivals(problem.current, filled) <= problem.max_moves
    return filled if within else slots


def _constructions(problem: Problem, parameters: SolveParameters) -> Iterator[Int32]:
    """int32[devices, width] layouts from the mean load, the one most likely to be perfect first."""
    loads, capacity, speed = problem.mean_load, problem.capacity, problem.cluster.speed
    if _window_applies(problem):
        yield _window(problem)
    elif (capacity == capacity[0]).all() and (speed == speed[0]).all():
        slots = grouping(loads, problem.devices, int(capacity[0]), ROUNDS)
        fill(slots, loads, capacity)
        yield _widen(slots, problem)
    replicas = adams_replicas(loads, int(capacity.sum()), problem.devices)
    slots = pack(loads, replicas, capacity, speed)
    swap(slots, loads / replicas, speed, ROUNDS)
    fill(slots, loads, capacity)
    yield _widen(slots, problem)
    for published in (eplb, laer, flexmoe, symi, static):
        try:
            slots = _widen(published(problem, parameters).slots.copy(), problem)
        except ProblemError:  # EPLB's groups may not fit its nodes
            continue
        fill(slots, loads, capacity)
        yield slots


def _window_applies(problem: Problem) -> bool:
    return window.applies(problem.experts, problem.capacity, problem.cluster.speed)


def _window(problem: Problem) -> Int32:
    """The layout of the sliding window for the mean load, with its spare slots put to use."""
    experts, width = np.arange(problem.experts), int(problem.capacity[0])
    slots = window.sliding_window(problem.mean_load, experts, problem.devices, width)
    fill(slots, problem.mean_load, problem.capacity)
    return _widen(slots, problem)


def _widen(slots: Int32, problem: Problem) -> Int32:
    """The same layout with one column per slot of the widest device."""
    missing = problem.cluster.max_slots - slots.shape[1]
    return np.pad(slots, ((0, 0), (0, missing)), constant_values=EMPTY) if missing else slots


def _score(problem: Problem, slots: Int32) -> float:
    """Imbalance of a layout under the optimal split: what the search minimises."""
    quota, _ = optimal_quota(slots, problem.loads, problem.cluster.speed)
    level = (quota.sum(axis=2) / problem.cluster.speed).max(axis=1)
    return risk(plans.relative(problem, level), problem.demand.weights, problem.tail)


def _arrivals(current: Layout, slots: Int32) -> int:
    placed = Layout(slots, current.experts).placed
    return int((placed & ~current.placed).sum())


def _search(problem: Problem, slots: Int32, target: float, parameters: SolveParameters, start: float) -> Int32:
    best = slots.copy()
    current = problem.current
    held = np.zeros((problem.devices, problem.experts), np.bool_) if current is None else current.placed
    limit = problem.max_moves if problem.max_moves is not None else best.size
    burst = max(8, WORK_PER_BURST // (problem.demand.scenarios * best.size * 16))
    first_price = max(0.0, _score(problem, slots) - target) / limit if problem.max_moves else 0.0
    for first in range(0, parameters.work_limit, burst):
        if parameters.deadline_s is not None and time.perf_counter() - start >= parameters.deadline_s:
            break
        score = improve(
            best,
            problem.loads,
            problem.demand.weights,
            problem.tail,
            problem.cluster.speed,
            held,
            limit,
            first_price * max(0.0, 1 - first / (PRICED * parameters.work_limit)),
            min(burst, parameters.work_limit - first),
            parameters.seed * 1_000_003 + first,
            target,
        )
        if score <= target:
            break
    return best
