"""A rank's line to the planner: statistics go up and plans come down, in a thread that training never waits for."""

from __future__ import annotations

import logging
import os
import random
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import grpc

from moeplan.api import wire
from moeplan.api.connection import LONGEST_DELAY_S, Security, open_channel
from moeplan.api.errors import InvalidRequestError, ServiceError, error_of
from moeplan.api.jobs import JobSpec
from moeplan.runtime_client.planning.aggregation import LayoutAndRule
from moeplan.runtime_client.planning.rank_trace import RankTrace
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.layout import check_layout
from moeplan.solvers.problem.split_rules import RANK_RULES, split_rule
from moeplan.v1 import job_pb2, planner_pb2, planner_pb2_grpc

__all__ = ["HeldPlan", "PlannerStream", "StreamStatus"]

log = logging.getLogger("moeplan")

FIRST_DELAY_S = 0.1
LONGEST_ASKED_S = 60.0
"""Longest wait that a planner may ask for; ours asks for no longer one."""
CALL_S = 10.0
FAREWELL_S = 2.0
"""Longest wait until the planner has read why a plan was refused."""
UNSENT = 256
"""Steps of statistics that wait for the planner; the oldest go first."""
HELD = 64
"""Versions that wait for the other ranks."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldPlan:
    """A version of the job's layouts, complete and validated.

    Attributes:
        version: Its version; 0 for none.
        layers: Layout and split rule of each layer.
    """

    version: int
    layers: tuple[LayoutAndRule, ...]


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """The state of the line.

    Attributes:
        connected: Whether the planner has welcomed this rank and not gone since.
        connections: Times that it was welcomed.
        sent: Statistics messages sent.
        dropped: Statistics that no planner was there for in time.
        newest: Version of the newest plan that has come; 0 before the first.
        refused: Plans that did not validate.
        error: Why the line was last lost, or a plan refused; empty if neither has happened.
    """

    connected: bool = False
    connections: int = 0
    sent: int = 0
    dropped: int = 0
    newest: int = 0
    refused: int = 0
    error: str = ""


class _RefusedError(Exception):
    """The planner sent a plan that this job cannot have."""


class PlannerStream:
    """Keeps a stream to the planner open, for ever: connects in the background and again after every loss.

    No method blocks, raises for the planner's faults, or does anything in a forked child.

    Args:
        address: The daemon, ``host:port`` or ``unix:path``.
        job_id: Id of the job: 1 to 63 of a-z, 0-9 and -.
        spec: The job, the same on every rank; created if it does not exist.
        incarnation: Which start of the training this is, the same on every rank.
        rank: This rank in the group.
        reports_for: Ranks that this stream reports for; itself by default.
        security: Token and certificates; by default what the environment names, see `Security.from_files`.

    Raises:
        OSError: the token cannot be read.
    """

    def __init__(
        self,
        address: str,
        job_id: str,
        spec: JobSpec,
        incarnation: int,
        rank: int,
        *,
        reports_for: Sequence[int] = (),
        security: Security | None = None,
    ) -> None:
        self._first_address = self._address = address
        self._job_id, self._spec, self._incarnation, self._rank = job_id, spec, incarnation, rank
        self._reports_for = tuple(reports_for) or (rank,)
        self._security = Security.from_files() if security is None else security
        self._session = uuid.uuid4().hex
        self._trace = RankTrace.here()
        self._pid = os.getpid()
        self._change = threading.Condition()
        self._unsent: deque[planner_pb2.Statistics] = deque()
        self._controls: deque[planner_pb2.StreamRankRequest] = deque()
        self._held: dict[int, HeldPlan] = {}
        self._newest = HeldPlan(0, ())
        self._credit = 0
        self._sequence = self._acknowledged = 0
        self._status = StreamStatus()
        self._closing = False
        self._call: grpc.RpcContext | None = None
        self._thread = threading.Thread(target=self._run, name="moeplan planner stream", daemon=True)
        self._thread.start()

    # What the training thread calls

    @property
    def newest(self) -> int:
        """Newest version held; 0 before the first plan."""
        return self._newest.version

    @property
    def status(self) -> StreamStatus:
        """The state of the line."""
        return self._status

    def plan(self, version: int) -> HeldPlan | None:
        """A version, if this rank holds it and has not forgotten it."""
        with self._change:
            return self._held.get(version)

    def report(self, step: int, tokens: Int64) -> None:
        """Send a step's counts, or drop the oldest that wait.

        Args:
            step: Training step, at least 0.
            tokens: int64[layers, len(reports_for), experts].
        """
        if os.getpid() != self._pid:
            return
        statistics = planner_pb2.Statistics(step=step, tokens=wire.write_counts(tokens))
        self._trace.note("moeplan.report", step=step)
        with self._change:
            self._unsent.append(statistics)
            if len(self._unsent) > UNSENT:
                self._unsent.popleft()
                self._note(dropped=self._status.dropped + 1)
            self._change.notify_all()

    def applied(self, version: int, step: int) -> None:
        """Say that a plan is in force, and forget the ones before."""
        if os.getpid() != self._pid:
            return
        with self._change:
            for old in [held for held in self._held if held < version]:
                del self._held[old]
        self._trace.note("moeplan.applied", step=step, version=version)
        self._tell(planner_pb2.StreamRankRequest(applied=planner_pb2.PlanApplied(version=version, step=step)))

    def close(self, timeout_s: float = 3.0) -> None:
        """Take leave, and wait for the line to end, but not for long."""
        if os.getpid() != self._pid:
            return
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout_s)
        call = self._call
        if self._thread.is_alive() and call is not None:
            call.cancel()
            self._thread.join(1.0)

    # The thread

    def _run(self) -> None:
        delay = FIRST_DELAY_S
        while not self._closing:
            before, wrong, asked_s = self._status, False, 0.0
            try:
                self._converse()
            except grpc.RpcError as error:
                known = error_of(error, self._address)
                wrong = isinstance(known, InvalidRequestError)  # it would say the same again
                asked_s = min(known.retry_s or 0.0, LONGEST_ASKED_S)
                self._lost(known)
            except _RefusedError as error:
                wrong = True
                log.warning("rank %d refused a plan: %s", self._rank, error)
                self._note(error=str(error), refused=before.refused + 1)
            except Exception as error:  # whatever it is, training goes on without the planner
                log.exception("rank %d lost the planner", self._rank)
                self._note(error=repr(error))
            self._note(connected=False)
            if self._status.connections > before.connections and not wrong:
                delay = FIRST_DELAY_S
            with self._change:
                # Jitter, so that a thousand ranks do not come back at once.
                wait_s = asked_s + delay * random.uniform(0.5, 1.5)
                self._change.wait_for(lambda: self._closing, wait_s)
            delay = min(2 * delay, LONGEST_DELAY_S)

    def _converse(self) -> None:
        """One connection, from the hello to its end."""
        metadata = self._security.metadata
        with open_channel(self._address, self._security, retries=False) as channel:
            stub = planner_pb2_grpc.PlannerServiceStub(channel)
            job = wire.write_job_spec(self._spec, self._incarnation)
            request = planner_pb2.CreateJobRequest(job_id=self._job_id, job=job)
            self._call = creating = stub.CreateJob.future(request, timeout=CALL_S, metadata=metadata)
            creating.result()
            over, refused = threading.Event(), threading.Event()
            with self._change:
                self._sequence = self._acknowledged = self._credit = 0
            call = stub.StreamRank(self._requests(over, refused), metadata=(*metadata, *self._trace.headers))
            self._call = call
            try:
                for response in call:
                    self._take(response)
            except _RefusedError:
                # The planner has to read why before the line ends, and ends it when it has.
                with self._change:
                    refused.set()
                    self._change.notify_all()
                limit = threading.Timer(FAREWELL_S, call.cancel)
                limit.start()
                with suppress(grpc.RpcError):
                    for _ in call:
                        pass
                limit.cancel()
                raise
            finally:
                over.set()
                with self._change:
                    self._change.notify_all()
                call.cancel()
                self._call = None

    def _requests(self, over: threading.Event, refused: threading.Event) -> Iterator[planner_pb2.StreamRankRequest]:
        yield planner_pb2.StreamRankRequest(
            hello=planner_pb2.Hello(
                job=f"jobs/{self._job_id}",
                incarnation=self._incarnation,
                rank=self._rank,
                reports_for=self._reports_for,
                session=self._session,
                plan_version=self._newest.version,
            )
        )
        while True:
            with self._change:
                self._change.wait_for(
                    lambda: over.is_set() or refused.is_set() or self._controls or self._may_send() or self._closing
                )
                if over.is_set():
                    return
                if self._controls:
                    request = self._controls.popleft()
                elif refused.is_set():
                    return
                elif self._may_send():
                    statistics = self._unsent.popleft()
                    self._sequence += 1
                    statistics.sequence = self._sequence
                    request = planner_pb2.StreamRankRequest(statistics=statistics)
                    self._note(sent=self._status.sent + 1)
                else:
                    yield planner_pb2.StreamRankRequest(leave=planner_pb2.Leave(reason="training ended"))
                    return
            yield request

    def _may_send(self) -> bool:
        return bool(self._unsent) and self._sequence - self._acknowledged < self._credit

    def _take(self, response: planner_pb2.StreamRankResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                with self._change:
                    self._credit = response.welcome.credit
                    self._note(connected=True, connections=self._status.connections + 1)
                    self._change.notify_all()
                self._hold(response.welcome.plan)
            case "plan_update":
                self._hold(response.plan_update.plan)
            case "acknowledgement":
                with self._change:
                    self._acknowledged = response.acknowledgement.sequence
                    self._change.notify_all()
            case _:  # a drain: the end of the stream follows
                pass

    def _hold(self, plan: job_pb2.JobPlan) -> None:
        """Keep a plan, made whole by the layers that it left out as unchanged.

        Raises:
            _RefusedError: it does not validate. The next hello asks again for everything after the last good one.
        """
        if plan.version <= self._newest.version:
            return
        try:
            held = HeldPlan(plan.version, self._complete(plan))
        except ValueError as error:
            reason = f"plan {plan.version}: {error}"
            failed = planner_pb2.PlanFailed(
                version=plan.version, in_force_version=self._newest.version, reason=reason[:1_000]
            )
            self._tell(planner_pb2.StreamRankRequest(failed=failed))
            raise _RefusedError(reason) from None
        with self._change:
            self._held[held.version] = self._newest = held
            for old in sorted(self._held)[:-HELD]:
                del self._held[old]
        self._note(newest=held.version)

    def _complete(self, message: job_pb2.JobPlan) -> tuple[LayoutAndRule, ...]:
        """The plan's layouts of all layers; raises ValueError where the job cannot have one."""
        spec, plan = self._spec, wire.read_job_plan(message)
        if plan.incarnation != self._incarnation:
            raise ValueError(f"it is for incarnation {plan.incarnation}, and this is {self._incarnation}")
        layers = dict(enumerate(self._newest.layers))
        for layer in plan.layers:
            if not 0 <= layer.layer < spec.layers:
                raise ValueError(f"layer {layer.layer}: the job has layers 0..{spec.layers - 1}")
            check_layout(f"layers[{layer.layer}].layout", layer.layout, spec.experts, spec.cluster.slots)
            width = layer.layout.slots.shape[1]
            if width > spec.cluster.max_slots:
                raise ValueError(f"layer {layer.layer}: {width} slots of a device that has {spec.cluster.max_slots}")
            rule = split_rule(f"layers[{layer.layer}].split_rule", layer.split_rule, RANK_RULES)
            layers[layer.layer] = layer.layout, rule
        missing = [layer for layer in range(spec.layers) if layer not in layers]
        if missing:
            raise ValueError(f"layers {missing[:8]} are missing")
        return tuple(layers[layer] for layer in range(spec.layers))

    def _tell(self, request: planner_pb2.StreamRankRequest) -> None:
        with self._change:
            self._controls.append(request)
            self._change.notify_all()

    def _lost(self, known: ServiceError) -> None:
        """Note why the line was lost, and where to look for the planner now."""
        if self._closing:
            return
        reason = f"{known.code.name}: {known.message}"
        if reason != self._status.error:
            log.warning("rank %d has no planner at %s: %s", self._rank, self._address, reason)
        self._address = known.metadata.get("owner") or self._first_address
        self._note(error=reason)

    def _note(self, **changes: Any) -> None:
        with self._change:
            self._status = replace(self._status, **changes)
