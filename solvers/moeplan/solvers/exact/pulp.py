"""The model on PuLP, for any solver that PuLP finds: HiGHS first, CBC where PuLP brings it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pulp

from moeplan.solvers.exact.highs import run_highs, silence
from moeplan.solvers.exact.model import Answer, Effort, Model, Report, check
from moeplan.solvers.problem.arrays import Bool
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.limits import Limits

__all__ = ["require", "solve"]

NAMES = {"highs": "HiGHS", "cbc": "PULP_CBC_CMD"}
"""Short names; other solvers go by PuLP's own."""

NODES_PER_WORK = 1_000
"""Branch-and-bound nodes for a unit of work, where the clock is no limit."""


def solve(model: Model, effort: Effort, report: Report, name: str = "highs") -> Answer:
    """Minimise by a solver that PuLP knows, from the incumbent where the solver takes one.

    Raises:
        OutOfTime: the deadline passed before the model was built.
    """
    program = pulp.LpProblem("placement", pulp.LpMinimize)
    # HiGHS 1.16 loses part of a start's objective in its presolve where a tail counts, and calls it optimal.
    hinted = model.hinted and model.incumbent is not None and model.tail >= 1
    start_y, start_x = model.start if hinted else (None, None)
    y = np.empty((model.devices, model.experts), object)
    x = np.empty((model.scenarios, model.devices, model.experts), object)
    z = [program.add_variable(f"z_{s}", float(model.floor[s]), float(model.cap[s])) for s in range(model.scenarios)]
    if model.tail >= 1:
        program += pulp.lpSum(float(w) * z[s] for s, w in enumerate(model.weights))
    else:
        _add_tail(program, z, model)
    for e in range(model.experts):
        check(effort)
        for d in range(model.devices):
            y[d, e] = program.add_variable(f"y_{d}_{e}", cat=pulp.LpBinary)
            if start_y is not None:
                y[d, e].setInitialValue(int(start_y[d, e]))
            for s in range(model.scenarios):
                most = min(float(model.loads[s, e]), float(model.cap[s] * model.speed[d]))
                x[s, d, e] = program.add_variable(f"x_{s}_{d}_{e}", 0, most)
                if start_x is not None:
                    x[s, d, e].setInitialValue(min(most, float(start_x[s, d, e])))
                program += x[s, d, e] <= most * y[d, e]
        program += pulp.lpSum(y[:, e]) >= int(model.fewest[e])
        for s in range(model.scenarios):
            program += pulp.lpSum(x[s, :, e]) == int(model.loads[s, e])
    for d in range(model.devices):
        check(effort)
        program += pulp.lpSum(y[d]) <= int(model.capacity[d])
        for s in range(model.scenarios):
            program += pulp.lpSum(x[s, d]) <= float(model.speed[d]) * z[s]
    if model.interchangeable:
        for d in range(model.devices - 1):
            program += pulp.lpSum(x[0, d]) >= pulp.lpSum(x[0, d + 1])
    if model.memory is not None:
        for d in range(model.devices):
            for s in range(model.scenarios):
                use = model.replica_bytes * pulp.lpSum(y[d]) + model.activation_bytes * pulp.lpSum(x[s, d])
                program += use <= int(model.memory[d])
    if model.limits is not None:
        _add_limits(program, y, model.limits)
    if hinted:
        for s in range(model.scenarios):
            z[s].setInitialValue(min(float(model.cap[s]), float(model.level[s])))
    solver = _solver(name, effort, hinted)
    program.solve(solver)
    bound = 0.0
    if isinstance(solver, pulp.HiGHS):
        bound = max(0.0, float(program.solverModel.getInfo().mip_dual_bound))
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) or y[0, 0].value() is None:
        status = "infeasible" if program.status == pulp.LpStatusInfeasible else "unknown"
        return Answer(None, bound if np.isfinite(bound) else 0.0, status)
    placed: Bool = np.array([[v.value() > 0.5 for v in row] for row in y], np.bool_)
    report(placed)
    optimal = program.sol_status == pulp.LpSolutionOptimal
    return Answer(placed, bound if np.isfinite(bound) else 0.0, "optimal" if optimal else "feasible")


def _add_tail(program: Any, z: list[Any], model: Model) -> None:
    share = model.weights * model.floor / model.tail
    eta = program.add_variable("eta", 1)
    excess = [program.add_variable(f"v_{s}", 0) for s in range(model.scenarios)]
    program += eta + pulp.lpSum(float(w) * excess[s] for s, w in enumerate(share))
    for s in range(model.scenarios):
        program += excess[s] >= (1 / float(model.floor[s])) * z[s] - eta


def _add_limits(program: Any, y: Any, limits: Limits) -> None:
    for d, e in np.argwhere(~limits.may):
        program += y[d, e] == 0
    for d, e in np.argwhere(limits.must):
        program += y[d, e] == 1
    for e in np.flatnonzero(limits.most < len(limits.may)):
        program += pulp.lpSum(y[:, e]) <= int(limits.most[e])
    for limit, pairs in limits.arrival_limits():
        if limit < pairs.sum():
            program += pulp.lpSum(y[d, e] for d, e in np.argwhere(pairs)) <= limit
    if limits.regions > 1:
        for u in range(int(limits.unit.max()) + 1):
            home = [program.add_variable(f"g_{u}_{r}", cat=pulp.LpBinary) for r in range(limits.regions)]
            program += pulp.lpSum(home) == 1
            for e in np.flatnonzero(limits.unit == u):
                for d in range(len(limits.may)):
                    program += y[d, e] <= home[limits.region[d]]


class _HiGHS(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS, which may stop at a limit of nodes."""

    def callSolver(self, lp: Any) -> None:  # noqa: N802 - PuLP's name
        run_highs(lp.solverModel)

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802 - PuLP's name
        # PuLP's own knows no limit of nodes among the reasons to stop.
        import highspy

        found = lp.solverModel
        if found.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound
        for variable, value in zip(lp.variables(), list(found.getSolution().col_value), strict=True):
            variable.varValue = value
        optimal = found.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return pulp.LpStatusOptimal, pulp.LpSolutionOptimal if optimal else pulp.LpSolutionIntegerFeasible


class _WarmHiGHS(_HiGHS):
    """HiGHS, started from the variables' initial values, which PuLP leaves out."""

    def callSolver(self, lp: Any) -> None:  # noqa: N802 - PuLP's name
        import highspy

        start = highspy.HighsSolution()
        start.col_value = [v.varValue for v in lp.variables()]
        lp.solverModel.setSolution(start)
        super().callSolver(lp)


def require(name: str) -> None:
    """Refuse a solver that PuLP does not find.

    Raises:
        ProblemError: it is not there.
    """
    available = pulp.listSolvers(onlyAvailable=True)
    if NAMES.get(name.lower(), name) not in available:
        raise ProblemError(
            "parameters.solver", repr(name), f"must be cpsat, highs, cbc, or one of {', '.join(available)}"
        )


def _solver(name: str, effort: Effort, hinted: bool) -> Any:
    known = NAMES.get(name.lower(), name)
    seconds = None if effort.deadline is None else effort.seconds
    if known == "HiGHS":
        silence()
        options: dict[str, Any] = {"random_seed": effort.seed % 2**31}
        if effort.work < np.inf:
            options["mip_max_nodes"] = max(1, int(effort.work * NODES_PER_WORK))
        highs = _WarmHiGHS if hinted else _HiGHS
        return highs(msg=False, threads=effort.threads, timeLimit=seconds, gapRel=effort.gap, **options)
    if known == "PULP_CBC_CMD":
        limits: dict[str, Any] = {} if seconds is None else {"timeLimit": seconds}
        if effort.work < np.inf:
            limits["maxNodes"] = max(1, int(effort.work * NODES_PER_WORK))
        # The class PULP_CBC_CMD warns of PuLP 4, which does not bring CBC; its program is what we are after.
        path = pulp.PULP_CBC_CMD.pulp_cbc_path
        return pulp.COIN_CMD(
            path=path, msg=False, warmStart=hinted, threads=effort.threads, gapRel=effort.gap, **limits
        )
    return pulp.getSolver(known, msg=False, timeLimit=effort.work if seconds is None else seconds)
