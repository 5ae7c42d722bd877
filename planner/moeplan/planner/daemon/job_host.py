"""One job in this daemon: drives its state machine with streams, workers, the clock and the store."""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog

from moeplan.api import wire
from moeplan.api.job_plans import JobPlan
from moeplan.api.jobs import JobSpec
from moeplan.planner.daemon.database import StoreError
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.statuses import RefusalError, precondition
from moeplan.planner.daemon.store import LeaseLostError, Store
from moeplan.planner.daemon.traces import JobTraces, part, passed
from moeplan.planner.daemon.workers.frames import Kind
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.jobs.job import PlanningJob, SolveTask
from moeplan.planner.jobs.job_plan import Candidate
from moeplan.planner.jobs.solve import LayersTask
from moeplan.planner.jobs.window import Report
from moeplan.solvers.problem.errors import ProblemError
from moeplan.v1 import job_pb2, planner_pb2

__all__ = ["JobHost", "RankStream"]

MOST_WRITTEN = 4
"""Forms of a plan that are kept written: streams that keep up all ask for the same one."""

UNUSED_S = 10.0
"""Time for which statistics may come without one that counts before the log says so, and between such lines."""

STALLED_S = 60.0
"""Time for which no step may close while ranks are connected."""

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class RankStream:
    """A stream of a rank.

    Attributes:
        number: Its number in this daemon.
        wake: Set when there is something to do: a plan, an acknowledgement, the end.
        ending: Status that the stream shall end with.
        left: The rank has said that it leaves.
        taken: Highest sequence number taken in.
        acknowledged: Highest one acknowledged.
    """

    number: int
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ending: RefusalError | None = None
    left: bool = False
    taken: int = 0
    acknowledged: int = 0

    def end(self, refusal: RefusalError) -> None:
        """End it with a status."""
        self.ending = self.ending or refusal
        self.wake.set()


class JobHost:
    """A job that this daemon owns.

    Attributes:
        name: Resource name.
        message: The job as its owner described it.
        created: When it was created.
        job: The state machine.
        writing: Held while a plan is decided and stored.
        ended: Why the job is no longer here.
        lost: A plan was refused, as the job is another daemon's.
        traces: How its plans come about, for OpenTelemetry.
    """

    def __init__(
        self,
        job_id: str,
        message: job_pb2.Job,
        created: datetime,
        job: PlanningJob,
        *,
        workers: Workers,
        store: Store,
        metrics: Metrics,
        traces: JobTraces,
    ) -> None:
        self.id, self.name = job_id, f"jobs/{job_id}"
        self.message, self.created, self.job = message, created, job
        self.streams: dict[int, RankStream] = {}
        self._watchers: set[asyncio.Event] = set()
        self._workers, self._store, self._metrics = workers, store, metrics
        self._solving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.writing = asyncio.Lock()
        self._counted = replace(job.count)
        self._messages = self._bytes = 0
        self._used_s = self._closed_s = time.monotonic()
        self._closed_step = job.closed_step
        self.ended: RefusalError | None = None
        self.lost = False
        self.traces = traces
        self._written: dict[int, job_pb2.JobPlan] = {}
        self._written_of: JobPlan | None = None
        self._update: tuple[JobPlan, int, bytes] | None = None

    # Streams

    async def join(self, stream: RankStream, incarnation: int, ranks: tuple[int, ...], session: str) -> None:
        """Let a stream report for ranks.

        Raises:
            StaleIncarnationError: it belongs to an earlier start.
            RankTakenError: a rank is connected by another session.
            StoreError: a later incarnation could not be kept.
        """
        if incarnation > self.job.incarnation:
            async with self.writing:
                await self._store.save(self.id, incarnation=incarnation)
        self.check()
        for number in self.job.join(stream.number, incarnation, ranks, session):
            replaced = self.streams.pop(number, None)
            if replaced is not None:
                replaced.end(
                    precondition("SUPERSEDED", "another stream took over: a later incarnation, or a reconnect")
                )
        self.streams[stream.number] = stream

    def leave(self, stream: RankStream) -> None:
        """A stream is over."""
        self.job.end(stream.number)
        self.traces.left(stream.number)
        self.streams.pop(stream.number, None)

    def check(self) -> None:
        """Raise RefusalError if the job is no longer here."""
        if self.ended is not None:
            raise self.ended

    def watch(self) -> asyncio.Event:
        """An event that is set whenever there is a new plan, or the end."""
        event = asyncio.Event()
        self._watchers.add(event)
        return event

    def unwatch(self, event: asyncio.Event) -> None:
        """Stop watching."""
        self._watchers.discard(event)

    def plan_after(self, version: int) -> job_pb2.JobPlan:
        """The plan with the layers newer than `version`; not to be changed."""
        if self._written_of is not self.job.plan:
            self._written, self._written_of = {}, self.job.plan
        found = self._written.get(version)
        if found is None:
            found = wire.write_job_plan(self.name, self.job.plan, version)
            if len(self._written) < MOST_WRITTEN:
                self._written[version] = found
        return found

    def update_after(self, version: int) -> bytes:
        """The same as the message that a stream sends, a `StreamRankResponse`.

        It is written once for all that hold the same version, as do those that keep up.
        """
        plan = self.job.plan
        if self._update is None or self._update[0] is not plan or self._update[1] != version:
            update = planner_pb2.PlanUpdate(plan=self.plan_after(version))
            self._update = plan, version, planner_pb2.StreamRankResponse(plan_update=update).SerializeToString()
        return self._update[2]

    # Events

    def report(self, report: Report, size: int) -> None:
        """Statistics came, in a message with `size` bytes of them."""
        self._messages += 1
        self._bytes += size
        self.traces.reported()
        self._act(self.job.report(report, time.monotonic()))

    def applied(self, version: int) -> None:
        """A rank runs a plan."""
        self.job.applied(version)
        self.traces.applied(version)

    async def apply_failed(self, version: int, in_force: int, detail: str) -> None:
        """A rank cannot run a plan: go back for all."""
        async with self.writing:
            plan = self.job.apply_failed(version, in_force, detail)
            if plan is not None:
                log.warning("plan not applied", job=self.name, version=version, in_force=in_force, detail=detail)
                await self._keep(plan)

    async def redefine(self, message: job_pb2.Job, spec: JobSpec) -> None:
        """A later incarnation describes the job anew: windows and streams begin again, versions go on."""
        async with self.writing:
            old = self.job
            plan = replace(old.plan, incarnation=message.incarnation)
            if not _same_shape(old.spec, spec):
                plan = PlanningJob.begin(spec, message.incarnation).plan
                version = old.plan.version + 1
                layers = tuple(replace(layer, version=version) for layer in plan.layers)
                plan = replace(plan, version=version, layers=layers, created=datetime.now(UTC))
            saved = wire.write_job_plan(self.name, plan).SerializeToString() if plan.version > old.plan.version else b""
            await self._store.save(
                self.id,
                incarnation=message.incarnation,
                spec=message.SerializeToString(),
                version=plan.version,
                plan=saved,
            )
            self._stop_work()
            self.message = message
            self.job = PlanningJob(spec, message.incarnation, plan)
            self._counted = replace(self.job.count)
            for stream in list(self.streams.values()):
                stream.end(precondition("SUPERSEDED", "a later incarnation of the job has begun"))
            self.streams.clear()
            self._announce()

    def close(self, refusal: RefusalError) -> None:
        """End the job in this daemon: its streams and watchers end with a status."""
        self.ended = refusal
        self._stop_work()
        for stream in list(self.streams.values()):
            stream.end(refusal)
        self._announce()

    def count(self) -> None:
        """Bring the metrics of statistics up to date, and say so where all of them are in vain."""
        if self.job.closed_step != self._closed_step or not self.streams:
            self._closed_step, self._closed_s = self.job.closed_step, time.monotonic()
        now = replace(self.job.count)
        wasted = now.late + now.early - self._counted.late - self._counted.early
        time_s = time.monotonic()
        if now.accepted > self._counted.accepted:
            self._used_s = time_s
        elif wasted and time_s - self._used_s >= UNUSED_S:
            self._used_s = time_s
            log.warning(
                "all statistics are late or early",
                job=self.name,
                closed_step=self.job.closed_step,
                late=now.late,
                early=now.early,
                do="give one incarnation's ranks the same step numbers; a restarted training needs a later incarnation",
            )
        self._metrics.statistics.inc(self._messages)
        self._metrics.statistics_bytes.inc(self._bytes)
        self._messages = self._bytes = 0
        for fate in ("accepted", "duplicate", "late", "missing", "early"):
            # A step that is dropped for an older one takes back what was accepted; a counter cannot.
            self._metrics.cells.labels(fate).inc(max(0, getattr(now, fate) - getattr(self._counted, fate)))
        self._counted = now

    @property
    def stalled(self) -> bool:
        """True if ranks are connected, and yet no step closes."""
        return bool(self.streams) and time.monotonic() - self._closed_s > STALLED_S

    def _stop_work(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._solving is not None:
            self._solving.cancel()
            self._solving = None

    def _act(self, task: SolveTask | None) -> None:
        if task is not None:
            self._solving = asyncio.get_running_loop().create_task(self._solve(task))
        if self._timer is None:
            self._set_timer()

    def _set_timer(self) -> None:
        due = self.job.next_timeout_s()
        if due is not None and self.ended is None:
            delay = max(due - time.monotonic(), 0.0) + 0.001
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._act(self.job.tick(time.monotonic()))

    # Planning

    async def _solve(self, task: SolveTask) -> None:
        with self.traces.look(task.step) as note:
            await self._look(task)
            decision = self.job.decision
            note(reason=decision.reason.value, changed_layers=decision.changed_layers, version=self.job.plan.version)
        self._solving = None
        self._act(self.job.tick(time.monotonic()))

    async def _look(self, task: SolveTask) -> None:
        start = time.monotonic()
        try:
            with part("solve", layers=len(task.layers), policy=task.policy):
                candidates = await self._candidates(task)
        except Exception as error:  # one that nothing foresaw, too, must not be the end of the job's plans
            known = isinstance(error, (RefusalError, ProblemError, RuntimeError))
            text = str(error) if known else repr(error)
            log.warning("solve failed", job=self.name, step=task.step, error=text[-2_000:])
            self.job.failed(task, text[:1_000])
            self._decided()
        else:
            await self._decide(task, candidates, time.monotonic() - start)
            if self.job.decision.changed_layers:
                self._metrics.plan_delay.observe(time.monotonic() - start)

    async def _candidates(self, task: SolveTask) -> list[Candidate]:
        """Solve the layers, in parallel where there are several workers."""
        chunks = min(self._workers.size, len(task.layers))
        limit_s = self._workers.solve_s
        if task.parameters.deadline_s is not None:
            limit_s = min(limit_s, task.parameters.deadline_s)
        end = time.monotonic() + limit_s

        def packed() -> list[bytes]:
            parts = [slice(first, None, chunks) for first in range(chunks)]
            tasks = (LayersTask(task.layers[p], task.outlooks[p], task.policy, task.parameters, end) for p in parts)
            return [pickle.dumps(part, 5) for part in tasks]

        payloads = await asyncio.to_thread(packed)
        left_s = end - time.monotonic()
        answers = await self._workers.run_all(
            Kind.LAYERS, payloads, limit_s=left_s, label="job", caller=self._workers.payer(self.id)
        )
        found: list[Candidate] = [candidate for answer in answers for candidate in pickle.loads(answer)]
        return sorted(found, key=lambda candidate: candidate.layer)

    async def _decide(self, task: SolveTask, candidates: list[Candidate], solve_s: float) -> None:
        for candidate in candidates:
            if self.job.plan.layers[candidate.layer].version > 1:
                self._metrics.imbalance_after.observe(candidate.imbalance_before)
        async with self.writing:
            plan = self.job.solved(task, candidates, solve_s)
            if plan is not None:
                await self._keep(plan)
            else:
                self._decided()

    async def _keep(self, plan: JobPlan) -> None:
        plan = replace(plan, created=datetime.now(UTC))
        whole = wire.write_job_plan(self.name, plan)
        start = time.monotonic()
        try:
            await self._store.save(
                self.id, incarnation=plan.incarnation, version=plan.version, plan=whole.SerializeToString()
            )
            passed("store", start)
        except StoreError as error:
            if self.ended is not None:  # deleted, or gone to another daemon, while it was solved
                return
            log.error("plan not stored", job=self.name, version=plan.version, error=str(error))
            self.job.not_stored(plan, str(error))
            self._decided()
            self.lost = self.lost or isinstance(error, LeaseLostError)
            return
        if self.job.commit(plan):
            self.traces.stored(plan.version)
            self._announce()
            try:
                await asyncio.sleep(0)  # the ranks first, then the log
            finally:
                self._metrics.planned(plan)
                self._decided()

    def _decided(self) -> None:
        decision = self.job.decision
        self._metrics.decisions.labels(decision.reason.value).inc()
        log.info(
            "decision",
            job=self.name,
            reason=decision.reason.value,
            step=decision.step,
            version=self.job.plan.version,
            changed_layers=decision.changed_layers,
            cost_before_s=decision.cost_before_s,
            cost_after_s=decision.cost_after_s,
            move_cost_s=decision.move_cost_s,
            solve_s=round(self.job.plan.solve_s, 6),
        )

    def _announce(self) -> None:
        for stream in self.streams.values():
            stream.wake.set()
        for event in self._watchers:
            event.set()


def _same_shape(old: JobSpec, new: JobSpec) -> bool:
    """True if layouts of one job suit the other."""
    return (
        old.layers == new.layers
        and old.experts == new.experts
        and old.cluster.slots.tobytes() == new.cluster.slots.tobytes()
        and old.cluster.node.tobytes() == new.cluster.node.tobytes()
        and old.initial == new.initial
    )
