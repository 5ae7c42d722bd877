"""Solving in a daemon instead of in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeplan.planner.commands.jobs import connect
from moeplan.solvers import Plan, Problem, SolveParameters, evaluate, solve

__all__ = ["Solve", "solver_at"]

Solve = Callable[[Problem, str, SolveParameters], Plan]


@contextmanager
def solver_at(server: str | None, token: Path | None, ca: Path | None) -> Iterator[Solve]:
    """A function that solves in the daemon at `server`, or here if that is None.

    The daemon's layout is judged here again: what is reported about it does not rest on trust.
    """
    if server is None:
        yield solve
        return
    from moeplan.api import wire

    with connect(server, token, ca) as client:

        def remotely(problem: Problem, policy: str, parameters: SolveParameters) -> Plan:
            (plan,) = client.solve([problem], policy, parameters)
            layout = wire.read_layout("plan.layout", plan.layout, problem.experts)
            seconds = plan.solve_time.ToTimedelta().total_seconds()
            return evaluate(problem, layout, plan.split_rule, policy=plan.policy, seconds=seconds)

        yield remotely
