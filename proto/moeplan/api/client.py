"""A client of the daemon, synchronous and asynchronous; its errors are in `errors`.

with Client("127.0.0.1:7433") as client:
    plans = client.solve([problem])
    for plan in client.watch_plans("jobs/my-job"):
        ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Self

import grpc

from moeplan.api import wire
from moeplan.api.connection import Security, channel_options
from moeplan.api.errors import error_of
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.v1 import job_pb2, planner_pb2, planner_pb2_grpc, problem_pb2, solver_pb2, solver_pb2_grpc

__all__ = ["AsyncClient", "Client"]

TIMEOUT_S = 30.0
DEFAULTS = SolveParameters()


class _Base:
    def __init__(self, address: str, security: Security | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self._security, self._timeout_s = address, security or Security(), timeout_s

    @staticmethod
    def _solve(problems: Iterable[Problem], policy: str, parameters: SolveParameters) -> solver_pb2.SolveRequest:
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
            problem=wire.write_problem(problem), layout=wire.write_array(layout.slots), split_rule=split_rule
        )

    def _elsewhere(self, error: grpc.RpcError) -> str:
        """Address of the daemon that owns the job; raises if that is not what the error is about."""
        known = error_of(error)
        owner = known.metadata.get("owner", "")
        if not owner or owner == self._address:
            raise known from None
        return owner


class Client(_Base):
    """Blocking client. Thread-safe. Use it in a `with` statement, or `close` it.

    Args:
        address: host:port or unix:path.
        security: Token and certificates.
        timeout_s: Time for one call.
    """

    def __init__(self, address: str, security: Security | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(address, security, timeout_s)
        self._channels: list[grpc.Channel] = []
        self._connect(address)

    def _connect(self, address: str) -> None:
        credentials = self._security.credentials()
        if credentials is None:
            channel = grpc.insecure_channel(address, channel_options())
        else:
            channel = grpc.secure_channel(address, credentials, channel_options())
        self._channels.append(channel)
        self._address = address
        self.planner = planner_pb2_grpc.PlannerServiceStub(channel)
        self.solver = solver_pb2_grpc.SolverServiceStub(channel)

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
            raise error_of(error) from None

    def _send(self, service: str, method: str, request: Any) -> Any:
        call = getattr(getattr(self, service), method)
        return call(request, timeout=self._timeout_s, metadata=self._security.metadata)

    def solve(
        self, problems: Iterable[Problem], policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> list[problem_pb2.Plan]:
        """Plan one or several layers; raises ServiceError."""
        response: solver_pb2.SolveResponse = self._call("solver", "Solve", self._solve(problems, policy, parameters))
        return list(response.plans)

    def solve_anytime(
        self, problem: Problem, policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> Iterator[problem_pb2.Plan]:
        """Better and better plans of one layer; raises ServiceError."""
        request = self._anytime(problem, policy, parameters)
        try:
            for response in self.solver.SolveAnytime(
                request, timeout=self._timeout_s, metadata=self._security.metadata
            ):
                yield response.plan
        except grpc.RpcError as error:
            raise error_of(error) from None

    def evaluate(self, problem: Problem, layout: Layout, split_rule: str = "") -> problem_pb2.Plan:
        """Judge a layout; raises ServiceError."""
        request = self._evaluate(problem, layout, split_rule)
        response: solver_pb2.EvaluateResponse = self._call("solver", "Evaluate", request)
        return response.plan

    def policies(self) -> list[solver_pb2.Policy]:
        """The policies that the server knows; raises ServiceError."""
        response: solver_pb2.ListPoliciesResponse = self._call(
            "solver", "ListPolicies", solver_pb2.ListPoliciesRequest()
        )
        return list(response.policies)

    def create_job(self, job_id: str, job: job_pb2.Job) -> job_pb2.Job:
        """Create a job; repeating it is harmless; raises ServiceError."""
        request = planner_pb2.CreateJobRequest(job_id=job_id, job=job)
        response: planner_pb2.CreateJobResponse = self._call("planner", "CreateJob", request)
        return response.job

    def job(self, name: str) -> job_pb2.Job:
        """Read a job; raises ServiceError."""
        response: planner_pb2.GetJobResponse = self._call("planner", "GetJob", planner_pb2.GetJobRequest(name=name))
        return response.job

    def jobs(self) -> Iterator[job_pb2.Job]:
        """All jobs, page by page; raises ServiceError."""
        token = ""
        while True:
            request = planner_pb2.ListJobsRequest(page_token=token)
            response: planner_pb2.ListJobsResponse = self._call("planner", "ListJobs", request)
            yield from response.jobs
            token = response.next_page_token
            if not token:
                return

    def delete_job(self, name: str) -> None:
        """Delete a job; raises ServiceError."""
        self._call("planner", "DeleteJob", planner_pb2.DeleteJobRequest(name=name))

    def plan(self, name: str) -> job_pb2.JobPlan:
        """Read a plan, ``jobs/{job}/plans/{version}`` or ``jobs/{job}/plans/-``; raises ServiceError."""
        response: planner_pb2.GetPlanResponse = self._call("planner", "GetPlan", planner_pb2.GetPlanRequest(name=name))
        return response.plan

    def watch_plans(self, job: str, after_version: int = 0) -> Iterator[job_pb2.JobPlan]:
        """The plan whenever there is a newer one, for ever; raises ServiceError."""
        request = planner_pb2.WatchPlansRequest(job=job, after_version=after_version)
        try:
            for response in self.planner.WatchPlans(request, metadata=self._security.metadata):
                yield response.plan
        except grpc.RpcError as error:
            raise error_of(error) from None


class AsyncClient(_Base):
    """The same for asyncio. Make and use it in one event loop, in an `async with` statement.

    Args:
        address: host:port or unix:path.
        security: Token and certificates.
        timeout_s: Time for one call.
    """

    def __init__(self, address: str, security: Security | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(address, security, timeout_s)
        self._channels: list[grpc.aio.Channel] = []
        self._connect(address)

    def _connect(self, address: str) -> None:
        credentials = self._security.credentials()
        if credentials is None:
            channel = grpc.aio.insecure_channel(address, channel_options())
        else:
            channel = grpc.aio.secure_channel(address, credentials, channel_options())
        self._channels.append(channel)
        self._address = address
        self.planner = planner_pb2_grpc.PlannerServiceStub(channel)
        self.solver = solver_pb2_grpc.SolverServiceStub(channel)

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
            raise error_of(error) from None

    async def _send(self, service: str, method: str, request: Any) -> Any:
        call = getattr(getattr(self, service), method)
        return await call(request, timeout=self._timeout_s, metadata=self._security.metadata)

    async def solve(
        self, problems: Iterable[Problem], policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> list[problem_pb2.Plan]:
        """Plan one or several layers; raises ServiceError."""
        request = self._solve(problems, policy, parameters)
        response: solver_pb2.SolveResponse = await self._call("solver", "Solve", request)
        return list(response.plans)

    async def solve_anytime(
        self, problem: Problem, policy: str = "", parameters: SolveParameters = DEFAULTS
    ) -> AsyncIterator[problem_pb2.Plan]:
        """Better and better plans of one layer; raises ServiceError."""
        request = self._anytime(problem, policy, parameters)
        call = self.solver.SolveAnytime(request, timeout=self._timeout_s, metadata=self._security.metadata)
        try:
            async for response in call:
                yield response.plan
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()

    async def evaluate(self, problem: Problem, layout: Layout, split_rule: str = "") -> problem_pb2.Plan:
        """Judge a layout; raises ServiceError."""
        request = self._evaluate(problem, layout, split_rule)
        response: solver_pb2.EvaluateResponse = await self._call("solver", "Evaluate", request)
        return response.plan

    async def policies(self) -> list[solver_pb2.Policy]:
        """The policies that the server knows; raises ServiceError."""
        request = solver_pb2.ListPoliciesRequest()
        response: solver_pb2.ListPoliciesResponse = await self._call("solver", "ListPolicies", request)
        return list(response.policies)

    async def create_job(self, job_id: str, job: job_pb2.Job) -> job_pb2.Job:
        """Create a job; repeating it is harmless; raises ServiceError."""
        request = planner_pb2.CreateJobRequest(job_id=job_id, job=job)
        response: planner_pb2.CreateJobResponse = await self._call("planner", "CreateJob", request)
        return response.job

    async def job(self, name: str) -> job_pb2.Job:
        """Read a job; raises ServiceError."""
        request = planner_pb2.GetJobRequest(name=name)
        response: planner_pb2.GetJobResponse = await self._call("planner", "GetJob", request)
        return response.job

    async def jobs(self) -> AsyncIterator[job_pb2.Job]:
        """All jobs, page by page; raises ServiceError."""
        token = ""
        while True:
            request = planner_pb2.ListJobsRequest(page_token=token)
            response: planner_pb2.ListJobsResponse = await self._call("planner", "ListJobs", request)
            for job in response.jobs:
                yield job
            token = response.next_page_token
            if not token:
                return

    async def delete_job(self, name: str) -> None:
        """Delete a job; raises ServiceError."""
        await self._call("planner", "DeleteJob", planner_pb2.DeleteJobRequest(name=name))

    async def plan(self, name: str) -> job_pb2.JobPlan:
        """Read a plan, ``jobs/{job}/plans/{version}`` or ``jobs/{job}/plans/-``; raises ServiceError."""
        request = planner_pb2.GetPlanRequest(name=name)
        response: planner_pb2.GetPlanResponse = await self._call("planner", "GetPlan", request)
        return response.plan

    async def watch_plans(self, job: str, after_version: int = 0) -> AsyncIterator[job_pb2.JobPlan]:
        """The plan whenever there is a newer one, for ever; raises ServiceError."""
        request = planner_pb2.WatchPlansRequest(job=job, after_version=after_version)
        call = self.planner.WatchPlans(request, metadata=self._security.metadata)
        try:
            async for response in call:
                yield response.plan
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()
