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
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.v1 import job_pb2, planner_pb2, planner_pb2_grpc, tensor_pb2

__all__ = ["HeldPlan", "Login", "PlannerStream", "StreamStatus", "write_tensor"]

log = logging.getLogger("moeplan")

FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 15.0
CALL_S = 10.0
FAREWELL_S = 2.0
"""Longest wait until the planner has read why a plan was refused."""
UNSENT = 256
"""Steps of statistics that wait for the planner; the oldest go first."""
HELD = 64
"""Versions that wait for the other ranks."""

_TYPES = {tensor_pb2.DATA_TYPE_INT32: "<i4", tensor_pb2.DATA_TYPE_INT64: "<i8"}


@dataclass(frozen=True, slots=True)
class Login:
    """How to connect to a daemon that asks who one is.

    Attributes:
        token: Bearer token; by default that of the environment variable MOEPLAN_TOKEN, if there is one.
        ca: PEM file of those that may have signed the daemon's certificate; TLS is used if it is given.
        certificate: PEM file of the rank's own certificate.
        key: PEM file of its key.
    """

    token: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __repr__(self) -> str:
        return f"Login(token={'...' if self.token else None}, ca={self.ca}, certificate={self.certificate})"

    def channel(self, address: str) -> grpc.Channel:
        """A channel to ``host:port`` or ``unix:path``, with pings that find a dead daemon."""
        options = [
            ("grpc.max_receive_message_length", 2**31 - 1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_reconnect_backoff_ms", int(LONGEST_DELAY_S * 1e3)),
        ]
        if self.ca is None:
            return grpc.insecure_channel(address, options)
        parts = [None if path is None else path.read_bytes() for path in (self.ca, self.key, self.certificate)]
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(*parts), options)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        token = self.token or os.environ.get("MOEPLAN_TOKEN")
        return (("authorization", f"Bearer {token}"),) if token else ()


@dataclass(frozen=True, slots=True, eq=False)
class HeldPlan:
    """A version of the job's layouts, complete and validated.

    Attributes:
        version: Its version; 0 for none.
        layouts: One per layer.
    """

    version: int
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """How the line is.

    Attributes:
        connected: Whether the planner has welcomed this rank and not gone since.
        connections: Times that it was welcomed.
        sent: Statistics messages sent.
        dropped: Statistics that no planner was there for in time.
        refused: Plans that did not validate.
        error: Why the line was last lost, or a plan refused; empty if neither has happened.
    """

    connected: bool = False
    connections: int = 0
    sent: int = 0
    dropped: int = 0
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
        job: The job, the same on every rank; created if it does not exist.
        rank: This rank in the group.
        reports_for: Ranks that this stream reports for; itself by default.
        login: Token and certificates.
    """

    def __init__(
        self,
        address: str,
        job_id: str,
        job: job_pb2.Job,
        rank: int,
        *,
        reports_for: Sequence[int] = (),
        login: Login | None = None,
    ) -> None:
        self._first_address = self._address = address
        self._job_id, self._job, self._rank = job_id, job, rank
        self._reports_for = tuple(reports_for) or (rank,)
        self._login = login or Login()
        self._session = uuid.uuid4().hex
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
        """How the line is."""
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
        statistics = planner_pb2.Statistics(step=step, tokens=write_tensor(tokens))
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
            before = self._status
            try:
                self._converse()
            except grpc.RpcError as error:
                self._lost(error)
            except _RefusedError as error:
                log.warning("rank %d refused a plan: %s", self._rank, error)
                self._note(error=str(error), refused=before.refused + 1)
            except Exception as error:  # whatever it is, training goes on without the planner
                log.exception("rank %d lost the planner", self._rank)
                self._note(error=repr(error))
            self._note(connected=False)
            if self._status.connections > before.connections and self._status.refused == before.refused:
                delay = FIRST_DELAY_S
            with self._change:
                # Jitter, so that a thousand ranks do not come back at once.
                self._change.wait_for(lambda: self._closing, delay * random.uniform(0.5, 1.5))
            delay = min(2 * delay, LONGEST_DELAY_S)

    def _converse(self) -> None:
        """One connection, from the hello to its end."""
        with self._login.channel(self._address) as channel:
            stub = planner_pb2_grpc.PlannerServiceStub(channel)
            request = planner_pb2.CreateJobRequest(job_id=self._job_id, job=self._job)
            self._call = creating = stub.CreateJob.future(request, timeout=CALL_S, metadata=self._login.metadata)
            creating.result()
            over, refused = threading.Event(), threading.Event()
            with self._change:
                self._sequence = self._acknowledged = self._credit = 0
            call = stub.StreamRank(self._requests(over, refused), metadata=self._login.metadata)
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
                incarnation=self._job.incarnation,
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
        except (ProblemError, ValueError) as error:
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

    def _complete(self, plan: job_pb2.JobPlan) -> tuple[Layout, ...]:
        if plan.incarnation != self._job.incarnation:
            raise ValueError(f"it is for incarnation {plan.incarnation}, and this is {self._job.incarnation}")
        layouts: dict[int, Layout] = dict(enumerate(self._newest.layouts))
        for layer in plan.layers:
            if not 0 <= layer.layer < self._job.layers:
                raise ValueError(f"layer {layer.layer}: the job has layers 0..{self._job.layers - 1}")
            layouts[layer.layer] = self._read_layout(layer)
        missing = [layer for layer in range(self._job.layers) if layer not in layouts]
        if missing:
            raise ValueError(f"layers {missing[:8]} are missing")
        return tuple(layouts[layer] for layer in range(self._job.layers))

    def _read_layout(self, layer: job_pb2.LayerPlan) -> Layout:
        slots = self._job.cluster.slots
        shape = tuple(layer.layout.shape)
        if len(shape) != 2 or shape[0] != len(slots) or not 0 < shape[1] <= max(slots):
            raise ValueError(f"layer {layer.layer}: a layout of shape {shape} for {len(slots)} devices")
        if layer.layout.type not in _TYPES:
            raise ValueError(f"layer {layer.layer}: a layout of type {layer.layout.type}")
        table = np.frombuffer(layer.layout.data, _TYPES[layer.layout.type]).reshape(shape)
        layout = Layout(table.astype(np.int32), self._job.experts)
        used = (layout.slots >= 0).sum(axis=1)
        over = np.flatnonzero(used > np.array(slots))
        if len(over):
            raise ValueError(
                f"layer {layer.layer}: {used[over[0]]} replicas on device {over[0]} of {slots[over[0]]} slots"
            )
        return layout

    def _tell(self, request: planner_pb2.StreamRankRequest) -> None:
        with self._change:
            self._controls.append(request)
            self._change.notify_all()

    def _lost(self, error: grpc.RpcError) -> None:
        if self._closing:
            return
        assert isinstance(error, grpc.Call)
        owner = _owner(error)
        self._address = owner or self._first_address
        reason = f"{error.code().name}: {error.details()}"
        if reason != self._status.error:
            log.warning("rank %d has no planner at %s: %s", self._rank, self._address, reason)
        self._note(error=reason)

    def _note(self, **changes: object) -> None:
        with self._change:
            fields = {name: getattr(self._status, name) for name in StreamStatus.__slots__}
            self._status = StreamStatus(**(fields | changes))


def write_tensor(array: Int64) -> tensor_pb2.Tensor:
    """The message of an array of whole numbers."""
    return tensor_pb2.Tensor(
        shape=array.shape,
        type=tensor_pb2.DATA_TYPE_INT64,
        data=np.ascontiguousarray(array, "<i8").tobytes(),
    )


def _owner(error: grpc.Call) -> str:
    """Address of the daemon that owns the job, where this one says that it does not."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
            try:
                status.ParseFromString(value)
            except DecodeError:
                return ""
            for detail in status.details:
                if detail.Unpack(info) and info.reason == "OWNED_ELSEWHERE":
                    return str(info.metadata.get("owner", ""))
    return ""
