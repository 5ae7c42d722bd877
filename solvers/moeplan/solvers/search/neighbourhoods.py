"""Large-neighbourhood search: free a few devices, and place again exactly what they compute.

The devices are drawn around the min cut of a scenario that is not balanced: some of its tight set, which no split
relieves, and some outside, where the load can go. What the freed devices compute of each expert is kept, so the
neighbourhood is a placement problem of its own, with 2 to 6 devices; it is solved by the sliding window where that is
perfect, and by an exact model otherwise. The whole layout is then split anew, which is what decides.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.construct import sliding_window as window
from moeplan.solvers.construct.fill import fill
from moeplan.solvers.exact.model import Effort, Model
from moeplan.solvers.exact.run import run
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.layout import EMPTY, placed_in
from moeplan.solvers.problem.limits import Limits
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.split.memory import best_quota

__all__ = ["neighbour"]

FEWEST, MOST = 2, 6
"""Devices that are freed."""

VARIABLES = 1_200
"""Quotas of a neighbourhood's model, over all scenarios, beyond which fewer devices are freed."""

WORK = 0.05
"""Deterministic seconds that a solver may work on one neighbourhood."""


def neighbour(
    problem: Problem, limits: Limits, slots: Int32, rng: np.random.Generator, solver: str, deadline: float | None
) -> Int32 | None:
    """A layout that differs from `slots` on a few devices, and balances them better or as well.

    Args:
        problem: The problem.
        limits: Its limits, narrowed to one region per unit.
        slots: int32[devices, width], a valid layout.
        rng: Draws the devices.
        solver: See `exact.run`.
        deadline: Time on `time.perf_counter` to return by; None for none.

    Returns:
        int32[devices, width]; None if the draw offers nothing.
    """
    quota, tight, _ = best_quota(problem, slots)
    devices = _draw(problem, quota, tight, rng)
    if devices is None:
        return None
    freed = slots[devices]
    here = np.unique(freed[freed != EMPTY])
    inside = np.zeros((problem.demand.scenarios, problem.experts), np.int64)
    row, column = np.nonzero(freed != EMPTY)
    for s in range(len(inside)):
        np.add.at(inside[s], freed[row, column], quota[s][devices[row], column])
    outside = np.ones(problem.devices, np.bool_)
    outside[devices] = False
    elsewhere = np.unique(slots[outside])
    kept = inside[:, here].any(axis=0) | ~np.isin(here, elsewhere) | limits.must[devices][:, here].any(axis=0)
    needed = here[kept]
    answer = _place(problem, limits, slots, devices, needed, inside[:, needed], solver, deadline)
    if answer is None:
        return None
    changed = slots.copy()
    changed[devices] = EMPTY
    for d, experts in zip(devices, answer, strict=True):
        changed[d, : len(experts)] = needed[experts]
    if limits.free and not limits.moves_limited:
        fill(changed, problem.mean_load, problem.capacity, NEVER)
    return changed


def _draw(problem: Problem, quota: Int64, tight: Bool, rng: np.random.Generator) -> Int64 | None:
    """int64[few]: devices to free, some of them in a tight set; None where every scenario is balanced."""
    level = quota.sum(axis=2) / problem.cluster.speed
    open_ = np.flatnonzero(~tight.all(axis=1))
    if not len(open_):
        return None
    s = int(rng.choice(open_))
    per_device = max(1, problem.demand.scenarios * problem.cluster.max_slots)
    most = MOST
    while most > FEWEST and per_device * most * most > VARIABLES:
        most -= 1
    size = int(rng.integers(FEWEST, most + 1))
    inside, others = np.flatnonzero(tight[s]), np.flatnonzero(~tight[s])
    part = min(len(inside), int(rng.integers(1, size)))
    chosen = rng.choice(inside, part, replace=False)
    lightest = others[np.argsort(level[s, others], kind="stable")]
    # Half of the time whatever has most room, otherwise anything: sizes of groups must change as well.
    pool = lightest[: 4 * size] if rng.integers(2) else others
    return np.sort(np.concatenate([chosen, rng.choice(pool, min(size - part, len(pool)), replace=False)]))


def _place(
    problem: Problem,
    limits: Limits,
    slots: Int32,
    devices: Int64,
    needed: Int32,
    loads: Int64,
    solver: str,
    deadline: float | None,
) -> list[Int64] | None:
    """Experts of each freed device, as indices into `needed`."""
    capacity, speed = problem.capacity[devices], problem.cluster.speed[devices]
    scenarios = len(loads)
    limited = not limits.free or limits.moves_limited
    if scenarios == 1 and not limited and window.applies(len(needed), capacity, speed):
        placed = window.sliding_window(
            loads[0].astype(np.float64), np.arange(len(needed)), len(devices), int(capacity[0])
        )
        return [row[row != EMPTY].astype(np.int64) for row in placed]
    index = np.full(problem.experts + 1, EMPTY, np.int32)
    index[needed] = np.arange(len(needed))
    start = index[slots[devices]]  # replicas that are not needed here become empty slots
    total = problem.loads.sum(axis=1)
    weights: Float64 = np.divide(problem.demand.weights, total, out=np.zeros(scenarios), where=total > 0)
    part = limits.part(devices, needed, placed_in(slots, problem.experts)) if limited else None
    expert, memory = problem.expert, problem.cluster.memory_bytes
    model = Model(
        loads,
        np.maximum(weights, 1e-12),
        speed,
        capacity,
        start,
        part,
        memory[devices] if memory is not None and expert.activation_bytes else None,
        expert.weight_bytes + expert.state_bytes,
        expert.activation_bytes,
    )
    # Work alone decides while the deadline is far, so that a busy machine finds the same plan.
    answer = run(model, solver, Effort(deadline, WORK))
    if answer.placed is None:
        return None
    return [np.flatnonzero(row) for row in answer.placed]
