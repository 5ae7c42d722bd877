"""Real daemons in processes of their own, on ports that the system chooses."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.errors import ServiceError, error_of
from moeplan.api.jobs import JobSpec
from moeplan.solvers import Cluster, Demand, Problem
from moeplan.v1 import planner_pb2

WAIT_S = 90.0
"""Longest wait for anything; the first start on a machine compiles the kernels."""


def eventually(condition: Callable[[], Any], wait_s: float = WAIT_S) -> Any:
    """The first true value of `condition`; fails after a while."""
    end = time.monotonic() + wait_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@dataclass
class DaemonProcess:
    """`moeplan serve` as users start it."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    wrapper: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    address: str = ""
    metrics: str = ""

    def __post_init__(self) -> None:
        command = [*self.wrapper, sys.executable, "-m", "moeplan.planner.commands.main", "serve", *self.arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **self.environment}, start_new_session=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(ValueError):  # closed at the end of the test, before a slow child let go of it
            for line in self.process.stderr:
                self.lines.append(line)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log events of a name."""
        found = []
        for line in list(self.lines):
            if line.startswith("{"):
                event = json.loads(line)
                if event["event"] == name:
                    found.append(event)
        return found

    def serving(self, *, solver: bool = True) -> DaemonProcess:
        """Wait until it serves, and solves."""
        event = eventually(lambda: self._log("serving"))[0]
        self.address, self.metrics = event["address"], event["metrics"]
        if solver:
            eventually(lambda: self._log("workers ready"))
        return self

    def _log(self, name: str) -> list[dict[str, Any]]:
        found = self.events(name)
        if not found and self.process.poll() is not None:
            self.reader.join(5)
            raise AssertionError("".join(self.lines))
        return found

    def end(self) -> tuple[int, str]:
        """Wait for its own end; the exit status and what it wrote."""
        status = self.process.wait(WAIT_S)
        self.reader.join(5)
        return status, "".join(self.lines)

    def terminate(self) -> int:
        """SIGTERM, and wait."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()[0]

    def leave(self) -> None:
        """Kill it; but where lines are counted, which a process writes down at its end, let it end first."""
        if "COVERAGE_PROCESS_CONFIG" in os.environ:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.process.kill()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.end()

    def client(self) -> Client:
        """A client without security."""
        return Client(self.address, timeout_s=WAIT_S)

    def metric(self, name: str) -> float:
        """A metric's value; 0 if the series does not exist."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=WAIT_S) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[-1])
        return 0.0

    def workers(self) -> list[int]:
        """Process ids of the workers: the children of the zygote."""
        zygotes = children(self.process.pid)
        return [worker for zygote in zygotes for worker in children(zygote)]


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


Start = Callable[..., DaemonProcess]


def small_problem(seed: int = 0, devices: int = 4, experts: int = 8) -> Problem:
    """A problem that takes a millisecond."""
    tokens = np.random.default_rng(seed).integers(0, 100, (devices, experts)) ** 2
    return Problem(Cluster.uniform(devices, 2 * experts // devices), Demand.of(tokens))


def make_jobs_unreadable(data: Path) -> None:
    """Damage the rows of all jobs in the embedded store of a daemon that does not run."""
    with contextlib.closing(sqlite3.connect(data / "moeplan.sqlite3")) as database, database:
        database.execute("UPDATE moeplan_jobs SET spec = 'rubbish'")


def small_job(layers: int = 2, experts: int = 8, devices: int = 2, slots: int = 6, **fields: Any) -> JobSpec:
    """A job of two ranks."""
    return JobSpec(Cluster.uniform(devices, slots), layers, experts, **fields)


class Rank:
    """A rank's stream, driven by hand."""

    def __init__(
        self, client: Client, job: str, rank: int, *, hello: dict[str, Any] | None = None, token: str = ""
    ) -> None:
        self._requests: queue.SimpleQueue[planner_pb2.StreamRankRequest | None] = queue.SimpleQueue()
        self.sequence = 0
        metadata = (("authorization", f"Bearer {token}"),) if token else client._security.metadata
        self.call = client.planner.StreamRank(iter(self._requests.get, None), timeout=WAIT_S, metadata=metadata)
        values: dict[str, Any] = {"job": job, "rank": rank, "session": f"session-{rank}"} | (hello or {})
        if values["job"]:
            self.send(hello=planner_pb2.Hello(**values))

    def send(self, **message: Any) -> None:
        """Send any message."""
        self._requests.put(planner_pb2.StreamRankRequest(**message))

    def report(self, step_: int, tokens_: Any, /, **fields: Any) -> None:
        """Send statistics, [layers, ranks, experts]."""
        self.sequence += 1
        values: dict[str, Any] = {
            "sequence": self.sequence,
            "step": step_,
            "tokens": wire.write_array(np.asarray(tokens_)),
        } | fields
        self.send(statistics=planner_pb2.Statistics(**values))

    def next(self, kind: str) -> Any:
        """The next message of a kind; those of other kinds before it are skipped."""
        for response in self.call:
            if response.WhichOneof("message") == kind:
                return getattr(response, kind)
        raise AssertionError(f"the stream ended without {kind}")

    def error(self) -> ServiceError:
        """The status that ends the stream."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return error_of(error)
        raise AssertionError("the stream ended well")

    def leave(self) -> None:
        """End cleanly."""
        self.send(leave=planner_pb2.Leave(reason="test"))
        for _ in self.call:
            pass
        self._requests.put(None)

    def close(self) -> None:
        """Cut it off."""
        self.call.cancel()
        self._requests.put(None)


def tokens(seed: int, layers: int = 2, ranks: int = 1, experts: int = 8) -> Any:
    """Uneven counts, int64[layers, ranks, experts]."""
    return np.random.default_rng(seed).integers(0, 100, (layers, ranks, experts)) ** 2


def started(folder: Callable[[], Path]) -> Iterator[Start]:
    """A function that starts daemons, with their data in `folder()`; they end with the iteration."""
    running: list[DaemonProcess] = []

    def start(*arguments: str, data: Path | None = None, workers: int = 1, **rest: Any) -> DaemonProcess:
        base = ["--data", str(data or folder()), "--workers", str(workers), "--metrics", "127.0.0.1:0"]
        if "--listen" not in arguments:
            base += ["--listen", "127.0.0.1:0"]
        daemon = DaemonProcess([*base, *arguments], **rest)
        running.append(daemon)
        return daemon

    yield start
    for daemon in running:
        if daemon.process.poll() is None:
            daemon.leave()
        daemon.process.wait(WAIT_S)
        assert daemon.process.stderr is not None
        daemon.reader.join(5)
        if daemon.reader.is_alive():  # one of its processes has the pipe; to close what is read waits, past any limit
            os.killpg(daemon.process.pid, signal.SIGKILL)
            daemon.reader.join(WAIT_S)
            assert not daemon.reader.is_alive(), "processes outlive the daemon"
        daemon.process.stderr.close()
