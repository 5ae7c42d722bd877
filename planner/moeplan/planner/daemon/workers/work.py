"""Tasks as a worker process does them. Requests are read here, not in the daemon: their arrays never hold it up.

The daemon itself never imports this module: it loads the compiler of the kernels, and with it most of a second.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator

from moeplan.api import wire
from moeplan.planner.daemon.workers.frames import Kind
from moeplan.planner.daemon.workers.tasks import Limited
from moeplan.planner.jobs.loads import slot_loads
from moeplan.planner.jobs.solve import plan_layers, until
from moeplan.solvers import Plan, ProblemError, available_policies, evaluate, solve_anytime, solve_layers
from moeplan.solvers.problem.split_rules import split_rule
from moeplan.v1 import solver_pb2

__all__ = ["do"]


def do(kind: Kind, payload: bytes) -> Iterator[tuple[Kind, bytes]]:
    """The answers to a task, `DONE` last.

    Raises:
        ProblemError: the request cannot be solved.
    """
    if kind is Kind.LAYERS:
        yield Kind.DONE, pickle.dumps(plan_layers(pickle.loads(payload)), protocol=5)
        return
    if kind is Kind.LOADS:
        yield Kind.DONE, pickle.dumps(slot_loads(pickle.loads(payload)), protocol=5)
        return
    limited: Limited = pickle.loads(payload)
    match kind:
        case Kind.SOLVE:
            yield Kind.DONE, _solve(limited).SerializeToString()
        case Kind.ANYTIME:
            for plan in _anytime(limited):
                yield Kind.PART, solver_pb2.SolveAnytimeResponse(plan=wire.write_plan(plan)).SerializeToString()
            yield Kind.DONE, b""
        case Kind.EVALUATE:
            yield Kind.DONE, _evaluate(limited.request).SerializeToString()
        case _:
            raise ValueError(f"a worker does not do {kind!r}")


def _solve(limited: Limited) -> solver_pb2.SolveResponse:
    request = solver_pb2.SolveRequest.FromString(limited.request)
    if not request.problems:
        raise ProblemError("problems", "none", "must be at least one")
    parameters = until(wire.read_parameters(request.parameters), limited.end)
    policy = _policy(request.policy)
    problems = []
    for index, message in enumerate(request.problems, limited.first):
        with wire.field(f"problems[{index}]"):
            problems.append(wire.read_problem(message))
    plans = solve_layers(problems, policy=policy, parameters=parameters, first=limited.first)
    return solver_pb2.SolveResponse(plans=[wire.write_plan(plan) for plan in plans])


def _anytime(limited: Limited) -> Iterator[Plan]:
    request = solver_pb2.SolveAnytimeRequest.FromString(limited.request)
    parameters = until(wire.read_parameters(request.parameters), limited.end)
    with wire.field("problem"):
        problem = wire.read_problem(request.problem)
    yield from solve_anytime(problem, policy=_policy(request.policy), parameters=parameters)


def _evaluate(payload: bytes) -> solver_pb2.EvaluateResponse:
    request = solver_pb2.EvaluateRequest.FromString(payload)
    with wire.field("problem"):
        problem = wire.read_problem(request.problem)
    layout = wire.read_layout("layout", request.layout, problem.experts)
    rule = split_rule("split_rule", request.split_rule) if request.split_rule else None
    return solver_pb2.EvaluateResponse(plan=wire.write_plan(evaluate(problem, layout, rule)))


def _policy(name: str) -> str:
    chosen = name or "hybrid"
    known = available_policies()
    if chosen not in known:
        raise ProblemError("policy", repr(chosen[:64]), f"must be one of {', '.join(known)}")
    return chosen
