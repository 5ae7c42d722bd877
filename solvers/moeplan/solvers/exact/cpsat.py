"""The model on CP-SAT (OR-Tools): integer tokens, complete hint, deterministic with one thread and a work limit."""

from __future__ import annotations

from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from moeplan.solvers.exact.model import Answer, Effort, Model, Report, check
from moeplan.solvers.problem.arrays import Bool
from moeplan.solvers.problem.limits import Limits

__all__ = ["solve", "solver_for"]

SPEED_UNITS = 10_000
"""Unequal speeds become multiples of 1/10,000, rounded up so that the bound holds."""

LEVEL_UNITS = 100
"""With unequal speeds, z counts hundredths of a token per unit of speed."""

TAIL_UNITS = 10_000
"""Where the worst part of the scenarios counts, imbalance and weights are in ten thousandths; finer is far slower."""

WEIGHT_UNITS = 1_000_000
"""Scenario weights become integers of at most this size, rounded down so that the bound holds."""


def solve(model: Model, effort: Effort, report: Report) -> Answer:
    """Minimise by CP-SAT, from the incumbent; better placements are reported as they are found.

    Raises:
        OutOfTime: the deadline passed before the model was built.
    """
    cp = cp_model.CpModel()
    y = np.empty((model.devices, model.experts), object)
    x = np.empty((model.scenarios, model.devices, model.experts), object)
    level_units = 1 if model.equal_speeds else LEVEL_UNITS
    speed = np.ones(model.devices) if model.equal_speeds else model.speed / model.speed.max()
    scale = float(model.speed.max())  # z is in tokens on the fastest device
    cap = np.floor(model.cap * scale * level_units * (1 + 1e-9)).astype(np.int64) + 1
    z = [cp.new_int_var(int(model.floor[s] * scale * level_units), int(cap[s]), "") for s in range(model.scenarios)]
    for e in range(model.experts):
        check(effort)
        for d in range(model.devices):
            y[d, e] = cp.new_bool_var("")
            for s in range(model.scenarios):
                most = min(int(model.loads[s, e]), int(cap[s] / level_units * speed[d]) + 1)
                x[s, d, e] = cp.new_int_var(0, most, "")
                if most:
                    cp.add(x[s, d, e] <= most * y[d, e])
        cp.add(cp_model.LinearExpr.sum(list(y[:, e])) >= int(model.fewest[e]))
        for s in range(model.scenarios):
            cp.add(cp_model.LinearExpr.sum(list(x[s, :, e])) == int(model.loads[s, e]))
    for d in range(model.devices):
        check(effort)
        cp.add(cp_model.LinearExpr.sum(list(y[d])) <= int(model.capacity[d]))
        for s in range(model.scenarios):
            load = cp_model.LinearExpr.sum(list(x[s, d]))
            if model.equal_speeds:
                cp.add(load <= z[s])
            else:
                cp.add(load * (SPEED_UNITS * LEVEL_UNITS) <= int(np.ceil(speed[d] * SPEED_UNITS)) * z[s])
    if model.interchangeable:
        for d in range(model.devices - 1):
            cp.add(cp_model.LinearExpr.sum(list(x[0, d])) >= cp_model.LinearExpr.sum(list(x[0, d + 1])))
    if model.memory is not None:
        for d in range(model.devices):
            weights = cp_model.LinearExpr.sum(list(y[d])) * model.replica_bytes
            for s in range(model.scenarios):
                activations = cp_model.LinearExpr.sum(list(x[s, d])) * model.activation_bytes
                cp.add(weights + activations <= int(model.memory[d]))
    if model.limits is not None:
        _add_limits(cp, y, model.limits)
    unit = WEIGHT_UNITS / model.weights.max()
    if model.tail < 1:
        _minimise_tail(cp, z, model, scale * level_units)
    else:
        weight = np.floor(model.weights * unit).astype(np.int64) if model.scenarios > 1 else np.ones(1, np.int64)
        cp.minimize(cp_model.LinearExpr.weighted_sum(z, weight.tolist()))

    if model.hinted and model.incumbent is not None:
        start_y, start_x = model.start
        for (d, e), variable in np.ndenumerate(y):
            cp.add_hint(variable, bool(start_y[d, e]))
        for at, variable in np.ndenumerate(x):
            cp.add_hint(variable, int(start_x[at]))
        for s in range(model.scenarios):
            cp.add_hint(z[s], min(int(cap[s]), int(np.ceil(model.level[s] * scale * level_units))))

    class Found(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
        def on_solution_callback(self) -> None:
            report(np.array([[self.boolean_value(v) for v in row] for row in y], np.bool_))

    solver = solver_for(effort)
    status = solver.solve(cp, Found())
    # Back from integers: floors of weights and of z only lower the bound.
    objective = float(solver.best_objective_bound)
    if model.tail < 1:
        bound = objective / TAIL_UNITS**2 - 2 / TAIL_UNITS
        bound -= (level_units > 1) / (level_units * scale * float(model.floor.min()))
    elif model.scenarios == 1:
        bound = (objective - (level_units > 1)) / (level_units * scale) * float(model.weights[0])
    else:
        bound = (objective / unit - (level_units > 1) * float(model.weights.sum())) / (level_units * scale)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, max(0.0, bound), "infeasible" if status == cp_model.INFEASIBLE else "unknown")
    placed: Bool = np.array([[solver.boolean_value(v) for v in row] for row in y], np.bool_)
    return Answer(placed, max(0.0, bound), "optimal" if status == cp_model.OPTIMAL else "feasible")


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


def _add_limits(cp: cp_model.CpModel, y: Any, limits: Limits) -> None:
    total = cp_model.LinearExpr.sum
    for d, e in np.argwhere(~limits.may):
        cp.add(y[d, e] == 0)
    for d, e in np.argwhere(limits.must):
        cp.add(y[d, e] == 1)
    for e in np.flatnonzero(limits.most < len(limits.may)):
        cp.add(total(list(y[:, e])) <= int(limits.most[e]))
    for limit, pairs in limits.arrival_limits():
        if limit < pairs.sum():
            cp.add(total([y[d, e] for d, e in np.argwhere(pairs)]) <= limit)
    if limits.regions > 1:
        home = [[cp.new_bool_var("") for _ in range(limits.regions)] for _ in range(int(limits.unit.max()) + 1)]
        for choice in home:
            cp.add_exactly_one(choice)
        for (d, e), variable in np.ndenumerate(y):
            cp.add_implication(variable, home[limits.unit[e]][limits.region[d]])


def solver_for(effort: Effort) -> cp_model.CpSolver:
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
