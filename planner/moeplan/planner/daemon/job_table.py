"""The jobs that this daemon owns, and the way to those that others own."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from moeplan.api import wire
from moeplan.api.jobs import JOB_ID, JOB_ID_RULE, JobSpec
from moeplan.planner.daemon.database import StoreError
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
from moeplan.planner.daemon.store import CLAIMED, VERSION, JobRow, PlanRow, ServerRow, Store
from moeplan.planner.daemon.tenants import CALLER
from moeplan.planner.daemon.traces import Traces
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.jobs.job import KEPT_PLANS, PlanningJob, StaleIncarnationError
from moeplan.planner.jobs.job_plan import initial_plan
from moeplan.solvers.problem.errors import ProblemError
from moeplan.v1 import job_pb2

__all__ = ["JobTable", "job_id"]

SLACK, SLACK_FRACTION = 8, 0.25
"""Jobs above the mean that a daemon keeps, at least and of the mean: to move one costs it its window."""

MOVED = 32
"""Jobs that are given away at a time, so that others see how many there are before more come."""

LAYER_BYTES = 1_024
"""A layer of a plan in a message, beside its layout."""

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

    def __init__(
        self, settings: Settings, store: Store, workers: Workers, metrics: Metrics, traces: Traces, address: str
    ) -> None:
        self._address = address
        self._traces = traces
        self._draining = False
        self._settings, self._store, self._workers, self._metrics = settings, store, workers, metrics
        self._hosts: dict[str, JobHost] = {}
        self._unreadable: dict[str, JobRow] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._held_until = time.monotonic() + settings.lease_s
        self._creating = asyncio.Lock()

    async def start(self) -> None:
        """Take over the jobs that nobody owns, and keep doing so.

        Raises:
            StoreError: the store does not answer.
        """
        await self._claim()
        await self._renew()
        # Apart, so that a lease never waits for statements about jobs that this daemon does not have.
        self._tasks = [asyncio.create_task(self._again(work)) for work in (self._keep, self._share)]

    async def stop(self, refusal: RefusalError) -> None:
        """End all jobs here; they stay in the store."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for identity in list(self._hosts):
            self._drop(identity, refusal)

    async def create(self, identity: str, job: job_pb2.Job) -> JobHost:
        """A new job, an old one repeated, or a later incarnation of it.

        Raises:
            RefusalError: the job is invalid, is someone else's, or is one too many.
            StoreError: it could not be kept.
        """
        if not JOB_ID.fullmatch(identity):
            raise invalid("job_id", identity, JOB_ID_RULE)
        spec = await asyncio.to_thread(self._read, job)  # the first time, it loads every policy
        message = described(job)
        async with self._creating:
            host = await self._find(identity)
            if host is None:
                if self._draining:
                    raise unavailable("DRAINING", "this daemon takes no more jobs; use another one", 0.5)
                broken = self._unreadable.get(identity)
                if broken is not None and message.incarnation <= broken.incarnation:
                    raise unreadable(broken)
                return await self._create(identity, message, spec, broken)
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
            if identity in self._unreadable:
                raise unreadable(self._unreadable[identity])
            raise missing(f"jobs/{identity}", "moeplan.v1/Job")
        return host

    async def delete(self, identity: str) -> None:
        """Forget a job.

        Raises:
            RefusalError: it does not exist, or another daemon owns it.
            StoreError: the store failed; the job stays.
        """
        async with self._creating:
            if await self._find(identity) is None and identity not in self._unreadable:
                raise missing(f"jobs/{identity}", "moeplan.v1/Job")
            await self._store.delete(identity)
            self._drop(identity, missing(f"jobs/{identity}", "moeplan.v1/Job"))

    async def servers(self) -> list[ServerRow]:
        """The daemons behind the store, this one too."""
        found = await self._store.servers()
        return found or [ServerRow(self._address, VERSION, False, len(self._hosts), 0)]

    async def move(self, identity: str, address: str) -> str:
        """Give a job to another daemon, with `address` empty to the one with the fewest; its address.

        Raises:
            RefusalError: this daemon does not own it, or there is no such daemon.
            StoreError: it could not be given.
        """
        host = await self.get(identity)
        others = await self._others()
        chosen = next((server.address for server in others if address in ("", server.address)), None)
        if chosen is None:
            raise precondition(
                "NO_SERVER", f"address = {address[:256]}: no other daemon there takes jobs; see `moeplan admin servers`"
            )
        if not await self._give([host], chosen):
            raise unavailable("OWNED_ELSEWHERE", f"{host.name} is another daemon's by now", 0.2)
        return chosen

    async def drain(self) -> int:
        """Give all jobs to other daemons, and take no more; how many were given.

        Raises:
            RefusalError: no other daemon takes jobs.
            StoreError: the store failed.
        """
        others = await self._others()
        if not others:
            raise precondition("NO_SERVER", "no other daemon behind this store takes jobs; start one first")
        self._draining = True
        await self._renew()
        return await self._spread(self.hosts, others, math.inf)

    async def undrain(self) -> None:
        """Take jobs again."""
        self._draining = False
        await self._renew()

    async def _others(self) -> list[ServerRow]:
        """Daemons that take jobs, those with the fewest first."""
        servers = [s for s in await self._store.servers() if s.address != self._address and not s.draining]
        return sorted(servers, key=lambda server: server.jobs)

    async def _spread(self, hosts: list[JobHost], others: list[ServerRow], most: float) -> int:
        """Give jobs to the daemons that have the fewest, none of which gets above `most`; how many were given."""
        load = [(server.jobs, server.address) for server in others]
        heapq.heapify(load)
        shares: dict[str, list[JobHost]] = {}
        for host in hosts:
            jobs, address = load[0]
            if jobs >= most:
                break
            shares.setdefault(address, []).append(host)
            heapq.heapreplace(load, (jobs + 1, address))
        return sum([await self._give(share, address) for address, share in shares.items()])

    async def _give(self, hosts: list[JobHost], address: str) -> int:
        """Give jobs to another daemon, with the plans that are being written; how many were still here to give."""
        async with contextlib.AsyncExitStack() as written:
            for host in sorted(hosts, key=lambda host: host.id):  # the same order for all who give
                await written.enter_async_context(host.writing)
            given = await self._store.hand_over({host.id for host in hosts}, address)
            for identity in sorted(given & self._hosts.keys()):
                moved = unavailable("OWNED_ELSEWHERE", f"jobs/{identity} has moved to {address}", 0.05, owner=address)
                self._drop(identity, moved)
                log.info("job given", job=f"jobs/{identity}", to=address)
        return len(given)

    async def _rebalance(self) -> None:
        """Give away what this daemon has too many of, a few at a time; while it drains, everything."""
        others = await self._others()
        if not others:
            return
        if self._draining:
            await self._spread(self.hosts, others, math.inf)
            return
        mean = (len(self._hosts) + sum(server.jobs for server in others)) / (len(others) + 1)
        surplus = len(self._hosts) - math.ceil(mean)
        if surplus > max(SLACK, mean * SLACK_FRACTION):
            # One that has not taken what it was given may be dead: no more for it.
            taking = [server for server in others if not server.untaken]
            if taking:
                # First those that lose the least: who is planning would have to begin again.
                hosts = sorted(self.hosts, key=lambda host: (host.job.solving, host.job.connected_ranks))
                await self._spread(hosts[: min(surplus, MOVED)], taking, mean)

    def owned(self, identity: str) -> JobHost | None:
        """The job, if this daemon owns it."""
        return self._hosts.get(identity)

    def unreadable(self, identity: str) -> JobRow | None:
        """The row of a job of this daemon that cannot be read."""
        return self._unreadable.get(identity)

    @property
    def failure(self) -> str:
        """Why jobs cannot be kept now; empty where they can."""
        if not self._tasks or any(task.done() for task in self._tasks):
            return "leases are not kept"
        if self._store.shared and time.monotonic() > self._held_until:
            return "leases are over"
        return self._store.failure

    @property
    def hosts(self) -> list[JobHost]:
        """All jobs that this daemon owns."""
        return list(self._hosts.values())

    @property
    def _total(self) -> int:
        return sum(_bytes(host.job.spec) for host in self._hosts.values())

    def _read(self, job: job_pb2.Job) -> JobSpec:
        # With the compiler, which no start waits for.
        from moeplan.solvers.exact.run import require
        from moeplan.solvers.policies.registry import find

        spec = wire.read_job_spec(job)
        try:
            policy = find(spec.policy)
        except ProblemError as error:
            raise invalid("job.policy", spec.policy, error.reason) from None
        require(spec.parameters.solver)
        if spec.max_moves is not None and "max_moves" not in policy.honours:
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

    async def _create(self, identity: str, message: job_pb2.Job, spec: JobSpec, broken: JobRow | None) -> JobHost:
        count, limit = await self._store.count(), self._settings.limits.jobs
        if count >= limit:
            raise exhausted("JOBS", f"there are {count} jobs already (limits.jobs = {limit}); delete some", 60)
        tenant = CALLER.get().tenant
        if tenant.jobs is not None and (count := await self._store.count(tenant.prefix)) >= tenant.jobs:
            raise exhausted(
                "TENANT_JOBS", f"{tenant.name} has {count} jobs already (jobs = {tenant.jobs}); delete some", 60
            )
        self._make_room(_bytes(spec))
        version = 1 if broken is None else broken.version + 1
        first = replace(initial_plan(spec, version, message.incarnation), created=datetime.now(UTC))
        saved = wire.write_job_plan(f"jobs/{identity}", first).SerializeToString()
        created = await self._store.create(
            identity,
            message.incarnation,
            message.SerializeToString(),
            first.version,
            saved,
            replace=broken is not None,
        )
        self._unreadable.pop(identity, None)
        if identity in self._hosts:  # found in the store before this was told that it is there
            return self._hosts[identity]
        log.info("job created", job=f"jobs/{identity}", layers=spec.layers, experts=spec.experts, ranks=spec.ranks)
        return self._add(identity, message, created, PlanningJob(spec, message.incarnation, first))

    async def _find(self, identity: str) -> JobHost | None:
        host = self._hosts.get(identity)
        if host is not None or not self._store.shared:
            return host
        row = await self._store.job(identity)
        if row is None:
            return None
        if not self._draining:
            self._adopt(await self._store.claim(self._held, identity))
        host = self._hosts.get(identity)
        if host is None and identity not in self._unreadable:
            raise elsewhere(row)
        return host

    @property
    def _held(self) -> set[str]:
        return self._hosts.keys() | self._unreadable.keys()

    async def _claim(self) -> None:
        """Take over what nobody owns."""
        while True:
            asked = time.monotonic()
            rows = await self._store.claim(self._held)
            if not self._held:
                self._held_until = asked + self._settings.lease_s
            self._adopt(rows)
            if len(rows) < CLAIMED:
                return
            if self._left_s < self._settings.lease_s * 3 / 4:
                await self._renew()

    def _make_room(self, more: int) -> None:
        limit = self._settings.limits.total_bytes
        if self._total + more > limit:
            raise exhausted("MEMORY", f"jobs would take {self._total + more} bytes (limits.total_bytes = {limit})", 60)
        tenant = CALLER.get().tenant
        if tenant.memory_bytes is not None:
            own = sum(_bytes(host.job.spec) for host in self.hosts if tenant.owns(host.id)) + more
            if own > tenant.memory_bytes:
                raise exhausted(
                    "TENANT_MEMORY",
                    f"jobs of {tenant.name} would take {own} bytes (memory_bytes = {tenant.memory_bytes}); take fewer "
                    "steps in a window, or delete some",
                    60,
                )

    def _add(self, identity: str, message: job_pb2.Job, created: float, job: PlanningJob) -> JobHost:
        host = JobHost(
            identity,
            message,
            datetime.fromtimestamp(created, UTC),
            job,
            workers=self._workers,
            store=self._store,
            metrics=self._metrics,
            traces=self._traces.of(f"jobs/{identity}"),
        )
        self._hosts[identity] = host
        self._show()
        return host

    def _drop(self, identity: str, refusal: RefusalError) -> None:
        self._unreadable.pop(identity, None)
        host = self._hosts.pop(identity, None)
        if host is not None:
            host.count()
            host.close(refusal)
        self._show()

    def _show(self) -> None:
        self._metrics.jobs.set(len(self._hosts))
        self._metrics.unreadable.set(len(self._unreadable))
        self._metrics.window_bytes.set(self._total)

    def _adopt(self, rows: list[tuple[JobRow, PlanRow | None]]) -> None:
        for row, stored in rows:
            if row.name in self._hosts:
                continue
            try:
                message, job = read_job(row, stored)
            except Exception as error:  # whatever the row holds, the other jobs go on
                if row.name not in self._unreadable:
                    log.error(
                        "job not readable", job=f"jobs/{row.name}", error=f"{type(error).__name__}: {error}"[:500]
                    )
                self._unreadable[row.name] = row
                self._show()
                continue
            self._unreadable.pop(row.name, None)
            self._add(row.name, message, row.created, job)
            log.info("job taken over", job=f"jobs/{row.name}", version=job.plan.version)

    async def _keep(self) -> None:
        """Keep what this daemon has."""
        await self._renew()
        if self._store.failure:
            await self._store.probe()

    async def _share(self) -> None:
        """Take over jobs, and give some away."""
        if not self._draining:
            await self._claim()
        if self._store.shared:
            await self._rebalance()

    async def _again(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do something four times within a lease, whatever comes of it."""
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._settings.lease_s / 4, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            try:
                await work()
            except StoreError as error:
                log.error("store failed", error=str(error))
            except Exception as error:  # leases are kept all the same
                log.error("leases not kept", exc_info=error)

    async def _renew(self) -> None:
        """Renew the leases, and let go of the jobs whose lease is lost, or is over by this daemon's own clock."""
        asked = time.monotonic()
        before = self._held
        try:
            # Nobody says how long a store may take to answer, and a lease ends whether it answers or not.
            async with asyncio.timeout(self._left_s if self._store.shared else None):
                owned = await self._store.renew(self._draining)
            self._held_until = asked + self._settings.lease_s
        except (TimeoutError, StoreError) as error:
            if self._store.shared and time.monotonic() >= self._held_until:
                for identity in before:
                    self._lose(identity, "its lease could not be renewed")
            raise error if isinstance(error, StoreError) else StoreError("leases were not renewed in time") from None
        finally:
            self._metrics.lease_age.set(time.monotonic() - self._held_until + self._settings.lease_s)
        # Before anything is claimed: a job may come straight back, and its old streams must not outlive its loss.
        for identity in before - owned:
            self._lose(identity, "another daemon took it over")
        for host in self.hosts:
            if host.lost:  # a plan was refused: what is in the store is newer than what is here
                self._lose(host.id, "its newest plan is not the one here")

    @property
    def _left_s(self) -> float:
        """Time for which the jobs here are certainly this daemon's; without jobs there is nothing to lose."""
        return max(0.0, self._held_until - time.monotonic()) if self._held else self._settings.lease_s

    def _lose(self, identity: str, why: str) -> None:
        if identity in self._hosts or identity in self._unreadable:
            log.warning("job lost", job=f"jobs/{identity}", why=why)
            self._drop(
                identity, unavailable("OWNED_ELSEWHERE", f"jobs/{identity} is no longer served here: {why}", 0.2)
            )


def read_job(row: JobRow, stored: PlanRow | None) -> tuple[job_pb2.Job, PlanningJob]:
    """A job from what the store holds of it.

    Raises:
        ProblemError: it describes no job, or its plan is missing or of another job.
        DecodeError: it is no message.
    """
    message = job_pb2.Job.FromString(row.spec)
    message.incarnation = row.incarnation
    spec = wire.read_job_spec(message, checked=True)  # checking loads the compiler: longer than a lease
    if stored is None:
        raise ProblemError("plan", row.version, "is missing")
    plan = wire.read_stored_plan(job_pb2.JobPlan.FromString(stored.plan), spec.experts)
    if plan.version != row.version or [layer.layer for layer in plan.layers] != list(range(spec.layers)):
        raise ProblemError("plan", row.version, "is not a plan of all layers of that version")
    for layer in plan.layers:
        slots = layer.layout.slots
        if slots.ndim != 2 or len(slots) != spec.cluster.devices or not -1 <= slots.min() <= slots.max() < spec.experts:
            raise ProblemError(f"plan.layers[{layer.layer}].layout", slots.shape, "is no layout of the job")
    return message, PlanningJob(spec, row.incarnation, plan)


def _bytes(spec: JobSpec) -> int:
    """Most memory that a job takes here: its statistics, the plans that it remembers, and those written for streams."""
    return spec.window_bytes + (KEPT_PLANS + MOST_WRITTEN + 2) * spec.plan_bytes


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


def unreadable(row: JobRow) -> RefusalError:
    """A job is stored, but what is stored is damaged."""
    return precondition(
        "JOB_UNREADABLE",
        f"what is stored of jobs/{row.name} cannot be read (the log says why); delete it, or create it again with an "
        f"incarnation above {row.incarnation}",
    )


def elsewhere(row: JobRow) -> RefusalError:
    """Another daemon owns a job."""
    return unavailable(
        "OWNED_ELSEWHERE", f"jobs/{row.name} is owned by another daemon, at {row.address}", 0.2, owner=row.address
    )
