"""A client of the daemon, synchronous and asynchronous; its errors are in `errors`.

with Client("127.0.0.1:7433") as client:
    (plan,) = client.solve([problem])
    job = client.create_job("my-job", JobSpec(cluster, layers=4, experts=64))
    for plan in client.watch_plans(job.name):
        ...

What it returns are our own types, so that a plan from a daemon is used as one made here: it is judged here again. Every
method raises ServiceError where there is no answer, and ProblemError where the answer is no valid one. The asynchronous
one judges in threads, so that its event loop goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc

from moeplan.api import wire
from moeplan.api.connection import Security, open_aio_channel, open_channel
from moeplan.api.errors import ServiceError, error_of
from moeplan.api.job_plans import JobPlan
from moeplan.api.jobs import Job, JobSpec
from moeplan.api.servers import Server, read_servers
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.v1 import admin_pb2, admin_pb2_grpc, planner_pb2, planner_pb2_grpc, solver_pb2, solver_pb2_grpc

if TYPE_CHECKING:
    from moeplan.solvers import Plan

__all__ = ["AsyncClient", "Client", "PolicyInfo"]

TIMEOUT_S = 30.0
DEFAULTS = SolveParameters()


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy that a server knows.

    Attributes:
        name: Name by which requests choose it.
        source: Where it was published.
        split_rule: Split rule that its plans use.
        summary: What it does.
    """

    name: str
    source: str
    split_rule: str
    summary: str


class _Base:
    def __init__(self, address: str, security: Security | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._security = Security.from_files() if security is None else security

    @property
    def address(self) -> str:
        """The daemon that answers: the one given, or the one that owns the job that was asked for."""
        return self._address

    @staticmethod
    def _solve(problems: Sequence[Problem], policy: str, parameters: SolveParameters) -> solver_pb2.SolveRequest:
        return solver_pb2.SolveRequest(
            problems=[wire.write_problem(problem) for problem in problems],
            policy=policy,
            parameters=wire.write_parameters(parameters),
        )

    @staticmethod
    def _anytime(problem: Problem, policy: str, parameters: SolveParameters) -> solver_pb2.SolveAnytimeRequest:
        return solver_pb2.SolveAnytimeRequest(
            problem=wire.write_problem(problem), policy=policy, parameters=wire.write_parameters(parameters)
        )

    @staticmethod
    def _evaluate(problem: Problem, layout: Layout, split_rule: str) -> solver_pb2.EvaluateRequest:
        return solver_pb2.EvaluateRequest(
            problem=wire.write_problem(problem), layout=wire.write_layout(layout), split_rule=split_rule
        )

    @staticmethod
    def _plans(response: solver_pb2.SolveResponse, problems: Sequence[Problem]) -> list[Plan]:
        return [wire.read_plan(plan, problem) for plan, problem in zip(response.plans, problems, strict=True)]

    @staticmethod
    def _policies(response: solver_pb2.ListPoliciesResponse) -> list[PolicyInfo]:
        return [
            PolicyInfo(policy.name, policy.title, policy.split_rule, policy.description) for policy in response.policies
        ]

    @staticmethod
    def _create(job_id: str, spec: JobSpec, incarnation: int) -> planner_pb2.CreateJobRequest:
        return planner_pb2.CreateJobRequest(job_id=job_id, job=wire.write_job_spec(spec, incarnation))

    def _error(self, error: grpc.RpcError) -> ServiceError:
        return error_of(error, self._address)

    def _elsewhere(self, error: grpc.RpcError) -> str:
        """Address of the daemon that owns the job; raises if that is not what the error is about."""
        known = self._error(error)
        owner = known.metadata.get("owner", "")
        if not owner or owner == self._address:
            raise known from None
        return owner


class Client(_Base):
    """Blocking client. Thread-safe. Use it in a `with` statement, or `close` it.

    Args:
        address: host:port or unix:path.
        security: Token and certificates; by default what the environment names, see `Security.from_files`.
        timeout_s: Time for one call.

    Raises:
        OSError: a token or certificate cannot be read.
    """

    def __init__(self, address: str, security: Security | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(address, security, timeout_s)
        self._channels: list[grpc.Channel] = []
        self._connect(address)

    def _connect(self, address: str) -> None:
        channel = open_channel(address, self._security)
        self._channels.append(channel)
        self._address = address
        self.planner = planner_pb2_grpc.PlannerServiceStub(channel)
        self.solver = solver_pb2_grpc.SolverServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        for channel in self._channels:
            channel.close()

    def _call(self, service: str, method: str, request: Any) -> Any:
        try:
            return self._send(service, method, request)
        except grpc.RpcError as error:
            self._connect(self._elsewhere(error))
        try:
            return self._send(service, method, request)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def _send(self, service: str, method: str, request: Any) -> Any:
        call = getattr(getattr(self, service), method)
        return call(request, timeout=self._timeout_s, metadata=self._security.metadata)

    def solve(
        self, problems: Iterable[Problem], *, policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> list[Plan]:
        """Plan one or several layers."""
        layers = list(problems)
        return self._plans(self._call("solver", "Solve", self._solve(layers, policy, parameters)), layers)

    def solve_anytime(
        self, problem: Problem, *, policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> Iterator[Plan]:
        """Better and better plans of one layer; whoever stops asking ends the solve."""
        request = self._anytime(problem, policy, parameters)
        call = self.solver.SolveAnytime(request, timeout=self._timeout_s, metadata=self._security.metadata)
        try:
            for response in call:
                yield wire.read_plan(response.plan, problem)
        except grpc.RpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()

    def evaluate(self, problem: Problem, layout: Layout, split_rule: str = "") -> Plan:
        """Judge a layout."""
        request = self._evaluate(problem, layout, split_rule)
        response: solver_pb2.EvaluateResponse = self._call("solver", "Evaluate", request)
        return wire.read_plan(response.plan, problem)

    def policies(self) -> list[PolicyInfo]:
        """The policies that the server knows."""
        return self._policies(self._call("solver", "ListPolicies", solver_pb2.ListPoliciesRequest()))

    def create_job(self, job_id: str, spec: JobSpec, incarnation: int = 0) -> Job:
        """Create a job; repeating it is harmless.

        Args:
            job_id: 1 to 63 of a-z, 0-9 and -, beginning with a letter.
            spec: What it is.
            incarnation: Which start of the training this is; a later one takes an existing job over.
        """
        request = self._create(job_id, spec, incarnation)
        response: planner_pb2.CreateJobResponse = self._call("planner", "CreateJob", request)
        return wire.read_job(response.job)

    def job(self, name: str) -> Job:
        """Read a job."""
        response: planner_pb2.GetJobResponse = self._call("planner", "GetJob", planner_pb2.GetJobRequest(name=name))
        return wire.read_job(response.job)

    def jobs(self) -> Iterator[Job]:
        """All jobs, page by page."""
        token = ""
        while True:
            request = planner_pb2.ListJobsRequest(page_token=token)
            response: planner_pb2.ListJobsResponse = self._call("planner", "ListJobs", request)
            yield from map(wire.read_job, response.jobs)
            token = response.next_page_token
            if not token:
                return

    def servers(self) -> list[Server]:
        """The daemons behind the store."""
        return read_servers(self._call("admin", "ListServers", admin_pb2.ListServersRequest()))

    def move_job(self, name: str, address: str = "") -> str:
        """Give a job to the daemon at an address, or to the one with the fewest jobs; its address."""
        request = admin_pb2.MoveJobRequest(name=name, address=address)
        response: admin_pb2.MoveJobResponse = self._call("admin", "MoveJob", request)
        return response.address

    def drain(self, *, end: bool = False) -> int:
        """Have the daemon give its jobs to others and take none, or take some again; how many it gave."""
        response: admin_pb2.DrainResponse = self._call("admin", "Drain", admin_pb2.DrainRequest(end=end))
        return response.moved

    def delete_job(self, name: str) -> None:
        """Delete a job."""
        self._call("planner", "DeleteJob", planner_pb2.DeleteJobRequest(name=name))

    def plan(self, name: str) -> JobPlan:
        """Read a plan, ``jobs/{job}/plans/{version}`` or ``jobs/{job}/plans/-``."""
        response: planner_pb2.GetPlanResponse = self._call("planner", "GetPlan", planner_pb2.GetPlanRequest(name=name))
        return wire.read_job_plan(response.plan)

    def watch_plans(self, job: str, after_version: int = 0) -> Iterator[JobPlan]:
        """The plan whenever there is a newer one, for ever, with the layers that are newer than the one before."""
        request = planner_pb2.WatchPlansRequest(job=job, after_version=after_version)
        call = self.planner.WatchPlans(request, metadata=self._security.metadata)
        try:
            for response in call:
                yield wire.read_job_plan(response.plan)
        except grpc.RpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()


class AsyncClient(_Base):
    """The same for asyncio. Make and use it in one event loop, in an `async with` statement.

    Args:
        address: host:port or unix:path.
        security: Token and certificates; by default what the environment names, see `Security.from_files`.
        timeout_s: Time for one call.

    Raises:
        OSError: a token or certificate cannot be read.
    """

    def __init__(self, address: str, security: Security | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(address, security, timeout_s)
        self._channels: list[grpc.aio.Channel] = []
        self._connect(address)

    def _connect(self, address: str) -> None:
        channel = open_aio_channel(address, self._security)
        self._channels.append(channel)
        self._address = address
        self.planner = planner_pb2_grpc.PlannerServiceStub(channel)
        self.solver = solver_pb2_grpc.SolverServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect."""
        for channel in self._channels:
            await channel.close()

    async def _call(self, service: str, method: str, request: Any) -> Any:
        try:
            return await self._send(service, method, request)
        except grpc.RpcError as error:
            self._connect(self._elsewhere(error))
        try:
            return await self._send(service, method, request)
        except grpc.RpcError as error:
            raise self._error(error) from None

    async def _send(self, service: str, method: str, request: Any) -> Any:
        call = getattr(getattr(self, service), method)
        return await call(request, timeout=self._timeout_s, metadata=self._security.metadata)

    async def solve(
        self, problems: Iterable[Problem], *, policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> list[Plan]:
        """Plan one or several layers."""
        layers = list(problems)
        response = await self._call("solver", "Solve", self._solve(layers, policy, parameters))
        return await asyncio.to_thread(self._plans, response, layers)

    async def solve_anytime(
        self, problem: Problem, *, policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> AsyncIterator[Plan]:
        """Better and better plans of one layer; whoever stops asking ends the solve."""
        request = self._anytime(problem, policy, parameters)
        call = self.solver.SolveAnytime(request, timeout=self._timeout_s, metadata=self._security.metadata)
        try:
            async for response in call:
                yield await asyncio.to_thread(wire.read_plan, response.plan, problem)
        except grpc.RpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()

    async def evaluate(self, problem: Problem, layout: Layout, split_rule: str = "") -> Plan:
        """Judge a layout."""
        request = self._evaluate(problem, layout, split_rule)
        response: solver_pb2.EvaluateResponse = await self._call("solver", "Evaluate", request)
        return await asyncio.to_thread(wire.read_plan, response.plan, problem)

    async def policies(self) -> list[PolicyInfo]:
        """The policies that the server knows."""
        return self._policies(await self._call("solver", "ListPolicies", solver_pb2.ListPoliciesRequest()))

    async def create_job(self, job_id: str, spec: JobSpec, incarnation: int = 0) -> Job:
        """Create a job; see `Client.create_job`."""
        request = self._create(job_id, spec, incarnation)
        response: planner_pb2.CreateJobResponse = await self._call("planner", "CreateJob", request)
        return await asyncio.to_thread(wire.read_job, response.job)

    async def job(self, name: str) -> Job:
        """Read a job."""
        request = planner_pb2.GetJobRequest(name=name)
        response: planner_pb2.GetJobResponse = await self._call("planner", "GetJob", request)
        return await asyncio.to_thread(wire.read_job, response.job)

    async def jobs(self) -> AsyncIterator[Job]:
        """All jobs, page by page."""
        token = ""
        while True:
            request = planner_pb2.ListJobsRequest(page_token=token)
            response: planner_pb2.ListJobsResponse = await self._call("planner", "ListJobs", request)
            for job in response.jobs:
                yield await asyncio.to_thread(wire.read_job, job)
            token = response.next_page_token
            if not token:
                return

    async def servers(self) -> list[Server]:
        """The daemons behind the store."""
        return read_servers(await self._call("admin", "ListServers", admin_pb2.ListServersRequest()))

    async def move_job(self, name: str, address: str = "") -> str:
        """Give a job to the daemon at an address, or to the one with the fewest jobs; its address."""
        request = admin_pb2.MoveJobRequest(name=name, address=address)
        response: admin_pb2.MoveJobResponse = await self._call("admin", "MoveJob", request)
        return response.address

    async def drain(self, *, end: bool = False) -> int:
        """Have the daemon give its jobs to others and take none, or take some again; how many it gave."""
        response: admin_pb2.DrainResponse = await self._call("admin", "Drain", admin_pb2.DrainRequest(end=end))
        return response.moved

    async def delete_job(self, name: str) -> None:
        """Delete a job."""
        await self._call("planner", "DeleteJob", planner_pb2.DeleteJobRequest(name=name))

    async def plan(self, name: str) -> JobPlan:
        """Read a plan, ``jobs/{job}/plans/{version}`` or ``jobs/{job}/plans/-``."""
        request = planner_pb2.GetPlanRequest(name=name)
        response: planner_pb2.GetPlanResponse = await self._call("planner", "GetPlan", request)
        return await asyncio.to_thread(wire.read_job_plan, response.plan)

    async def watch_plans(self, job: str, after_version: int = 0) -> AsyncIterator[JobPlan]:
        """The plan whenever there is a newer one, for ever, with the layers that are newer than the one before."""
        request = planner_pb2.WatchPlansRequest(job=job, after_version=after_version)
        call = self.planner.WatchPlans(request, metadata=self._security.metadata)
        try:
            async for response in call:
                yield await asyncio.to_thread(wire.read_job_plan, response.plan)
        except grpc.RpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()
