"""The solver service: everything happens in the workers."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import grpc

from moeplan.api import wire
from moeplan.planner.daemon.budgets import Budgets
from moeplan.planner.daemon.settings import ServiceLimits, loopback
from moeplan.planner.daemon.statuses import invalid
from moeplan.planner.daemon.tenants import CALLER
from moeplan.planner.daemon.workers.frames import Kind
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.daemon.workers.tasks import Limited
from moeplan.solvers import available_policies
from moeplan.v1 import problem_pb2, solver_pb2, solver_pb2_grpc

__all__ = ["SolverService"]

REPLY_S = 0.25
"""Time kept back from a caller's deadline for the way of the answer; at most a tenth of it."""

FEWEST_LAYERS = 2
"""Layers that a further worker is worth: the way to one and back takes as long as a small layer."""

Context = grpc.aio.ServicerContext[Any, Any]


class SolverService(solver_pb2_grpc.SolverServiceServicer):
    """moeplan.v1.SolverService."""

    def __init__(self, workers: Workers, limits: ServiceLimits, budgets: Budgets) -> None:
        self._workers, self._limits, self._budgets = workers, limits, budgets

    async def Solve(  # noqa: N802
        self, request: solver_pb2.SolveRequest, context: Context
    ) -> solver_pb2.SolveResponse:
        """Solve one or several layers, in parallel where workers are idle."""
        self._budgets.check(CALLER.get().tenant)
        limit_s = self._limit_s(context, request.parameters)
        layers = len(request.problems)
        parts = max(1, min(self._workers.idle, layers // FEWEST_LAYERS))
        tasks = [
            _task(
                solver_pb2.SolveRequest(
                    problems=request.problems[first:after], policy=request.policy, parameters=request.parameters
                ),
                limit_s,
                first,
            )
            for first, after in pairwise(layers * i // parts for i in range(parts + 1))
        ]
        response = solver_pb2.SolveResponse()
        for answer in await self._workers.run_all(
            Kind.SOLVE, tasks, limit_s=limit_s, label="solve", caller=_caller(context)
        ):
            response.MergeFromString(answer)
        return response

    async def SolveAnytime(  # noqa: N802
        self, request: solver_pb2.SolveAnytimeRequest, context: Context
    ) -> AsyncIterator[solver_pb2.SolveAnytimeResponse]:
        """Send better and better plans."""
        if context.time_remaining() is None and not request.parameters.HasField("deadline"):
            raise invalid("parameters.deadline", "absent", "give it, or a deadline of the call")
        self._budgets.check(CALLER.get().tenant)
        limit_s = self._limit_s(context, request.parameters)
        answers = self._workers.stream(
            Kind.ANYTIME, _task(request, limit_s), limit_s=limit_s, label="anytime", caller=_caller(context)
        )
        async with contextlib.aclosing(answers):
            async for answer in answers:
                yield solver_pb2.SolveAnytimeResponse.FromString(answer)

    async def Evaluate(  # noqa: N802
        self, request: solver_pb2.EvaluateRequest, context: Context
    ) -> solver_pb2.EvaluateResponse:
        """Judge a layout."""
        self._budgets.check(CALLER.get().tenant)
        limit_s = self._limit_s(context)
        answer = await self._workers.run(
            Kind.EVALUATE, _task(request, limit_s), limit_s=limit_s, label="evaluate", caller=_caller(context)
        )
        return solver_pb2.EvaluateResponse.FromString(answer)

    async def ListPolicies(  # noqa: N802
        self, request: solver_pb2.ListPoliciesRequest, context: Context
    ) -> solver_pb2.ListPoliciesResponse:
        """List the policies."""
        policies = await asyncio.to_thread(available_policies)  # the first time, it loads every one
        return solver_pb2.ListPoliciesResponse(
            policies=[
                solver_pb2.Policy(
                    name=policy.name, title=policy.source, split_rule=policy.split, description=policy.summary
                )
                for policy in policies.values()
            ]
        )

    def _limit_s(self, context: Context, parameters: problem_pb2.SolveParameters | None = None) -> float:
        """Seconds that a call may take from now, the wait for a worker included."""
        limits = []
        remaining = context.time_remaining()
        if remaining is not None:
            limits.append(remaining - min(REPLY_S, remaining / 10))
        if parameters is not None and parameters.HasField("deadline"):
            limits.append(wire.read_duration("parameters.deadline", parameters.deadline))
        return min(self._limits.solve_s, *limits or [self._limits.free_solve_s])


def _caller(context: Context) -> str:
    """Who calls: the tenant; without tenants the machine, or on this machine the connection."""
    tenant = CALLER.get().tenant
    if tenant.listed:
        return tenant.name
    peer = str(context.peer())
    address = peer.partition(":")[2]
    return peer if not address or loopback(address) else peer.rpartition(":")[0]


def _task(
    request: solver_pb2.SolveRequest | solver_pb2.SolveAnytimeRequest | solver_pb2.EvaluateRequest,
    limit_s: float,
    first: int = 0,
) -> bytes:
    return pickle.dumps(Limited(request.SerializeToString(), time.monotonic() + limit_s, first))
