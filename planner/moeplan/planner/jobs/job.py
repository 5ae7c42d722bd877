"""One job as a state machine: events in, solves and plans out. No clock, no thread, no network, no disk.

The daemon drives it from streams, a replay drives it from a trace; both run this code.

    report, tick ──> window ──(a step closes, a look is due)──> SolveTask
    SolveTask's answer ──> decision ──(worth it)──> JobPlan ──(the caller has stored it)──> commit
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from itertools import islice

from moeplan.api.job_plans import Decision, JobPlan, Reason
from moeplan.api.jobs import JobSpec, StatisticsCount
from moeplan.planner.jobs.job_plan import Candidate, back_to, decide, initial_plan
from moeplan.planner.jobs.outlook import LayerOutlook
from moeplan.planner.jobs.window import Report, Window
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.arrays import Int64

__all__ = ["PlanningJob", "RankTakenError", "SolveTask", "StaleIncarnationError"]

KEPT_PLANS = 16
"""Plans that a rank may still say are in force when it cannot apply a newer one."""


SHOWN_RANKS = 32
"""Ranks that are named where some are silent or late."""


class StaleIncarnationError(Exception):
    """Someone speaks for an earlier start of the job.

    Attributes:
        newest: The newest incarnation.
    """

    def __init__(self, given: int, newest: int) -> None:
        super().__init__(
            f"incarnation = {given}: the job is at {newest}; this rank belongs to an earlier start, end it"
        )
        self.newest = newest


class RankTakenError(Exception):
    """A rank is connected, by another process.

    Attributes:
        rank: The rank.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} is connected by another session; end that process or use another rank")
        self.rank = rank


@dataclass(frozen=True, slots=True, eq=False)
class SolveTask:
    """Layers to be forecast and solved, from one window.

    Attributes:
        ticket: Number of the task in its job; an answer with another one is out of date.
        step: Newest closed step in the window.
        window_steps: Closed steps in the longest of the layers' windows.
        layers: Layers, in order.
        outlooks: One for each of them.
        policy: Name of the policy.
        parameters: Limits for all of them together.
    """

    ticket: int
    step: int
    window_steps: int
    layers: tuple[int, ...]
    outlooks: tuple[LayerOutlook, ...]
    policy: str
    parameters: SolveParameters


@dataclass(slots=True)
class _Stream:
    session: str
    ranks: tuple[int, ...]


@dataclass(slots=True)
class PlanningJob:
    """A job's window, plan and streams.

    Attributes:
        spec: What the job is.
        incarnation: Newest start of the training that was seen.
        plan: The plan in force, or about to be.
        decision: The newest decision, also where it was to stay.
        applied_version: Newest version that a rank reported as applied.
        failure: The newest solve that failed; None if none did.
        saved_s: Predicted time that plans have saved: for each closed step, the cost with the layouts that the newest
            plan replaced, less that with its own, seconds.
    """

    spec: JobSpec
    incarnation: int
    plan: JobPlan
    decision: Decision = field(init=False)
    applied_version: int = 0
    failure: Decision | None = None
    saved_s: float = 0.0
    _window: Window = field(init=False)
    _kept: OrderedDict[int, JobPlan] = field(default_factory=OrderedDict)
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _holders: dict[int, int] = field(default_factory=dict)
    _next_ticket: int = 1
    _running: SolveTask | None = None
    _looked_at: int = 0

    def __post_init__(self) -> None:
        self.decision = self.plan.decision
        self._window = Window(self.spec)
        self._kept[self.plan.version] = self.plan

    @classmethod
    def begin(cls, spec: JobSpec, incarnation: int) -> PlanningJob:
        """A job that never had a plan."""
        return cls(spec, incarnation, initial_plan(spec, 1, incarnation))

    @property
    def count(self) -> StatisticsCount:
        """Statistics counted by their fate."""
        return self._window.count

    @property
    def closed_step(self) -> int | None:
        """Newest closed step."""
        return self._window.closed_step

    @property
    def connected_ranks(self) -> int:
        """Ranks that a stream reports for."""
        return len(self._holders)

    @property
    def silent_ranks(self) -> list[int]:
        """Ranks that no stream reports for, the first `SHOWN_RANKS`."""
        return list(islice((rank for rank in range(self.spec.ranks) if rank not in self._holders), SHOWN_RANKS))

    @property
    def late_ranks(self) -> list[int]:
        """Connected ranks that lag behind the newest closed step, the first `SHOWN_RANKS`."""
        return list(islice((rank for rank in self._window.late_ranks() if rank in self._holders), SHOWN_RANKS))

    @property
    def in_force(self) -> JobPlan:
        """The plan that a rank last reported as applied; the layouts that the job began with before any is."""
        known = self._kept.get(self.applied_version)
        return initial_plan(self.spec, self.applied_version or 1, self.incarnation) if known is None else known

    def demand_after(self, step: int | None) -> list[tuple[int, Int64]]:
        """Closed steps after `step`, as far as the window goes back: number and int64[layers, experts], in order."""
        return self._window.demand_after(step)

    @property
    def solving(self) -> bool:
        """True if a task is out."""
        return self._running is not None

    def join(self, stream: int, incarnation: int, ranks: tuple[int, ...], session: str) -> list[int]:
        """A stream that reports for `ranks` begins.

        Returns:
            Streams that it replaces, which the caller ends: those of an earlier incarnation, or of the same session.

        Raises:
            StaleIncarnationError: `incarnation` is older than the newest one.
            RankTakenError: a rank is connected by another session.
        """
        if incarnation < self.incarnation:
            raise StaleIncarnationError(incarnation, self.incarnation)
        ended = []
        if incarnation > self.incarnation:
            ended = self._restart(incarnation)
        holders = {rank: self._holders[rank] for rank in ranks if rank in self._holders}
        for rank, holder in holders.items():
            if self._streams[holder].session != session:
                raise RankTakenError(rank)
        for holder in sorted(set(holders.values())):
            self.end(holder)
            ended.append(holder)
        self._streams[stream] = _Stream(session, ranks)
        self._holders.update(dict.fromkeys(ranks, stream))
        return ended

    def end(self, stream: int) -> None:
        """A stream is over, whether it left or was lost. What it reported stays."""
        gone = self._streams.pop(stream, None)
        for rank in gone.ranks if gone else ():
            if self._holders.get(rank) == stream:
                del self._holders[rank]

    def report(self, report: Report, now_s: float) -> SolveTask | None:
        """Statistics came; a task if it is time to look for a plan."""
        self._window.add(report, now_s)
        return self.tick(now_s)

    def tick(self, now_s: float) -> SolveTask | None:
        """Time has passed; a task if it is time to look for a plan."""
        before = self._window.closed_steps
        self._window.close(now_s)
        gain_s = self.plan.decision.cost_before_s - self.plan.decision.cost_after_s
        self.saved_s += (self._window.closed_steps - before) * gain_s
        due = self._window.closed_steps - self._looked_at >= self.spec.replan.every_steps
        return self._look() if due and self._running is None else None

    def next_timeout_s(self) -> float | None:
        """When `tick` should be called although nothing came."""
        return self._window.next_timeout_s()

    def solved(self, task: SolveTask, candidates: list[Candidate], solve_s: float) -> JobPlan | None:
        """The answer to a task.

        Returns:
            A plan to store and then `commit`; None to stay, or if the task is out of date.
        """
        if self._running is None or self._running.ticket != task.ticket:
            return None
        decision, layers = decide(self.spec, self.plan, candidates, task.step, task.window_steps)
        if not decision.changed_layers:
            self._running = None
            self.decision = decision
            return None
        return JobPlan(self.plan.version + 1, self.incarnation, layers, decision, solve_s)

    def failed(self, task: SolveTask, detail: str) -> None:
        """A task has no answer: stay."""
        if self._running is not None and self._running.ticket == task.ticket:
            self._running = None
            self.decision = Decision(Reason.SOLVE_FAILED, task.step, task.window_steps, detail=detail)
            self.failure = self.decision

    def commit(self, plan: JobPlan) -> bool:
        """A plan is stored and becomes the newest; False if the job has gone on without it (a restart, a fall back)."""
        if plan.version != self.plan.version + 1 or plan.incarnation != self.incarnation:
            return False
        self._running = None
        self.plan = plan
        self.decision = plan.decision
        self._kept[plan.version] = plan
        while len(self._kept) > KEPT_PLANS:
            self._kept.popitem(last=False)
        return True

    def not_stored(self, plan: JobPlan, detail: str) -> None:
        """A plan could not be stored: stay."""
        if plan.version == self.plan.version + 1:
            self._running = None
            self.decision = replace(plan.decision, reason=Reason.STORE_FAILED, changed_layers=0, detail=detail)

    def applied(self, version: int) -> None:
        """A rank runs `version`."""
        if version <= self.plan.version:
            self.applied_version = max(self.applied_version, version)

    def apply_failed(self, version: int, in_force: int, detail: str) -> JobPlan | None:
        """A rank cannot run `version`.

        Returns:
            A plan to store and then `commit`: back to the layouts of `in_force`, or to the initial ones where those are
            forgotten. None if `version` is not the newest, or nothing changes.
        """
        if version != self.plan.version:
            return None
        self._running = None
        known = self._kept.get(in_force) or initial_plan(self.spec, in_force, self.incarnation)
        plan = back_to(self.plan, known, detail)
        return plan if plan.decision.changed_layers else None

    def _restart(self, incarnation: int) -> list[int]:
        ended = sorted(self._streams)
        self._streams.clear()
        self._holders.clear()
        self.incarnation = incarnation
        self._window = Window(self.spec)
        self._looked_at = 0
        self._running = None
        return ended

    def _look(self) -> SolveTask | None:
        self._looked_at = self._window.closed_steps
        layers, outlooks, steps = [], [], 0
        for layer in range(self.spec.layers):
            window = self._window.layer(layer)
            if not window:
                continue
            outlooks.append(LayerOutlook(self.spec, window, self.plan.layers[layer].layout))
            layers.append(layer)
            steps = max(steps, len(window))
        if not layers:
            return None
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        step = -1 if self.closed_step is None else self.closed_step
        self._running = SolveTask(
            ticket, step, steps, tuple(layers), tuple(outlooks), self.spec.policy, self.spec.parameters
        )
        return self._running
