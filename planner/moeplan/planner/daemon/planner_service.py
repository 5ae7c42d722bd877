"""The planner service: between streams and jobs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from moeplan.api import wire
from moeplan.api.jobs import JobStatus, check_incarnation
from moeplan.planner.daemon.interceptor import refusal_for
from moeplan.planner.daemon.job_host import JobHost, RankStream
from moeplan.planner.daemon.job_table import JobTable, described, job_id, stale, unreadable
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.settings import ServiceLimits
from moeplan.planner.daemon.statuses import (
    RefusalError,
    exhausted,
    exists,
    invalid,
    missing,
    precondition,
    unavailable,
)
from moeplan.planner.daemon.store import JobRow, Store
from moeplan.planner.daemon.tenants import CALLER
from moeplan.planner.jobs.job import RankTakenError, StaleIncarnationError
from moeplan.planner.jobs.messages import ReportReader
from moeplan.v1 import job_pb2, planner_pb2, planner_pb2_grpc

__all__ = ["PlannerService"]

PAGE, LARGEST_PAGE = 100, 1_000
LONGEST_REASON = 1_000
LONGEST_SESSION = 64
MAX_STEP = 2**53

Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger()


class PlannerService(planner_pb2_grpc.PlannerServiceServicer):
    """moeplan.v1.PlannerService.

    A change that has begun is finished although its caller goes away: once it is on disk, it must be known here too.
    """

    def __init__(self, table: JobTable, store: Store, metrics: Metrics, limits: ServiceLimits, owner: str) -> None:
        self._table, self._store, self._metrics, self._limits, self._owner = table, store, metrics, limits, owner
        self._numbers = itertools.count(1)
        self._open = 0
        self._streams: Counter[str] = Counter()
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Tell every stream to go elsewhere, and end it."""
        self._draining.set()
        for host in self._table.hosts:
            host.close(unavailable("DRAINING", "the server is about to end; connect again", 0.5))

    async def CreateJob(  # noqa: N802
        self, request: planner_pb2.CreateJobRequest, context: Context
    ) -> planner_pb2.CreateJobResponse:
        """Create a job."""
        CALLER.get().tenant.check_job(request.job_id)
        host = await asyncio.shield(self._table.create(request.job_id, request.job))
        return planner_pb2.CreateJobResponse(job=self._job(host))

    async def GetJob(  # noqa: N802
        self, request: planner_pb2.GetJobRequest, context: Context
    ) -> planner_pb2.GetJobResponse:
        """Read a job, whoever owns it."""
        identity = _own("name", request.name)
        host = self._table.owned(identity)
        if host is not None:
            return planner_pb2.GetJobResponse(job=self._job(host))
        row = await self._store.job(identity)
        if row is None:
            raise missing(request.name, "moeplan.v1/Job")
        stored = _stored(row)
        if stored is None or self._table.unreadable(identity) is not None:
            raise unreadable(row)
        return planner_pb2.GetJobResponse(job=stored)

    async def ListJobs(  # noqa: N802
        self, request: planner_pb2.ListJobsRequest, context: Context
    ) -> planner_pb2.ListJobsResponse:
        """List jobs, whoever owns them; those that cannot be read are left out."""
        if request.page_size < 0:
            raise invalid("page_size", request.page_size, "must be at least 0")
        size = min(request.page_size or PAGE, LARGEST_PAGE)
        # A page is as long as asked for, unless its jobs are so large that a message would not hold them.
        prefix = CALLER.get().tenant.prefix
        rows = await self._store.jobs(_after(request.page_token), size, self._limits.message_bytes // 2, prefix)
        jobs = []
        for row in rows:
            host = self._table.owned(row.name)
            if host is not None:
                jobs.append(self._job(host))
            elif self._table.unreadable(row.name) is None:
                stored = _stored(row)
                jobs += [] if stored is None else [stored]
        more = rows and await self._store.jobs(rows[-1].name, 1, 0, prefix)
        token = base64.urlsafe_b64encode(rows[-1].name.encode()).decode() if more else ""
        return planner_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def DeleteJob(  # noqa: N802
        self, request: planner_pb2.DeleteJobRequest, context: Context
    ) -> planner_pb2.DeleteJobResponse:
        """Delete a job."""
        await asyncio.shield(self._table.delete(_own("name", request.name)))
        log.info("job deleted", job=request.name)
        return planner_pb2.DeleteJobResponse()

    async def GetPlan(  # noqa: N802
        self, request: planner_pb2.GetPlanRequest, context: Context
    ) -> planner_pb2.GetPlanResponse:
        """Read a plan, whoever owns the job."""
        job, _, version = request.name.partition("/plans/")
        identity = _own("name", job)
        host = self._table.owned(identity)
        if version != "-" and not (version.isascii() and version.isdecimal() and 0 < int(version[:19]) < 2**63):
            raise invalid("name", request.name, "must be jobs/{job}/plans/{version}, the version a number from 1, or -")
        if host is not None and version in ("-", str(host.job.plan.version)):
            return planner_pb2.GetPlanResponse(plan=host.plan_after(0))
        row = await self._store.plan(identity, None if version == "-" else int(version))
        if row is None:
            raise missing(request.name, "moeplan.v1/JobPlan")
        try:
            return planner_pb2.GetPlanResponse(plan=job_pb2.JobPlan.FromString(row.plan))
        except DecodeError:
            raise precondition("PLAN_UNREADABLE", f"what is stored of {request.name} cannot be read") from None

    async def WatchPlans(  # noqa: N802
        self, request: planner_pb2.WatchPlansRequest, context: Context
    ) -> AsyncIterator[planner_pb2.WatchPlansResponse]:
        """Send the plan whenever there is a newer one."""
        with self._stream("watch"):
            host = await self._table.get(_own("job", request.job))
            sent = request.after_version
            changed = host.watch()
            try:
                while True:
                    changed.clear()
                    host.check()
                    if host.job.plan.version > sent:
                        response = planner_pb2.WatchPlansResponse(plan=host.plan_after(sent))
                        sent = host.job.plan.version
                        self._metrics.plan_bytes.inc(response.ByteSize())
                        yield response
                    else:
                        await changed.wait()
            finally:
                host.unwatch(changed)

    async def StreamRank(  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> AsyncIterator[Any]:
        """Take statistics in, give plans out: a `StreamRankResponse` each, or its bytes.

        Requests are read from the context: the iterator over them costs more, for each of them.
        """
        with self._stream("rank"):
            hello = await self._hello(context)
            host = await self._table.get(_own("hello.job", hello.job))
            ranks = _ranks(hello, host.job.spec.ranks)
            stream = RankStream(next(self._numbers))
            try:
                await host.join(stream, hello.incarnation, ranks, hello.session)
            except StaleIncarnationError as error:
                raise stale(error) from None
            except RankTakenError as error:
                raise exists(f"{host.name} rank {error.rank}", "RANK_TAKEN", str(error)) from None
            host.traces.joined(stream.number, min(ranks), context.invocation_metadata() or ())
            reader = asyncio.get_running_loop().create_task(self._read(context, host, stream, ranks))
            try:
                sent = host.job.plan.version
                welcome = planner_pb2.Welcome(
                    plan=host.plan_after(hello.plan_version), credit=self._limits.unacknowledged
                )
                yield planner_pb2.StreamRankResponse(welcome=welcome)
                while True:
                    await stream.wake.wait()
                    stream.wake.clear()
                    if stream.ending is not None:
                        if self._draining.is_set():
                            yield planner_pb2.StreamRankResponse(drain=planner_pb2.Drain(reason="shutdown"))
                        raise stream.ending
                    if host.job.plan.version > sent:
                        # Whatever came between is left out: only the newest layouts matter.
                        update = host.update_after(sent)
                        sent = host.job.plan.version
                        self._metrics.plan_bytes.inc(len(update))
                        yield update
                        host.traces.sent(sent)
                    if stream.taken > stream.acknowledged and (stream.left or self._due(stream)):
                        stream.acknowledged = stream.taken
                        acknowledgement = planner_pb2.Acknowledgement(sequence=stream.taken)
                        yield planner_pb2.StreamRankResponse(acknowledgement=acknowledgement)
                    if stream.left:
                        return
            finally:
                reader.cancel()
                host.leave(stream)

    def _due(self, stream: RankStream) -> bool:
        return stream.taken - stream.acknowledged >= self._limits.unacknowledged // 2

    @contextlib.contextmanager
    def _stream(self, kind: str) -> Iterator[None]:
        if self._draining.is_set():
            raise unavailable("DRAINING", "the server is about to end; connect again", 0.5)
        if self._open >= self._limits.streams:
            raise exhausted(
                "STREAMS", f"{self._open} streams are open (limits.streams); let one rank of a node report for all", 5
            )
        tenant = CALLER.get().tenant
        if tenant.streams is not None and self._streams[tenant.name] >= tenant.streams:
            raise exhausted(
                "TENANT_STREAMS",
                f"{tenant.name} has {tenant.streams} streams open (streams of its tenant); let one rank of a node "
                "report for all",
                5,
            )
        self._open += 1
        self._streams[tenant.name] += 1
        self._metrics.streams.labels(kind).inc()
        try:
            yield
        finally:
            self._open -= 1
            self._streams[tenant.name] -= 1
            self._metrics.streams.labels(kind).dec()

    async def _hello(self, context: Context) -> planner_pb2.Hello:
        try:
            async with asyncio.timeout(self._limits.hello_s):
                first = await context.read()
        except TimeoutError:
            raise RefusalError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {self._limits.hello_s} s (limits.hello_s)"
            ) from None
        if first is grpc.aio.EOF:
            raise invalid("message", "none", "the first message must be a hello")
        if first.WhichOneof("message") != "hello":
            raise invalid("message", first.WhichOneof("message") or "empty", "the first message must be a hello")
        return first.hello

    async def _read(self, context: Context, host: JobHost, stream: RankStream, ranks: tuple[int, ...]) -> None:
        reader = ReportReader(host.job.spec, ranks)
        try:
            while not stream.left:
                request = await context.read()
                if stream.ending is not None:  # of a job that has begun anew, it may be; in another shape
                    return
                if request is grpc.aio.EOF:
                    # The client half-closed, or is gone: only a leave would have been its own end.
                    stream.end(RefusalError(grpc.StatusCode.CANCELLED, "the stream ended without a leave"))
                    return
                if request.WhichOneof("message") == "statistics":
                    self._report(request.statistics, host, stream, reader)
                else:
                    await self._take(request, host, stream)
        except Exception as error:  # of the store, too, where a rank cannot run a plan
            stream.end(refusal_for(error, "StreamRank"))
        finally:
            stream.wake.set()

    def _report(
        self, statistics: planner_pb2.Statistics, host: JobHost, stream: RankStream, reader: ReportReader
    ) -> None:
        if not stream.taken < statistics.sequence <= MAX_STEP:
            raise invalid("statistics.sequence", statistics.sequence, f"must be above the last one ({stream.taken})")
        host.report(reader.read(statistics), len(statistics.tokens.data))
        stream.taken = statistics.sequence
        if self._due(stream):
            stream.wake.set()

    async def _take(self, request: planner_pb2.StreamRankRequest, host: JobHost, stream: RankStream) -> None:
        match request.WhichOneof("message"):
            case "applied":
                host.applied(request.applied.version)
            case "failed":
                failed = request.failed
                undone = host.apply_failed(failed.version, failed.in_force_version, failed.reason[:LONGEST_REASON])
                await asyncio.shield(undone)
            case "leave":
                stream.left = True
            case other:
                raise invalid("message", other or "empty", "must be statistics, applied, failed or leave")

    def _job(self, host: JobHost) -> job_pb2.Job:
        job = host.job
        status = JobStatus(
            plan_version=job.plan.version,
            connected_ranks=job.connected_ranks,
            closed_step=job.closed_step,
            applied_version=job.applied_version,
            decision=job.decision,
            statistics=job.count,
            owner=self._owner,
            silent_ranks=tuple(job.silent_ranks),
            late_ranks=tuple(job.late_ranks),
            saved_s=job.saved_s,
            failure=job.failure,
        )
        return _with_status(host.message, host.name, job.incarnation, host.created, status)


def _own(field: str, name: str) -> str:
    """The id in a job's name, if whoever calls may use it."""
    identity = job_id(field, name)
    CALLER.get().tenant.check_job(identity)
    return identity


def _stored(row: JobRow) -> job_pb2.Job | None:
    """A job that another daemon owns, which checks all of it; None where it is clearly no job."""
    try:
        message = described(job_pb2.Job.FromString(row.spec))
    except DecodeError:
        return None
    if not (message.layers and message.experts and message.cluster.slots):
        return None
    status = JobStatus(plan_version=row.version, owner=row.address)
    return _with_status(message, f"jobs/{row.name}", row.incarnation, datetime.fromtimestamp(row.created, UTC), status)


def _with_status(
    message: job_pb2.Job, name: str, incarnation: int, created: datetime, status: JobStatus
) -> job_pb2.Job:
    """A job as its owner described it, whatever that says, with what the server knows."""
    whole = job_pb2.Job()
    whole.CopyFrom(message)
    whole.name, whole.incarnation = name, incarnation
    whole.create_time.CopyFrom(wire.write_time(created))
    whole.status.CopyFrom(wire.write_status(status))
    return whole


def _after(token: str) -> str:
    try:
        return base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError):
        raise invalid("page_token", token, "must be the next_page_token of the page before") from None


def _ranks(hello: planner_pb2.Hello, ranks: int) -> tuple[int, ...]:
    check_incarnation("hello.incarnation", hello.incarnation)
    if len(hello.session) > LONGEST_SESSION:
        raise invalid("hello.session", hello.session, f"must be at most {LONGEST_SESSION} characters")
    if not 0 <= hello.rank < ranks:
        raise invalid("hello.rank", hello.rank, f"must be 0..{ranks - 1}")
    chosen = tuple(hello.reports_for) or (hello.rank,)
    for rank in chosen:
        if not 0 <= rank < ranks:
            raise invalid("hello.reports_for", rank, f"must be 0..{ranks - 1}")
    if len(set(chosen)) != len(chosen):
        raise invalid("hello.reports_for", list(chosen)[:16], "must not repeat")
    return chosen
