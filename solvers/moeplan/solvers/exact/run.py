"""Running a model under a deadline that the solver itself may overstep: the incumbent is always our own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from moeplan.solvers.exact.model import Answer, Effort, Model, OutOfTime, Report
from moeplan.solvers.problem.arrays import Bool, Float64, Int64

__all__ = ["building_s", "require", "run"]

MOST_TOKENS = 2**34
"""Tokens of all scenarios, times the ratio of the fastest to the slowest device, beyond which a solver counts in larger
units: its sums of tokens, speeds and weights must fit into 64 bits."""

MARGIN_S = 0.03
"""Time that a solver is told to leave, because it looks at its clock rarely; half the time where that is short."""

BUILDING_S = 2e-6
"""Time in which a share of an expert's tokens is written down."""


def building_s(loads: Int64, speed: Float64) -> float:
    """Seconds that it takes to write a model of these loads and speeds down; with less left it is not begun."""
    return BUILDING_S * loads.size * len(speed)


def run(model: Model, solver: str, effort: Effort) -> Answer:
    """Solve by `cpsat`, `highs`, `cbc` or another solver of PuLP's, and return in time.

    With a deadline the solver works in a thread of its own. If it is late, the answer is the last placement that it
    reported, and it ends on its own soon after.

    Raises:
        ProblemError: there is no such solver.
    """
    model = _coarse(model)
    found: list[Bool] = []
    if effort.deadline is None:
        return _backend(model, solver)(model, effort, found.append)
    left = effort.deadline - time.perf_counter()
    if left <= building_s(model.loads, model.speed):
        return Answer(None, 0.0, "unknown")
    early = replace(effort, deadline=effort.deadline - min(MARGIN_S, left / 2))
    answers: list[Answer] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(_backend(model, solver)(model, early, found.append))
        except OutOfTime:
            pass
        except Exception as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, name="moeplan-solver")
    thread.start()
    thread.join(effort.seconds)
    if errors:
        raise errors[0]
    if answers:
        return answers[0]
    return Answer(found[-1] if found else None, 0.0, "feasible" if found else "unknown")


def _coarse(model: Model) -> Model:
    """The same model with tokens in larger units where there are very many.

    Loads are rounded down, and scenarios left out that have less than a unit of each expert, so that bounds hold.
    """
    most = float(model.loads.sum(axis=1).max()) * model.scenarios * float(model.speed.max() / model.speed.min())
    unit = math.ceil(most / MOST_TOKENS)
    if unit <= 1:
        return model
    loads = model.loads // unit
    kept = loads.any(axis=1)
    bytes_of_unit = model.activation_bytes * unit
    return replace(model, loads=loads[kept], weights=model.weights[kept] * unit, activation_bytes=bytes_of_unit)


def require(solver: str) -> None:
    """Refuse a solver that is not there.

    Raises:
        ProblemError: it is neither CP-SAT nor known to PuLP.
    """
    if solver != "cpsat":
        from moeplan.solvers.exact import pulp

        pulp.require(solver)


def _backend(model: Model, solver: str) -> Callable[[Model, Effort, Report], Answer]:
    # Both libraries take a while to import.
    if solver == "cpsat":
        from moeplan.solvers.exact import cpsat, even_model, partition_model

        if model.even:
            return even_model.solve
        return partition_model.solve if partition_model.applies(model) else cpsat.solve
    from moeplan.solvers.exact import pulp

    return partial(pulp.solve, name=solver)
