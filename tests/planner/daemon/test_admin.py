"""What operators do: copies of the store, and jobs that move from one daemon to another."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, Start, eventually, small_job, tokens

from moeplan.api.client import Client
from moeplan.api.errors import PreconditionError
from moeplan.solvers import SolveParameters


def moeplan(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as users do."""
    command = [sys.executable, "-m", "moeplan.planner.commands.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def planned(client: Client, name: str) -> int:
    """Have a plan made; its version."""
    rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
    rank.report(0, tokens(1, ranks=2))
    version: int = rank.next("plan_update").plan.version
    rank.close()
    return version


def test_backup_restore_and_compact(start: Start, tmp_path: Path) -> None:
    data, elsewhere, copy = tmp_path / "data", tmp_path / "elsewhere", tmp_path / "copy.sqlite3"
    daemon = start(data=data).serving()
    with daemon.client() as client:
        version = planned(client, client.create_job("kept", small_job()).name)
        done = moeplan("admin", "backup", copy, "--data", data)
        assert done.returncode == 0, done.stderr
        assert f"{copy.stat().st_size:,} bytes" in done.stdout
        for number in range(20):
            client.create_job(f"gone-{number}", small_job(layers=32, experts=64, devices=16))
        for number in range(20):
            client.delete_job(f"jobs/gone-{number}")
    assert "exists" in moeplan("admin", "backup", copy, "--data", data).stderr
    for command in (("compact",), ("restore", copy)):
        assert "used by another daemon" in moeplan("admin", *command, "--data", data).stderr
    daemon.terminate()

    assert moeplan("admin", "compact", "--data", data).returncode == 0
    with sqlite3.connect(data / "moeplan.sqlite3") as connection:
        assert connection.execute("PRAGMA freelist_count").fetchone() == (0,)
    assert "not overwritten" in moeplan("admin", "restore", copy, "--data", data).stderr
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"x" * 1000)
    assert moeplan("admin", "restore", wrong, "--data", elsewhere).returncode == 1
    assert moeplan("admin", "restore", copy, "--data", elsewhere).returncode == 0
    for folder in (data, elsewhere):
        again = start(data=folder).serving(solver=False)
        with again.client() as client:
            assert [job.name for job in client.jobs()] == ["jobs/kept"]
            assert client.plan("jobs/kept/plans/-").version == version


def test_one_daemon_alone_has_nowhere_to_move_jobs(daemon: DaemonProcess, client: Client) -> None:
    name = client.create_job("alone", small_job()).name
    for call in (lambda: client.move_job(name), client.drain):
        with pytest.raises(PreconditionError, match="no other daemon"):
            call()
    assert [server.address for server in client.servers()] == [daemon.address]
    client.delete_job(name)


def test_jobs_move_between_daemons(start: Start, postgres: str) -> None:
    """A job that is moved goes on where it was sent, at once, with its plan; a drained daemon has and takes none."""
    first, second = (start("--store", postgres).serving() for _ in range(2))
    with first.client() as one, second.client() as two:
        names = [one.create_job(f"job-{number}", small_job()).name for number in range(4)]
        version = planned(one, names[0])
        eventually(lambda: len(one.servers()) == 2)
        rank = Rank(one, names[0], 0)
        rank.next("welcome")
        done = moeplan("admin", "move", "job-0", "--to", second.address, "--server", first.address)
        assert done.stdout == f"jobs/job-0 is at {second.address}\n", done.stderr
        lost = rank.error()
        assert (lost.reason, lost.metadata["owner"]) == ("OWNED_ELSEWHERE", second.address)
        again = Rank(two, names[0], 0, hello={"reports_for": [0, 1]})
        assert again.next("welcome").plan.version == version
        again.report(0, tokens(2, ranks=2))
        again.close()
        with pytest.raises(PreconditionError, match="no other daemon there"):
            one.move_job(names[1], "127.0.0.1:1")

        done = moeplan("admin", "drain", "--server", first.address)
        assert done.returncode == 0, done.stderr
        eventually(lambda: {job.status.owner for job in two.jobs()} == {second.address})
        with Client(first.address, timeout_s=WAIT_S) as late:
            assert late.job(names[1]).status.owner == second.address
        shown = moeplan("admin", "servers", "--server", second.address).stdout
        assert "draining" in shown
        assert first.terminate() == 0
        assert set(names) <= {job.name for job in two.jobs()}
        assert two.plan(f"{names[0]}/plans/-").version >= version


def test_plans_are_made_wherever_a_job_goes(start: Start, postgres: str) -> None:
    """A job that moves again and again has a new plan after each move, and its versions only grow."""
    daemons = [start("--store", postgres).serving() for _ in range(2)]
    clients = [daemon.client() for daemon in daemons]
    name = clients[0].create_job("nomad", small_job(parameters=SolveParameters(work_limit=20))).name
    eventually(lambda: len(clients[0].servers()) == 2)
    step, version = 0, 1
    for turn in range(6):
        here, there = turn % 2, 1 - turn % 2
        rank = Rank(clients[here], name, 0, hello={"reports_for": [0, 1], "plan_version": version})
        assert rank.next("welcome").plan.version == version
        for _ in range(30):  # of which one at least is worth a plan
            rank.report(step, tokens(step, ranks=2))
            step += 1
        newest = rank.next("plan_update").plan.version
        assert newest > version
        assert clients[here].move_job(name) == daemons[there].address
        assert rank.error().reason == "OWNED_ELSEWHERE"
        rank.close()
        version = clients[there].plan(f"{name}/plans/-").version
        assert version >= newest
    for client in clients:
        client.close()


def test_a_new_daemon_gets_its_share(start: Start, postgres: str) -> None:
    """Jobs spread over daemons by their number, and each plan is there wherever its job goes."""
    options = ("--store", postgres, "--limit", "jobs=100")
    first = start(*options, environment={"MOEPLAN_LEASE_S": "5"}).serving(solver=False)
    with first.client() as client:
        names = [client.create_job(f"share-{number:02}", small_job()).name for number in range(30)]
        second = start(*options, environment={"MOEPLAN_LEASE_S": "5"}).serving(solver=False)
        eventually(lambda: all(daemon.metric("moeplan_jobs_owned") >= 10 for daemon in (first, second)))
        owners = {first.address, second.address}
        eventually(lambda: {client.job(name).status.owner for name in names} == owners)
        assert all(client.plan(f"{name}/plans/-").version == 1 for name in names)


def test_jobs_that_are_given_to_a_dead_daemon_come_back(start: Start, postgres: str) -> None:
    """A daemon that has just died is known to the others until its lease ends: it gets its share once, and no more."""
    first = start("--store", postgres, environment={"MOEPLAN_LEASE_S": "4"}).serving(solver=False)
    with first.client() as client, psycopg.connect(postgres, autocommit=True) as database:
        for number in range(30):
            client.create_job(f"job-{number:02}", small_job())
        database.execute(
            "INSERT INTO moeplan_daemons (owner, address, version, draining, alive_until) "
            "VALUES ('dead', '127.0.0.1:1', '0', false, extract(epoch from now()) + 3600)"
        )
        eventually(lambda: first.events("job given"))
        database.execute("DELETE FROM moeplan_daemons WHERE owner = 'dead'")
        eventually(lambda: {job.status.owner for job in client.jobs()} == {first.address})
        assert len(first.events("job given")) == len(first.events("job taken over")) <= 15


def test_an_older_store_and_a_newer_one_are_survived(start: Start, tmp_path: Path) -> None:
    """A store of before there were tables of daemons is opened; one with more tables and columns than we know, too."""
    data = tmp_path / "data"
    first = start(data=data).serving(solver=False)
    with first.client() as client:
        client.create_job("kept", small_job())
    first.terminate()
    with sqlite3.connect(data / "moeplan.sqlite3") as connection:
        connection.execute("DROP TABLE moeplan_daemons")
        connection.execute("CREATE TABLE moeplan_later (x INTEGER)")
        connection.execute("ALTER TABLE moeplan_jobs ADD COLUMN later TEXT")
    second = start(data=data).serving(solver=False)
    with second.client() as client:
        assert [job.name for job in client.jobs()] == ["jobs/kept"]
        client.create_job("new", small_job())
        client.delete_job("jobs/kept")
    second.terminate()
    with sqlite3.connect(data / "moeplan.sqlite3") as connection:
        connection.execute("UPDATE moeplan_meta SET schema = 99")
    status, text = start(data=data).end()
    assert status == 1
    assert "schema 99" in text
