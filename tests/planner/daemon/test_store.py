"""Several daemons behind one PostgreSQL: each job has one owner, and a dead owner's jobs go to the others."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import psycopg
import pytest
from tests.support.daemon import Rank, Start, eventually, small_job, tokens

from moeplan.api.client import Client
from moeplan.api.errors import ServiceError, UnavailableError


def test_two_daemons_share_a_store_and_one_takes_over(start: Start, postgres: str, tmp_path: Path) -> None:
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": "1"}
    first = start(environment=environment, data=tmp_path / "unused").serving()
    second = start(environment=environment, data=tmp_path / "unused").serving()
    assert not (tmp_path / "unused").exists()
    with first.client() as one, Client(second.address, timeout_s=5) as two:
        name = one.create_job("shared", small_job()).name
        assert one.job(name).status.owner == two.job(name).status.owner == first.address
        rank = Rank(one, name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        version = rank.next("plan_update").plan.version
        assert two.plan(f"{name}/plans/-").version == version  # anyone may read
        refused = Rank(two, name, 0).error()
        assert isinstance(refused, UnavailableError)
        assert (refused.reason, refused.metadata["owner"]) == ("OWNED_ELSEWHERE", first.address)
        # The client follows to the owner by itself.
        assert Client(second.address).create_job("shared", small_job()).name == name
        first.kill()

        def taken_over() -> Rank | None:
            attempt = Rank(two, name, 0, hello={"reports_for": [0, 1], "plan_version": version})
            try:
                assert attempt.next("welcome").plan.version == version
            except Exception:
                return None
            return attempt

        again = eventually(taken_over, 20)
        for step in range(1, 30):
            again.report(step, tokens(step, ranks=2))
        assert again.next("plan_update").plan.version > version
        assert two.job(name).status.owner == second.address
        rank.close()
        again.close()
        two.delete_job(name)


def test_a_daemon_that_slept_through_its_lease_cannot_write(start: Start, postgres: str) -> None:
    """SIGSTOP is the longest clock jump: the daemon wakes up believing that it still owns the job."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": "1"}
    first = start(environment=environment).serving()
    second = start(environment=environment).serving(solver=False)
    with first.client() as one, Client(second.address, timeout_s=5) as two:
        name = one.create_job("slept", small_job()).name
        rank = Rank(one, name, 0, hello={"reports_for": [0, 1]})
        rank.next("welcome")
        first.process.send_signal(signal.SIGSTOP)
        eventually(lambda: two.job(name).status.owner == second.address, 20)
        first.process.send_signal(signal.SIGCONT)
        rank.report(0, tokens(0, ranks=2))
        error = rank.error()
        assert isinstance(error, ServiceError)
        assert error.reason == "OWNED_ELSEWHERE"
        assert two.job(name).status.plan_version == 1
        two.delete_job(name)


def test_a_daemon_that_stops_within_a_transaction_holds_nothing_up(start: Start, postgres: str) -> None:
    """It has rows locked and will never let go of them; another one takes its jobs over all the same."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": "1"}
    first = start(environment=environment).serving()
    second = start(environment=environment).serving(solver=False)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with first.client() as one, Client(second.address, timeout_s=5) as two:
        names = [one.create_job(name, small_job()).name for name in ("stuck-a", "stuck-b")]
        with psycopg.connect(postgres) as connection, psycopg.connect(postgres, autocommit=True) as looking:
            connection.execute("SELECT 1 FROM moeplan_jobs WHERE name = 'stuck-b' FOR UPDATE")
            eventually(lambda: looking.execute(waiting).fetchone() == (1,), 20)  # renews: has stuck-a, waits for -b
            first.process.send_signal(signal.SIGSTOP)
            connection.rollback()  # now it has both, and is stopped before its commit
        eventually(lambda: all(two.job(name).status.owner == second.address for name in names), 20)
        first.process.send_signal(signal.SIGCONT)
        eventually(lambda: one.job(names[0]).status.owner == second.address, 20)
        for name in names:
            two.delete_job(name)


def test_a_job_that_was_lost_and_comes_straight_back_is_served_anew(start: Start, postgres: str) -> None:
    """Its old streams end, though this daemon owns it again a moment later."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": "1"}
    daemon = start(environment=environment).serving()
    with daemon.client() as client:
        name = client.create_job("boomerang", small_job()).name
        rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        rank.next("welcome")
        change = "UPDATE moeplan_jobs SET owner = 'gone', leased_until = 0 WHERE name = 'boomerang'"
        with psycopg.connect(postgres, autocommit=True) as connection:
            assert connection.execute(change).rowcount == 1
        error = rank.error()
        assert isinstance(error, ServiceError)
        assert error.reason == "OWNED_ELSEWHERE"

        def served() -> bool:
            return client.job(name).status.owner == daemon.address

        eventually(served, 20)
        again = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        again.report(0, tokens(0, ranks=2))
        assert again.next("plan_update").plan.version == 2
        again.close()
        client.delete_job(name)


def test_a_store_that_is_away_is_said(start: Start) -> None:
    status, output = start(environment={"MOEPLAN_STORE": "postgresql://moeplan:secret-word@127.0.0.1:1/none"}).end()
    assert status == 1
    assert "cannot be used" in output
    assert "secret-word" not in output


def test_the_database_is_a_real_one(postgres: str) -> None:
    """The tests above must not run against something else by accident."""
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("no psql")
    version = subprocess.run([psql, postgres, "-Atc", "select version()"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("PostgreSQL")
