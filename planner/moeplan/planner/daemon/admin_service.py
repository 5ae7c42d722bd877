"""The service for operators: jobs are moved between the daemons of a shared store."""

from __future__ import annotations

from typing import Any

import grpc

from moeplan.planner.daemon.job_table import JobTable, job_id
from moeplan.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["AdminService"]

Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """moeplan.v1.AdminService."""

    def __init__(self, table: JobTable) -> None:
        self._table = table

    async def MoveJob(  # noqa: N802
        self, request: admin_pb2.MoveJobRequest, context: Context
    ) -> admin_pb2.MoveJobResponse:
        """Give a job to another daemon."""
        address = await self._table.move(job_id("name", request.name), request.address)
        return admin_pb2.MoveJobResponse(address=address)

    async def Drain(  # noqa: N802
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """Give all jobs to others, and take no more; or take some again."""
        if request.end:
            await self._table.undrain()
            return admin_pb2.DrainResponse()
        return admin_pb2.DrainResponse(moved=await self._table.drain())

    async def ListServers(  # noqa: N802
        self, request: admin_pb2.ListServersRequest, context: Context
    ) -> admin_pb2.ListServersResponse:
        """List the daemons behind the store."""
        return admin_pb2.ListServersResponse(
            servers=[
                admin_pb2.Server(
                    address=server.address, version=server.version, jobs=server.jobs, draining=server.draining
                )
                for server in await self._table.servers()
            ]
        )
