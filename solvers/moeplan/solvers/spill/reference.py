"""The exact spill of one layer by CP-SAT, with its bound: what tests and reports measure the fast planner against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Int64, integers
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.spill.options import SpillOptions
from moeplan.solvers.spill.spill_plan import SpillPlan

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["ExactSpill", "solve_exactly"]

_SPEED_UNITS = 10**4
"""Speeds and transfer times become multiples of 1/10,000 in the integer model."""


@dataclass(frozen=True, slots=True, eq=False)
class ExactSpill:
    """An answer of CP-SAT.

    Attributes:
        share: int64[experts, devices], tokens of each expert that each device computes; None if no plan was found.
        makespan: Largest device time of the answer, in tokens at speed 1; infinity if there is none.
        bound: Proven lower bound of the makespan.
        optimal: Whether the answer is proven optimal.
        infeasible: Whether no plan exists, because of memory caps.
    """

    share: Int64 | None
    makespan: float
    bound: float
    optimal: bool
    infeasible: bool


def solve_exactly(
    counts: npt.ArrayLike,
    options: SpillOptions,
    *,
    time_limit_s: float = 20.0,
    workers: int = 1,
    hint: SpillPlan | None = None,
) -> ExactSpill:
    """Minimise the makespan over replicas and integer quotas.

    The model: y[e, d] in {0, 1} for a replica of e on d inside e's domain, x[e, d] tokens with
    ``min_tokens * y <= x <= tokens[e] * y``, at most `spare` replicas on d, the memory cap, and the device time
    ``load / speed + transfer_tokens * replicas``; the load adds up every x rounded up to a multiple of `tile_rows`.
    `tolerance` and `threshold` are ignored.

    Args:
        counts: int[experts], or int[sources, experts].
        options: The same options as the fast planner's. Speeds and transfer times are rounded to 1/10,000.
        time_limit_s: Wall-clock limit.
        workers: Threads; one gives the same answer on every run that ends before the limit.
        hint: A plan to start from; by default every token starts at home.

    Raises:
        ProblemError: `counts` has not one value per expert or is negative.
    """
    from ortools.sat.python import cp_model  # slow to import, and ranks, which never solve exactly, may lack it

    table = np.atleast_2d(np.asarray(counts))
    tokens = integers("counts", table.sum(axis=0), ndim=1, low=0)
    if len(tokens) != options.experts:
        raise ProblemError("counts", f"{len(tokens)} experts", f"the options have {options.experts}")
    model = cp_model.CpModel()
    total = int(tokens.sum())
    x, y = _replica_variables(model, tokens, options)

    slowest = float(options.speed.min())
    tile = options.tile_rows
    rows = total + options.experts * (tile - 1)
    horizon = int((rows / slowest + options.transfer_tokens * (int(options.spare.max()) + 1) + 1) * _SPEED_UNITS)
    makespan = model.new_int_var(0, horizon, "makespan")
    for d in range(options.devices):
        replicas = [var for (_, device), var in y.items() if device == d]
        load = sum(_rows(model, var, int(tokens[e]), tile) for (e, device), var in x.items() if device == d)
        received = sum(replicas)
        model.add(received <= int(options.spare[d]))
        model.add(load + options.replica_tokens * received <= int(options.token_cap[d]))
        per_token = round(_SPEED_UNITS / float(options.speed[d]))
        model.add(per_token * load + round(_SPEED_UNITS * options.transfer_tokens) * received <= makespan)
    if np.all(options.speed == 1.0) and total:
        model.add(makespan >= -(-total // options.devices) * _SPEED_UNITS)
    model.minimize(makespan)
    _add_hint(model, tokens, hint, x, y, options)

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    bound = max(solver.best_objective_bound / _SPEED_UNITS, total / float(options.speed.sum()))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ExactSpill(None, float("inf"), bound, False, status == cp_model.INFEASIBLE)
    share = np.zeros((options.experts, options.devices), np.int64)
    for (e, d), var in x.items():
        share[e, d] = solver.value(var)
    return ExactSpill(share, solver.objective_value / _SPEED_UNITS, bound, status == cp_model.OPTIMAL, False)


def _rows(model: cp_model.CpModel, tokens: cp_model.IntVar, most: int, tile: int) -> cp_model.LinearExprT:
    """Tokens, of which there are `most`, rounded up to whole tiles."""
    if tile == 1:
        return tokens
    tiles = model.new_int_var(0, -(-most // tile), "")
    model.add(tile * tiles >= tokens)
    return tile * tiles


_Variables: TypeAlias = "dict[tuple[int, int], cp_model.IntVar]"


def _replica_variables(model: cp_model.CpModel, tokens: Int64, options: SpillOptions) -> tuple[_Variables, _Variables]:
    x: _Variables = {}
    y: _Variables = {}
    for e in range(options.experts):
        home, most = int(options.home[e]), int(tokens[e])
        x[e, home] = model.new_int_var(0, most, "")
        for d in range(options.devices):
            allowed = options.domain[d] == options.domain[home] and options.spare[d] > 0
            if d == home or not allowed or most < options.min_tokens:
                continue
            y[e, d] = model.new_bool_var("")
            x[e, d] = model.new_int_var(0, most, "")
            model.add(x[e, d] <= most * y[e, d])
            model.add(x[e, d] >= options.min_tokens * y[e, d])
        model.add(sum(x[e, d] for d in range(options.devices) if (e, d) in x) == most)
    return x, y


def _add_hint(
    model: cp_model.CpModel, tokens: Int64, plan: SpillPlan | None, x: _Variables, y: _Variables, options: SpillOptions
) -> None:
    at_home = tokens if plan is None else plan.home_quota
    quota = {(e, int(options.home[e])): int(at_home[e]) for e in range(options.experts)}
    if plan is not None:
        pairs = zip(plan.expert.tolist(), plan.device.tolist(), strict=True)
        quota |= dict(zip(pairs, plan.quota.tolist(), strict=True))
    for key, var in x.items():
        model.add_hint(var, quota.get(key, 0))
    for key, var in y.items():
        model.add_hint(var, int(quota.get(key, 0) > 0))
