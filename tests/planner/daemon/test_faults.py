"""What goes wrong in the field: kill -9, full disks, damaged files, half-open connections, and shutdown."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.daemon import (
    WAIT_S,
    DaemonProcess,
    Rank,
    Start,
    children,
    eventually,
    small_job,
    small_problem,
    tokens,
)
from tests.support.preloaded import preloaded

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.errors import NotFoundError, ServiceError, UnavailableError
from moeplan.planner.daemon.database import RESERVE
from moeplan.solvers import SolveParameters
from moeplan.v1 import planner_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(daemon: DaemonProcess, service: str = "moeplan.v1.PlannerService") -> int:
    """What a daemon says of one of its services."""
    with grpc.insecure_channel(daemon.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S).status
        return status


def runs(pid: int) -> bool:
    """Whether a process is there, and has not ended: what nobody waits for is there for a while."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _joined(client: Client, name: str) -> Rank | None:
    """A stream of all ranks; None while the job is not here."""
    rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
    try:
        rank.next("welcome")
    except grpc.RpcError:
        return None
    return rank


def test_kill_in_the_middle_of_writes_loses_nothing_acknowledged(start: Start, tmp_path: Path) -> None:
    """Jobs are created and plans made without pause; after SIGKILL every one that was acknowledged is there."""
    data = tmp_path / "data"
    first = start(data=data).serving()
    acknowledged: list[str] = []
    versions: list[int] = []

    def create() -> None:
        with Client(first.address, timeout_s=WAIT_S) as client:
            try:
                while True:
                    acknowledged.append(client.create_job(f"job-{len(acknowledged)}", small_job()).name)
            except ServiceError:
                return

    with first.client() as client:
        name = client.create_job("planned", small_job()).name
        rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        creator = threading.Thread(target=create)
        creator.start()

        def watch() -> None:
            try:
                versions.extend(plan.version for plan in client.watch_plans(name))
            except ServiceError:
                return

        watcher = threading.Thread(target=watch)
        watcher.start()
        step, end = 0, time.monotonic() + WAIT_S
        while len(acknowledged) < 20 or len(versions) < 5:
            assert time.monotonic() < end, (len(acknowledged), versions, client.job(name).status)
            rank.report(step, tokens(step, ranks=2))
            step += 1
            time.sleep(0.01)
        first.kill()
        creator.join(WAIT_S)
        watcher.join(WAIT_S)
        rank.close()
    second = start(data=data).serving(solver=False)
    with second.client() as client:
        there = {job.name: job for job in client.jobs()}
        assert set(acknowledged) <= set(there)
        assert there[name].status.plan_version >= versions[-1]
        for version in versions:
            assert client.plan(f"{name}/plans/{version}").version == version
        again = Rank(client, name, 0)
        assert again.next("welcome").plan.version >= versions[-1]
        again.close()


def test_terminating_drains(start: Start) -> None:
    """Streams are told; new calls are refused; a running solve ends; the workers go; the status is 0."""
    daemon = start("--listen", "127.0.0.1:0").serving()
    workers = daemon.workers()
    with daemon.client() as client:
        name = client.create_job("drained", small_job()).name
        rank = Rank(client, name, 0)
        rank.next("welcome")
        running = client.solver.Solve.future(client._solve([small_problem()], "", SolveParameters()), timeout=WAIT_S)
        # A worker has it: a call that comes after the signal is refused, and that is no running solve.
        eventually(lambda: daemon.metric('moeplan_queue_seconds_count{kind="solve"}') >= 1)
        daemon.process.send_signal(signal.SIGTERM)
        assert rank.next("drain").reason
        error = rank.error()
        assert isinstance(error, UnavailableError)
        assert running.result(WAIT_S).plans
    status, log = daemon.end()
    assert status == 0, log
    assert daemon.events("stopped")
    eventually(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


@pytest.mark.parametrize("ready", [False, True])
def test_workers_do_not_outlive_a_killed_daemon(start: Start, ready: bool) -> None:
    daemon = start().serving(solver=ready)
    processes = eventually(lambda: children(daemon.process.pid)) + daemon.workers()
    assert len(processes) > ready
    daemon.kill()
    eventually(lambda: not any(runs(process) for process in processes))


def test_a_damaged_store_is_refused_and_left_alone(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    daemon = start(data=data).serving(solver=False)
    with daemon.client() as client:
        client.create_job("kept", small_job())
    daemon.terminate()
    path = data / "moeplan.sqlite3"
    whole = path.read_bytes()
    for damaged in (b"not a database at all, but a text" * 100, whole[:4096] + b"\xff" * 4096 + whole[8192:]):
        path.write_bytes(damaged)
        status, output = start(data=data).end()
        assert status == 1
        assert "is damaged" in output
        assert "It was left as it is" in output
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    again = start(data=data).serving(solver=False)
    with again.client() as client:
        assert client.job("jobs/kept")


@pytest.mark.parametrize(
    "damage",
    [
        "middle",
        pytest.param("head", marks=pytest.mark.slow),
        pytest.param("empty", marks=pytest.mark.slow),
        pytest.param("one byte", marks=pytest.mark.slow),
        "gone",
    ],
)
def test_a_store_that_lost_jobs_is_not_served(start: Start, tmp_path: Path, damage: str) -> None:
    """SQLite would take what is left for all there is: nothing of an empty file, a part of a broken log."""
    data = tmp_path / "data"
    daemon = start(data=data).serving(solver=False)
    with daemon.client() as client:
        for number in range(20):
            client.create_job(f"kept-{number}", small_job())
    daemon.kill()
    database, log = data / "moeplan.sqlite3", data / "moeplan.sqlite3-wal"
    assert log.stat().st_size > 40_000
    whole = {path: path.read_bytes() for path in (database, log)}
    match damage:
        case "middle" | "head":
            place = len(whole[log].rstrip(b"\0")) // 3 if damage == "middle" else 0
            log.write_bytes(whole[log][:place] + b"\xff" * 16 + whole[log][place + 16 :])
        case "empty" | "one byte":
            log.unlink()
            database.write_bytes(b"" if damage == "empty" else b"S")
        case "gone":
            log.unlink()
            database.unlink()
    status, output = start(data=data).end()
    assert status == 1
    assert "is damaged" in output
    assert "Traceback" not in output
    for path, content in whole.items():
        path.write_bytes(content)
    again = start(data=data).serving(solver=False)
    with again.client() as client:
        assert len(list(client.jobs())) == 20


def test_a_log_whose_last_transaction_is_incomplete_is_taken(start: Start, tmp_path: Path) -> None:
    """The machine stopped within a write, which nobody was told of."""
    data = tmp_path / "data"
    daemon = start(data=data).serving(solver=False)
    with daemon.client() as client:
        for number in range(3):
            client.create_job(f"kept-{number}", small_job())
    daemon.kill()
    log = data / "moeplan.sqlite3-wal"
    content = log.read_bytes()
    end = len(content.rstrip(b"\0")) - 100  # it is as long as it may become; zeros follow
    log.write_bytes(content[:end] + bytes(len(content) - end))
    again = start(data=data).serving(solver=False)
    with again.client() as client:
        assert [job.name for job in client.jobs()] == ["jobs/kept-0", "jobs/kept-1"]


def test_a_folder_that_is_removed_underneath_is_noticed(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    daemon = start(data=data).serving(solver=False)
    with daemon.client() as client:
        client.create_job("kept", small_job())
        assert health(daemon) == SERVING
        data.rename(tmp_path / "elsewhere")
        with pytest.raises(ServiceError, match="removed while in use") as error:
            Client(daemon.address, timeout_s=5)._call("planner", "CreateJob", _create("lost"))
        assert error.value.reason == "STORE_FAILED"
        eventually(lambda: health(daemon) == NOT_SERVING)
        assert daemon.metric("moeplan_store_errors_total") > 0
        (tmp_path / "elsewhere").rename(data)
        eventually(lambda: health(daemon) == SERVING)
        client.create_job("after", small_job())


def test_reads_go_on_while_another_process_writes(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    daemon = start(data=data).serving(solver=False)
    with daemon.client() as client:
        client.create_job("kept", small_job())
        with contextlib.closing(sqlite3.connect(data / "moeplan.sqlite3", isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            assert [job.name for job in client.jobs()] == ["jobs/kept"]
            assert client.plan("jobs/kept/plans/1").version == 1


def test_a_disk_that_hangs_stops_nobody_for_ever(start: Start, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    library = preloaded("hanging_disk", tmp_path)
    environment = {"LD_PRELOAD": str(library), "HANGING_DISK_FILE": str(hangs), "MOEPLAN_LEASE_S": "1"}
    daemon = start(data=tmp_path / "data", environment=environment).serving()
    with daemon.client() as client:
        name = client.create_job("kept", small_job()).name
        rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        version = rank.next("plan_update").plan.version
        hangs.touch()
        for _ in range(3):  # those that come while it hangs, too
            with pytest.raises(UnavailableError, match="has not answered for 1 s") as error:
                client.create_job("asked", small_job())
            assert error.value.reason == "STORE_FAILED"
        with pytest.raises(UnavailableError, match="has not answered"):
            list(client.jobs())
        assert health(daemon) == NOT_SERVING
        assert health(daemon, "") == SERVING
        assert daemon.metric('moeplan_ready{service="moeplan.v1.PlannerService"}') == 0
        assert daemon.metric("moeplan_store_errors_total") > 0
        assert "does not answer" in daemon.events("not ready")[-1]["why"]
        rank.report(1, tokens(1, ranks=2))  # ranks are connected all the while
        hangs.unlink()
        eventually(lambda: health(daemon) == SERVING)
        # What was refused may have been done nevertheless; whatever was, goes on.
        client.create_job("asked", small_job())
        again = eventually(lambda: _joined(client, name))
        for step in range(2, 30):
            again.report(step, tokens(step, ranks=2))
        assert again.next("plan_update").plan.version > version
        again.close()
    rank.close()
    assert daemon.terminate() == 0


def test_the_end_does_not_wait_for_a_disk_that_hangs(start: Start, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    library = preloaded("hanging_disk", tmp_path)
    environment = {"LD_PRELOAD": str(library), "HANGING_DISK_FILE": str(hangs), "MOEPLAN_LEASE_S": "1"}
    daemon = start(data=tmp_path / "data", environment=environment).serving(solver=False)
    hangs.touch()
    with daemon.client() as client, pytest.raises(UnavailableError, match="has not answered"):
        client.create_job("asked", small_job())
    daemon.terminate()


def test_who_locks_the_store_and_stops_holds_nobody_up(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    daemon = start(data=data, environment={"MOEPLAN_LEASE_S": "4"}).serving(solver=False)
    begin = "c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN IMMEDIATE')"
    lock = f"import sqlite3, sys; {begin}; print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", lock, str(data / "moeplan.sqlite3")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        holder.send_signal(signal.SIGSTOP)
        with daemon.client() as client:
            with pytest.raises(UnavailableError, match="locked"):
                client.create_job("asked", small_job())
            eventually(lambda: health(daemon) == NOT_SERVING)
            assert not list(client.jobs())  # reading goes on
            assert "locked" in daemon.events("not ready")[-1]["why"]
            holder.kill()
            eventually(lambda: health(daemon) == SERVING)
            client.create_job("asked", small_job())
    finally:
        holder.kill()
        holder.communicate()


def test_a_statement_without_end_is_cut_short(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    daemon = start(data=data, environment={"MOEPLAN_LEASE_S": "1"}).serving(solver=False)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with contextlib.closing(sqlite3.connect(data / "moeplan.sqlite3")) as database, database:
        when = "BEFORE INSERT ON moeplan_jobs WHEN new.name = 'asked'"
        database.execute(f"CREATE TRIGGER endless {when} BEGIN SELECT ({endless}); END")
    with daemon.client() as client:
        with pytest.raises(UnavailableError, match="has not answered"):
            client.create_job("asked", small_job())
        eventually(lambda: health(daemon) == SERVING)
        client.create_job("another", small_job())
        assert [job.name for job in client.jobs()] == ["jobs/another"]


def test_what_a_rank_that_vanishes_has_begun_is_finished(start: Start, tmp_path: Path) -> None:
    """It says that it cannot run a plan, and is gone while that is written: the daemon knows what is on disk."""
    data = tmp_path / "data"
    daemon = start(data=data).serving()
    with daemon.client() as client:
        name = client.create_job("vanishing", small_job()).name
        rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        assert rank.next("plan_update").plan.version == 2
        with contextlib.closing(sqlite3.connect(data / "moeplan.sqlite3", isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            rank.send(failed=planner_pb2.PlanFailed(version=2, in_force_version=1, reason="no memory"))
            time.sleep(0.5)  # it waits for the database now
            rank.close()
            eventually(lambda: client.job(name).status.connected_ranks == 0)
        eventually(lambda: client.job(name).status.plan_version == 3)
        again = Rank(client, name, 0, hello={"reports_for": [0, 1], "plan_version": 3})
        again.next("welcome")
        again.report(1, tokens(1, ranks=2))
        assert again.next("plan_update").plan.version == 4
        again.close()
    assert not daemon.events("plan not stored")
    assert not daemon.events("job lost")


def test_deleting_a_job_that_is_being_planned_raises_no_alarm(start: Start) -> None:
    daemon = start().serving()
    with daemon.client() as client:
        for number in range(10):
            name = client.create_job(f"brief-{number}", small_job()).name
            rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
            for step in range(5):
                rank.report(step, tokens(step, ranks=2))
            client.delete_job(name)
            assert isinstance(rank.error(), NotFoundError)
    assert not [line for line in daemon.lines if '"error"' in line or '"warning"' in line]


def test_a_store_of_another_version_is_refused(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    start(data=data).serving(solver=False).terminate()
    with sqlite3.connect(data / "moeplan.sqlite3") as connection:
        connection.execute("UPDATE moeplan_meta SET schema = 99")
    connection.close()
    status, output = start(data=data).end()
    assert status == 1
    assert "schema 99" in output


def test_two_daemons_cannot_share_a_folder_or_an_address(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = start(data=data).serving(solver=False)
    status, output = start(data=data).end()
    assert status == 1
    assert "used by another daemon" in output
    status, output = start("--listen", first.address, data=tmp_path / "other").end()
    assert status == 1
    assert f"listen = {first.address}" in output
    with first.client() as client:
        assert client.policies()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> object:
    """A file system of 600 kB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_refuses_and_keeps(start: Start, tiny_disk: Path) -> None:
    daemon = start(data=tiny_disk).serving()
    with daemon.client() as client:
        kept: list[str] = []

        def fill() -> None:
            while True:
                kept.append(
                    client.create_job(
                        f"job-{len(kept)}", small_job(layers=40, parameters=SolveParameters(work_limit=20))
                    ).name
                )

        with pytest.raises(ServiceError) as error:
            fill()
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.value.reason == "STORE_FULL"
        assert {job.name for job in client.jobs()} == set(kept)
        rank = Rank(client, kept[0], 0, hello={"reports_for": [0, 1]})

        def refused() -> Any:
            """Others take what the daemon finds for a plan, until it finds nothing."""
            (tiny_disk / RESERVE).unlink(missing_ok=True)
            with contextlib.suppress(OSError), (tiny_disk / "another's").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
            _report(rank)
            decision = client.job(kept[0]).status.decision
            return decision if decision and decision.detail else None

        assert "full" in eventually(refused).detail
        version = client.plan(f"{kept[0]}/plans/-").version
        eventually(lambda: health(daemon) == NOT_SERVING)
        subprocess.run(["mount", "-o", "remount,size=2m", str(tiny_disk)], check=True)
        eventually(lambda: _report(rank) and client.plan(f"{kept[0]}/plans/-").version > version)
        eventually(lambda: health(daemon) == SERVING)
        rank.close()
    daemon.terminate()
    again = start(data=tiny_disk).serving(solver=False)
    with again.client() as client:
        assert {job.name for job in client.jobs()} == set(kept)


@pytest.mark.parametrize("ends", ["killed", "terminated"])
def test_a_full_disk_lets_jobs_be_deleted_and_the_daemon_restart(start: Start, tiny_disk: Path, ends: str) -> None:
    daemon = start(data=tiny_disk).serving(solver=False)
    kept: list[str] = []
    with daemon.client() as client:

        def fill(layers: int) -> None:
            while True:
                kept.append(client.create_job(f"job-{len(kept)}", small_job(layers=layers)).name)

        for layers in (40, 1):
            with pytest.raises(ServiceError, match="full"):
                fill(layers)
    if ends == "killed":
        daemon.kill()
    else:
        daemon.terminate()
    with contextlib.suppress(OSError), (tiny_disk / "other").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    again = start(data=tiny_disk).serving(solver=False)
    with again.client() as client:
        assert {job.name for job in client.jobs()} == set(kept)
        for name in kept:
            client.delete_job(name)
        assert not list(client.jobs())


def _create(identity: str) -> planner_pb2.CreateJobRequest:
    return planner_pb2.CreateJobRequest(job_id=identity, job=wire.write_job_spec(small_job()))


def _report(rank: Rank) -> bool:
    rank.report(rank.sequence, tokens(rank.sequence, layers=40, ranks=2))
    time.sleep(0.05)
    return True


def test_ten_thousand_connects_leak_nothing(daemon: DaemonProcess, client: Client) -> None:
    """Connections that say nothing, half a handshake, rubbish, or make a call and vanish."""
    host, port = daemon.address.rsplit(":", 1)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))

    client.policies()
    before = descriptors()
    payloads = (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100)
    for number in range(10_000):
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
            connection.sendall(payloads[number % len(payloads)])
    eventually(lambda: descriptors() <= before + 5)
    for _ in range(50):
        with daemon.client() as another:
            another.policies()
    eventually(lambda: descriptors() <= before + 5)


def test_ranks_that_vanish_free_their_places(daemon: DaemonProcess, client: Client) -> None:
    name = client.create_job("vanishing", small_job()).name
    for _ in range(50):
        rank = Rank(client, name, 0)
        rank.next("welcome")
        rank.close()
        eventually(lambda: client.job(name).status.connected_ranks == 0)


def test_a_stopped_client_holds_nobody_up(daemon: DaemonProcess, client: Client) -> None:
    """A reader whose connection is open but who reads nothing at all (a stopped process)."""
    name = client.create_job("stopped-reader", small_job()).name
    script = (
        "import sys, time\nfrom moeplan.api.client import Client\n"
        f"watch = Client({daemon.address!r}).watch_plans({name!r})\nnext(watch)\n"
        "print('watching', flush=True)\ntime.sleep(600)\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "watching\n"
        reader.send_signal(signal.SIGSTOP)
        rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        for step in range(40):
            rank.report(step, tokens(step, ranks=2))
        eventually(lambda: client.job(name).status.closed_step == 39)
        rank.close()
    finally:
        reader.kill()
        reader.wait(WAIT_S)
        if reader.stdout is not None:
            reader.stdout.close()


def test_health_and_reflection_answer(daemon: DaemonProcess) -> None:
    for service in ("", "moeplan.v1.PlannerService", "moeplan.v1.SolverService"):
        assert health(daemon, service) == SERVING
    with grpc.insecure_channel(daemon.address) as channel:
        from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

        assert "moeplan.v1.PlannerService" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_unknown_jobs_are_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError):
        client.plan("jobs/unknown/plans/-")
    with pytest.raises(NotFoundError):
        next(client.watch_plans("jobs/unknown"))
    with pytest.raises(ServiceError, match="page_token"):
        client._call("planner", "ListJobs", planner_pb2.ListJobsRequest(page_token="\x00"))
