"""The model on CP-SAT (OR-Tools): integer tokens, complete hint, deterministic with one thread and a work limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from moeplan.solvers.exact.model import Answer, Effort, Model, Report, check
from moeplan.solvers.problem.arrays import Bool, Int64
from moeplan.solvers.problem.limits import Limits

__all__ = ["add_limits", "minimise", "solve"]

SPEED_UNITS = 10_000
"""Unequal speeds become multiples of 1/10,000, rounded up so that the bound holds."""

LEVEL_UNITS = 100
"""With unequal speeds, z counts hundredths of a token per unit of speed."""

TAIL_UNITS = 10_000
"""Where the worst part of the scenarios counts, imbalance and weights are in ten thousandths; finer is far slower."""

WEIGHT_UNITS = 1_000_000
"""Scenario weights become integers of at most this size, rounded down so that the bound holds."""


@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """A model in whole numbers.

    Attributes:
        cp: Variables, constraints and objective.
        y: [devices, experts] of booleans.
        x: [scenarios, devices, experts] of whole tokens.
        z: The largest load of each scenario, in `unit` parts of a token on a device of speed 1.
        unit: See `z`.
        cap: int64[scenarios], upper end of each z.
        weight_unit: What a weight of 1 became.
    """

    cp: cp_model.CpModel
    y: npt.NDArray[Any]
    x: npt.NDArray[Any]
    z: list[Any]
    unit: float
    cap: Int64
    weight_unit: float


def solve(model: Model, effort: Effort, report: Report) -> Answer:
    """Minimise by CP-SAT, from the incumbent; better placements are reported as they are found.

    Raises:
        OutOfTime: the deadline passed before the model was built.
    """
    program = _build(model, effort)
    if model.hinted and model.incumbent is not None:
        _hint(program, model)

    def placement(values: Any) -> Bool:
        return np.array([[values.boolean_value(v) for v in row] for row in program.y], np.bool_)

    return minimise(program.cp, effort, report, placement, lambda objective: _bound(program, model, objective))


def minimise(
    cp: cp_model.CpModel,
    effort: Effort,
    report: Report,
    placement: Callable[[Any], Bool],
    bound: Callable[[float], float],
) -> Answer:
    """Run CP-SAT.

    Args:
        cp: What to minimise.
        effort: How hard to try.
        report: Takes the placements that are found on the way.
        placement: The placement, bool[devices, experts], of a solution, which gives variables their values.
        bound: The model's bound for one of CP-SAT's objective.
    """

    class Found(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
        def on_solution_callback(self) -> None:
            report(placement(self))

    solver = _solver(effort)
    status = solver.solve(cp, Found())
    proven = max(0.0, bound(float(solver.best_objective_bound)))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, proven, "infeasible" if status == cp_model.INFEASIBLE else "unknown")
    return Answer(placement(solver), proven, "optimal" if status == cp_model.OPTIMAL else "feasible")


def _sum(variables: Iterable[Any]) -> Any:
    return cp_model.LinearExpr.sum(list(variables))


def _build(model: Model, effort: Effort) -> _Program:
    cp = cp_model.CpModel()
    y = np.empty((model.devices, model.experts), object)
    x = np.empty((model.scenarios, model.devices, model.experts), object)
    level_units = 1 if model.equal_speeds else LEVEL_UNITS
    speed = np.ones(model.devices) if model.equal_speeds else model.speed / model.speed.max()
    unit = float(model.speed.max()) * level_units  # z is in tokens, or parts of one, on the fastest device
    cap = np.floor(model.cap * unit * (1 + 1e-9)).astype(np.int64) + 1
    z = [cp.new_int_var(int(model.floor[s] * unit), int(cap[s]), "") for s in range(model.scenarios)]
    for e in range(model.experts):
        check(effort)
        for d in range(model.devices):
            y[d, e] = cp.new_bool_var("")
            for s in range(model.scenarios):
                most = min(int(model.loads[s, e]), int(cap[s] / level_units * speed[d]) + 1)
                x[s, d, e] = cp.new_int_var(0, most, "")
                if most:
                    cp.add(x[s, d, e] <= most * y[d, e])
        cp.add(_sum(y[:, e]) >= int(model.fewest[e]))
        for s in range(model.scenarios):
            cp.add(_sum(x[s, :, e]) == int(model.loads[s, e]))
    for d in range(model.devices):
        check(effort)
        cp.add(_sum(y[d]) <= int(model.capacity[d]))
        for s in range(model.scenarios):
            if model.equal_speeds:
                cp.add(_sum(x[s, d]) <= z[s])
            else:
                cp.add(_sum(x[s, d]) * (SPEED_UNITS * LEVEL_UNITS) <= int(np.ceil(speed[d] * SPEED_UNITS)) * z[s])
    if model.interchangeable:
        for d in range(model.devices - 1):
            cp.add(_sum(x[0, d]) >= _sum(x[0, d + 1]))
    if model.memory is not None:
        for d in range(model.devices):
            for s in range(model.scenarios):
                use = model.replica_bytes * _sum(y[d]) + model.activation_bytes * _sum(x[s, d])
                cp.add(use <= int(model.memory[d]))
    if model.limits is not None:
        add_limits(cp, y, model.limits)
    weight_unit = WEIGHT_UNITS / float(model.weights.max())
    if model.tail < 1:
        _minimise_tail(cp, z, model, unit)
    else:
        weight = np.floor(model.weights * weight_unit).astype(np.int64) if model.scenarios > 1 else np.ones(1, np.int64)
        cp.minimize(cp_model.LinearExpr.weighted_sum(z, weight.tolist()))
    return _Program(cp, y, x, z, unit, cap, weight_unit)


def _hint(program: _Program, model: Model) -> None:
    """Tell the solver of the incumbent, every variable of it."""
    start_y, start_x = model.start
    for at, variable in np.ndenumerate(program.y):
        program.cp.add_hint(variable, bool(start_y[at]))
    for at, variable in np.ndenumerate(program.x):
        program.cp.add_hint(variable, int(start_x[at]))
    for s, variable in enumerate(program.z):
        program.cp.add_hint(variable, min(int(program.cap[s]), int(np.ceil(model.level[s] * program.unit))))


def _bound(program: _Program, model: Model, objective: float) -> float:
    """Back from whole numbers: floors of weights and of z only lower the bound."""
    floored = not model.equal_speeds  # z then counts parts of a token, and may end up to one below
    if model.tail < 1:
        bound = objective / TAIL_UNITS**2 - 2 / TAIL_UNITS
        return bound - floored / (program.unit * float(model.floor.min()))
    if model.scenarios == 1:
        return (objective - floored) / program.unit * float(model.weights[0])
    return (objective / program.weight_unit - floored * float(model.weights.sum())) / program.unit


def _minimise_tail(cp: cp_model.CpModel, z: list[Any], model: Model, units: float) -> None:
    """Minimise the mean of the worst part of the scenarios, with z in so many units for a load per speed of 1."""
    most = int(np.ceil((model.cap / model.floor).max() * TAIL_UNITS)) + 2
    weight = np.floor(model.weights * model.floor / model.tail * TAIL_UNITS).astype(np.int64)
    eta = cp.new_int_var(TAIL_UNITS, most, "")
    excess = [cp.new_int_var(0, most, "") for _ in z]
    for s, level in enumerate(z):
        # excess + eta >= z / floor, with both sides large enough for whole numbers that only lower the imbalance
        size = int(np.ceil(TAIL_UNITS / (model.floor[s] * units)))
        floor = int(np.ceil(model.floor[s] * units * size))
        cp.add(floor * (excess[s] + eta) >= size * TAIL_UNITS * level)
    cp.minimize(TAIL_UNITS * eta + cp_model.LinearExpr.weighted_sum(excess, weight.tolist()))


def add_limits(cp: cp_model.CpModel, y: Any, limits: Limits) -> None:
    """Add the limits on replicas, for y[devices, experts] of booleans, or of sums that are 0 or 1."""
    for d, e in np.argwhere(~limits.may):
        cp.add(y[d, e] == 0)
    for d, e in np.argwhere(limits.must):
        cp.add(y[d, e] == 1)
    for e in np.flatnonzero(limits.most < len(limits.may)):
        cp.add(_sum(y[:, e]) <= int(limits.most[e]))
    for limit, pairs in limits.arrival_limits():
        if limit < pairs.sum():
            cp.add(_sum(y[d, e] for d, e in np.argwhere(pairs)) <= limit)
    if limits.regions > 1:
        home = [[cp.new_bool_var("") for _ in range(limits.regions)] for _ in range(int(limits.unit.max()) + 1)]
        for choice in home:
            cp.add_exactly_one(choice)
        for (d, e), variable in np.ndenumerate(y):
            cp.add(variable <= home[limits.unit[e]][limits.region[d]])


def _solver(effort: Effort) -> cp_model.CpSolver:
    """A CP-SAT solver with the limits of `effort`."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = effort.threads
    solver.parameters.interleave_search = effort.threads > 1 and effort.deadline is None
    solver.parameters.random_seed = effort.seed % 2**31
    solver.parameters.relative_gap_limit = effort.gap
    if effort.work < np.inf:
        solver.parameters.max_deterministic_time = effort.work
    if effort.deadline is not None:
        solver.parameters.max_time_in_seconds = effort.seconds
    return solver
