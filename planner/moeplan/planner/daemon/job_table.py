"""The jobs that this daemon owns, and the way to those that others own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from moeplan.api import wire
from moeplan.api.jobs import JobSpec
from moeplan.planner.daemon.job_host import MOST_WRITTEN, JobHost
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.settings import Settings
from moeplan.planner.daemon.statuses import (
    RefusalError,
    exhausted,
    exists,
    invalid,
    missing,
    precondition,
    unavailable,
)
from moeplan.planner.daemon.store import JobRow, PlanRow, Store, StoreError
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.jobs.job import KEPT_PLANS, PlanningJob, StaleIncarnationError
from moeplan.planner.jobs.job_plan import initial_plan
from moeplan.solvers import available_policies
from moeplan.solvers.problem.errors import ProblemError
from moeplan.v1 import job_pb2

__all__ = ["JobTable", "job_id"]

LAYER_BYTES = 1_024
"""A layer of a plan in a message, beside its layout."""

JOB_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

log = structlog.get_logger()


def job_id(field: str, name: str) -> str:
    """The id in a job's resource name.

    Raises:
        RefusalError: it is not the name of a job.
    """
    prefix, _, identity = name.partition("/")
    if prefix != "jobs" or not JOB_ID.fullmatch(identity):
        raise invalid(field, name, "must be jobs/{job}, the job 1 to 63 of a-z, 0-9 and -, beginning with a letter")
    return identity


class JobTable:
    """Jobs by id. `start` it before use, `stop` it after."""

    def __init__(self, settings: Settings, store: Store, workers: Workers, metrics: Metrics) -> None:
        self._settings, self._store, self._workers, self._metrics = settings, store, workers, metrics
        self._hosts: dict[str, JobHost] = {}
        self._leases: asyncio.Task[None] | None = None
        self._creating = asyncio.Lock()

    async def start(self) -> None:
        """Take over the jobs that nobody owns, and keep doing so.

        Raises:
            StoreError: the store does not answer.
        """
        await self._adopt(await self._store.claim())
        self._leases = asyncio.get_running_loop().create_task(self._keep_leases())

    async def stop(self, refusal: RefusalError) -> None:
        """End all jobs here; they stay in the store."""
        if self._leases is not None:
            self._leases.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._leases
        for identity in list(self._hosts):
            self._drop(identity, refusal)

    async def create(self, identity: str, job: job_pb2.Job) -> JobHost:
        """A new job, an old one repeated, or a later incarnation of it.

        Raises:
            RefusalError: the job is invalid, is someone else's, or is one too many.
            StoreError: it could not be kept.
        """
        if not JOB_ID.fullmatch(identity):
            raise invalid("job_id", identity, "must be 1 to 63 of a-z, 0-9 and -, beginning with a letter")
        spec = await asyncio.to_thread(self._read, job)  # the first time, it loads every policy
        message = described(job)
        async with self._creating:
            host = await self._find(identity)
            if host is None:
                return await self._create(identity, message, spec)
            if message.incarnation < host.job.incarnation:
                raise stale(StaleIncarnationError(message.incarnation, host.job.incarnation))
            known = job_pb2.Job()
            known.CopyFrom(host.message)
            known.incarnation = message.incarnation
            if known == message and message.incarnation == host.job.incarnation:
                return host
            if message.incarnation == host.job.incarnation:
                raise exists(
                    host.name, "JOB_DIFFERS", f"{host.name} exists and differs; give a later incarnation to replace it"
                )
            self._make_room(_bytes(spec) - _bytes(host.job.spec))
            await host.redefine(message, spec)
            self._show()
            return host

    async def get(self, identity: str) -> JobHost:
        """A job that this daemon owns.

        Raises:
            RefusalError: it does not exist, or another daemon owns it.
        """
        host = await self._find(identity)
        if host is None:
            raise missing(f"jobs/{identity}", "moeplan.v1/Job")
        return host

    async def delete(self, identity: str) -> None:
        """Forget a job.

        Raises:
            RefusalError: it does not exist, or another daemon owns it.
            StoreError: the store failed; the job stays.
        """
        async with self._creating:
            await self.get(identity)
            await self._store.delete(identity)
            self._drop(identity, missing(f"jobs/{identity}", "moeplan.v1/Job"))

    def owned(self, identity: str) -> JobHost | None:
        """The job, if this daemon owns it."""
        return self._hosts.get(identity)

    @property
    def hosts(self) -> list[JobHost]:
        """All jobs that this daemon owns."""
        return list(self._hosts.values())

    @property
    def _total(self) -> int:
        return sum(_bytes(host.job.spec) for host in self._hosts.values())

    def _read(self, job: job_pb2.Job) -> JobSpec:
        spec = wire.read_job_spec(job)
        known = available_policies()
        if spec.policy not in known:
            raise invalid("job.policy", spec.policy, f"must be one of {', '.join(known)}")
        if spec.max_moves is not None and "max_moves" not in known[spec.policy].honours:
            raise invalid("job.max_moves", spec.max_moves, f"policy {spec.policy} cannot limit moves; use hybrid")
        limit = self._settings.limits.job_bytes
        if spec.window_bytes > limit:
            raise invalid(
                "job.forecast.window_steps",
                spec.forecast.window_steps,
                f"layers x ranks x experts x steps take {spec.window_bytes} bytes, and the server allows {limit} "
                "(limits.job_bytes); take fewer steps, or merge_sources",
            )
        message, allowed = spec.plan_bytes + spec.layers * LAYER_BYTES, self._settings.limits.message_bytes
        if message > allowed:
            raise invalid(
                "job.cluster.slots",
                f"at most {spec.cluster.max_slots} on a device",
                f"a plan of layers x devices x most slots would take {message} bytes, and a message may have {allowed} "
                "(limits.message_bytes); give no device more slots than it fills",
            )
        return spec

    async def _create(self, identity: str, message: job_pb2.Job, spec: JobSpec) -> JobHost:
        count, limit = await self._store.count(), self._settings.limits.jobs
        if count >= limit:
            raise exhausted("JOBS", f"there are {count} jobs already (limits.jobs = {limit}); delete some", 60)
        self._make_room(_bytes(spec))
        first = replace(initial_plan(spec, 1, message.incarnation), created=datetime.now(UTC))
        saved = wire.write_job_plan(f"jobs/{identity}", first).SerializeToString()
        created = await self._store.create(
            identity, message.incarnation, message.SerializeToString(), first.version, saved
        )
        log.info("job created", job=f"jobs/{identity}", layers=spec.layers, experts=spec.experts, ranks=spec.ranks)
        return self._add(identity, message, created, PlanningJob(spec, message.incarnation, first))

    async def _find(self, identity: str) -> JobHost | None:
        host = self._hosts.get(identity)
        if host is not None or not self._store.shared:
            return host
        row = await self._store.job(identity)
        if row is None:
            return None
        await self._adopt(await self._store.claim(identity))
        host = self._hosts.get(identity)
        if host is None:
            raise elsewhere(row)
        return host

    def _make_room(self, more: int) -> None:
        limit = self._settings.limits.total_bytes
        if self._total + more > limit:
            raise exhausted("MEMORY", f"jobs would take {self._total + more} bytes (limits.total_bytes = {limit})", 60)

    def _add(self, identity: str, message: job_pb2.Job, created: float, job: PlanningJob) -> JobHost:
        host = JobHost(
            identity,
            message,
            datetime.fromtimestamp(created, UTC),
            job,
            workers=self._workers,
            store=self._store,
            metrics=self._metrics,
            solve_s=self._settings.limits.solve_s,
        )
        self._hosts[identity] = host
        self._show()
        return host

    def _drop(self, identity: str, refusal: RefusalError) -> None:
        host = self._hosts.pop(identity, None)
        if host is not None:
            host.count()
            host.close(refusal)
            self._show()

    def _show(self) -> None:
        self._metrics.jobs.set(len(self._hosts))
        self._metrics.window_bytes.set(self._total)

    async def _adopt(self, rows: list[tuple[JobRow, PlanRow]]) -> None:
        for row, stored in rows:
            message = job_pb2.Job.FromString(row.spec)
            message.incarnation = row.incarnation
            try:
                spec = wire.read_job_spec(message, checked=True)  # checking loads the compiler: longer than a lease
                plan = wire.read_stored_plan(job_pb2.JobPlan.FromString(stored.plan), spec.experts)
            except ProblemError as error:
                log.error("job not readable", job=f"jobs/{row.name}", error=str(error))
                continue
            job = PlanningJob(spec, row.incarnation, plan)
            self._add(row.name, message, row.created, job)
            log.info("job taken over", job=f"jobs/{row.name}", version=plan.version)

    async def _keep_leases(self) -> None:
        held_until = time.monotonic() + self._settings.lease_s
        while True:
            await asyncio.sleep(self._settings.lease_s / 4)
            asked = time.monotonic()
            before = set(self._hosts)
            try:
                owned = await self._store.renew()
                held_until = asked + self._settings.lease_s
                lost = [identity for identity in before if identity not in owned]
            except StoreError as error:
                log.error("leases not renewed", error=str(error))
                lost = list(self._hosts) if self._store.shared and time.monotonic() > held_until else []
            # Before anything is claimed: a job may come straight back, and its old streams must not outlive its loss.
            for identity in lost:
                log.warning("job lost to another daemon", job=f"jobs/{identity}")
                self._drop(identity, unavailable("OWNED_ELSEWHERE", f"jobs/{identity} went to another daemon", 0.2))
            if self._store.shared:
                try:
                    await self._adopt(await self._store.claim())
                except StoreError as error:
                    log.error("free jobs not claimed", error=str(error))


def _bytes(spec: JobSpec) -> int:
    """Most memory that a job takes here: its statistics, the plans that it remembers, and those written for streams."""
    return spec.window_bytes + (KEPT_PLANS + MOST_WRITTEN + 1) * spec.plan_bytes


def described(job: job_pb2.Job) -> job_pb2.Job:
    """A job without what the server sets."""
    message = job_pb2.Job()
    message.CopyFrom(job)
    for name in ("name", "create_time", "status"):
        message.ClearField(name)
    return message


def stale(error: StaleIncarnationError) -> RefusalError:
    """An earlier start of a job speaks."""
    return precondition("STALE_INCARNATION", str(error), newest=str(error.newest))


def elsewhere(row: JobRow) -> RefusalError:
    """Another daemon owns a job."""
    return unavailable(
        "OWNED_ELSEWHERE", f"jobs/{row.name} is owned by another daemon, at {row.address}", 0.2, owner=row.address
    )
