"""What a worker process does with a task. Requests are read here, not in the daemon: their arrays never hold it up.

The daemon itself never imports this module: it loads the compiler of the kernels, and with it most of a second.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import replace

from moeplan.planner import wire
from moeplan.planner.daemon.frames import Kind
from moeplan.planner.daemon.tasks import LayersTask, Limited
from moeplan.planner.jobs.plan import Candidate
from moeplan.solvers import Plan, ProblemError, SolveParameters, available_policies, evaluate, solve
from moeplan.solvers.splits import RULES
from moeplan.v1 import solver_pb2

__all__ = ["do", "plan_layers"]

ANYTIME_FACTOR = 4
"""How much more work each attempt of an anytime solve may do than the one before: at most a third is spent twice."""


def do(kind: Kind, payload: bytes) -> Iterator[tuple[Kind, bytes]]:
    """The answers to a task, `DONE` last.

    Raises:
        ProblemError: the request cannot be solved.
    """
    if kind is Kind.LAYERS:
        yield Kind.DONE, pickle.dumps(plan_layers(pickle.loads(payload)), protocol=5)
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


def plan_layers(task: LayersTask) -> list[Candidate]:
    """Forecast and plan each layer, and judge the layout in force on the same forecast by the same split rule.

    Raises:
        ProblemError: the policy does not exist, or a layer cannot be planned.
    """
    candidates = []
    parameters, end = _bounded(task.parameters, task.end)
    for index, (layer, outlook) in enumerate(zip(task.layers, task.outlooks, strict=True)):
        problem = outlook.problem()
        plan = solve(problem, task.policy, _share(parameters, end, len(task.layers) - index))
        assert problem.current is not None
        before = evaluate(problem, problem.current, plan.split.rule)
        candidates.append(
            Candidate(
                layer=layer,
                layout=plan.layout,
                split_rule=plan.split.rule,
                cost_s=plan.cost.mean_s,
                bound=plan.bound,
                gap=plan.gap,
                imbalance=plan.mean_imbalance,
                cost_before_s=before.cost.mean_s,
                imbalance_before=before.mean_imbalance,
                seconds=plan.seconds,
            )
        )
    return candidates


def _solve(limited: Limited) -> solver_pb2.SolveResponse:
    request = solver_pb2.SolveRequest.FromString(limited.request)
    if not request.problems:
        raise ProblemError("problems", "none", "must be at least one")
    parameters, end = _bounded(wire.read_parameters(request.parameters), limited.end)
    policy = _policy(request.policy)
    problems = []
    for index, message in enumerate(request.problems, limited.first):
        with wire.field(f"problems[{index}]"):
            problems.append(wire.read_problem(message))
    plans = []
    for index, problem in enumerate(problems):
        share = _share(parameters, end, len(problems) - index)
        with wire.field(f"problems[{limited.first + index}]"):
            plans.append(solve(problem, policy, share))
    return solver_pb2.SolveResponse(plans=[wire.write_plan(plan) for plan in plans])


def _anytime(limited: Limited) -> Iterator[Plan]:
    request = solver_pb2.SolveAnytimeRequest.FromString(limited.request)
    full, end = _bounded(wire.read_parameters(request.parameters), limited.end)
    with wire.field("problem"):
        problem = wire.read_problem(request.problem)
    best: Plan | None = None
    work = 0
    while True:
        plan = solve(problem, _policy(request.policy), _share(replace(full, work_limit=work), end, 1))
        if best is None or plan.objective < best.objective:
            best = plan
            yield plan
        if work >= full.work_limit or best.gap <= full.target_gap or time.monotonic() >= end:
            return
        work = min(full.work_limit, max(32, work * ANYTIME_FACTOR))


def _evaluate(payload: bytes) -> solver_pb2.EvaluateResponse:
    request = solver_pb2.EvaluateRequest.FromString(payload)
    with wire.field("problem"):
        problem = wire.read_problem(request.problem)
    layout = wire.read_layout("layout", request.layout, problem.experts)
    rule = request.split_rule or "optimal"
    if rule not in RULES:
        raise ProblemError("split_rule", repr(rule[:64]), f"must be one of {', '.join(RULES)}")
    return solver_pb2.EvaluateResponse(plan=wire.write_plan(evaluate(problem, layout, rule)))


def _policy(name: str) -> str:
    chosen = name or "hybrid"
    known = available_policies()
    if chosen not in known:
        raise ProblemError("policy", repr(chosen[:64]), f"must be one of {', '.join(known)}")
    return chosen


def _bounded(parameters: SolveParameters, end: float) -> tuple[SolveParameters, float]:
    """The parameters, and when the solve ends: by its own deadline or by `end`, whichever comes first."""
    if parameters.deadline_s is not None:
        end = min(end, time.monotonic() + parameters.deadline_s)
    return parameters, end


def _share(parameters: SolveParameters, end: float, left: int) -> SolveParameters:
    """An equal share of the time until `end`, for the next of `left` layers."""
    return replace(parameters, deadline_s=max((end - time.monotonic()) / left, 1e-6))
