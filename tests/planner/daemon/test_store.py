"""Several daemons behind one PostgreSQL: each job has one owner, and a dead owner's jobs go to the others."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.daemon import WAIT_S, Rank, Start, eventually, make_jobs_unreadable, small_job, tokens
from tests.support.slow_link import SlowLink, through

from moeplan.api.client import Client
from moeplan.api.errors import ServiceError, UnavailableError
from moeplan.planner.daemon.database import StoreError
from moeplan.planner.daemon.metrics import Metrics
from moeplan.planner.daemon.store import LeaseLostError, Store
from moeplan.solvers import SolveParameters

LEASE_S = "3"
"""Long enough that a busy machine does not lose it, short enough to wait for its end."""

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(address: str, service: str = "moeplan.v1.PlannerService") -> int:
    """What a daemon says of one of its services."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S).status
        return status


def test_two_daemons_share_a_store_and_one_takes_over(start: Start, postgres: str, tmp_path: Path) -> None:
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}
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

        again = eventually(taken_over)
        for step in range(1, 30):
            again.report(step, tokens(step, ranks=2))
        assert again.next("plan_update").plan.version > version
        assert two.job(name).status.owner == second.address
        rank.close()
        again.close()
        two.delete_job(name)


@pytest.mark.slow
def test_a_daemon_that_slept_through_its_lease_cannot_write(start: Start, postgres: str) -> None:
    """SIGSTOP is the longest clock jump: the daemon wakes up believing that it still owns the job."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}
    first = start(environment=environment).serving()
    second = start(environment=environment).serving(solver=False)
    with first.client() as one, Client(second.address, timeout_s=5) as two:
        name = one.create_job("slept", small_job()).name
        rank = Rank(one, name, 0, hello={"reports_for": [0, 1]})
        rank.next("welcome")
        first.process.send_signal(signal.SIGSTOP)
        eventually(lambda: two.job(name).status.owner == second.address)
        first.process.send_signal(signal.SIGCONT)
        rank.report(0, tokens(0, ranks=2))
        error = rank.error()
        assert isinstance(error, ServiceError)
        assert error.reason == "OWNED_ELSEWHERE"
        assert two.job(name).status.plan_version == 1
        two.delete_job(name)


@pytest.mark.slow
def test_a_daemon_that_stops_within_a_transaction_holds_nothing_up(start: Start, postgres: str) -> None:
    """It has rows locked and will never let go of them; another one takes its jobs over all the same."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}
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
        eventually(lambda: all(two.job(name).status.owner == second.address for name in names))
        first.process.send_signal(signal.SIGCONT)
        eventually(lambda: one.job(names[0]).status.owner == second.address)
        for name in names:
            two.delete_job(name)


@pytest.mark.slow
def test_a_job_that_was_lost_and_comes_straight_back_is_served_anew(start: Start, postgres: str) -> None:
    """Its old streams end, though this daemon owns it again a moment later."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}
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

        eventually(served)
        again = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        again.report(0, tokens(0, ranks=2))
        assert again.next("plan_update").plan.version == 2
        again.close()
        client.delete_job(name)


@pytest.mark.slow
def test_a_database_that_answers_no_more_ends_ownership(
    start: Start, postgres: str, link: Callable[[float], SlowLink]
) -> None:
    """The owner lets go by its own clock; its rank goes to the daemon that takes over; it comes back by itself."""
    path = link(0.0)
    first = start(environment={"MOEPLAN_STORE": through(path, postgres), "MOEPLAN_LEASE_S": LEASE_S}).serving()
    second = start(environment={"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}).serving(solver=False)
    with first.client() as one, Client(second.address, timeout_s=5) as two:
        name = one.create_job("swallowed", small_job()).name
        rank = Rank(one, name, 0, hello={"reports_for": [0, 1]})
        rank.next("welcome")
        path.dead.set()
        error = rank.error()
        assert isinstance(error, ServiceError)
        assert error.reason == "OWNED_ELSEWHERE"
        eventually(lambda: health_of(first.address) == NOT_SERVING)
        eventually(lambda: two.job(name).status.owner == second.address)
        path.dead.clear()
        eventually(lambda: one.job(name).status.owner == second.address)
        eventually(lambda: health_of(first.address) == SERVING)
        two.delete_job(name)


@pytest.mark.slow
def test_many_jobs_behind_a_slow_network_are_taken_over_at_once(
    start: Start, postgres: str, link: Callable[[float], SlowLink]
) -> None:
    """Statements by job would take 1,000 x 50 ms, and the first leases would be over before the last were taken."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": "10"}
    daemon = start(environment=environment).serving(solver=False)
    with daemon.client() as client:
        client.create_job("many-0", small_job())
    daemon.terminate()
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO moeplan_jobs SELECT 'many-' || n, incarnation, spec, created, version, '', '', 0 "
            "FROM moeplan_jobs, generate_series(1, 999) n WHERE name = 'many-0'"
        )
        connection.execute(
            "INSERT INTO moeplan_plans SELECT 'many-' || n, version, plan "
            "FROM moeplan_plans, generate_series(1, 999) n WHERE job = 'many-0'"
        )
        try:
            far = start(environment={"MOEPLAN_STORE": through(link(0.025), postgres), "MOEPLAN_LEASE_S": "10"}).serving(
                solver=False
            )
            assert far.events("serving")[0]["jobs"] == 1_000
            time.sleep(12)
            assert len(far.events("job lost")) == 0
            owners = connection.execute(
                "SELECT count(*), min(leased_until) > extract(epoch from now()) FROM moeplan_jobs WHERE owner != ''"
            )
            assert owners.fetchone() == (1_000, True)
        finally:
            connection.execute("DELETE FROM moeplan_jobs")


def test_a_burst_of_plans_behind_a_slow_network_costs_no_lease(
    start: Start, postgres: str, link: Callable[[float], SlowLink]
) -> None:
    """With 50 ms a statement, statements for each of 40 plans would take longer than the lease."""
    path = link(0.0)
    daemon = start(environment={"MOEPLAN_STORE": through(path, postgres), "MOEPLAN_LEASE_S": "6"}).serving()
    job = small_job(parameters=SolveParameters(work_limit=20))
    with daemon.client() as client:
        names = [client.create_job(f"burst-{number:02}", job).name for number in range(40)]
        ranks = [Rank(client, name, 0, hello={"reports_for": [0, 1]}) for name in names]
        path.delay_s = 0.025
        for step in range(40):
            for number, rank in enumerate(ranks):
                rank.report(step, tokens(100 * step + number, ranks=2))
            time.sleep(0.2)
        eventually(lambda: all(client.plan(f"{name}/plans/-").version > 2 for name in names))
        for rank in ranks:
            rank.close()
    assert not daemon.events("job lost")
    assert not daemon.events("store failed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE moeplan_jobs SET spec = 'rubbish' WHERE name = 'poison'",
        "UPDATE moeplan_jobs SET spec = '' WHERE name = 'poison'",
        "UPDATE moeplan_plans SET plan = 'rubbish' WHERE job = 'poison'",
        "UPDATE moeplan_plans SET plan = '' WHERE job = 'poison'",
        "UPDATE moeplan_plans SET plan = (SELECT plan FROM moeplan_plans WHERE job = 'other') WHERE job = 'poison'",
        "DELETE FROM moeplan_plans WHERE job = 'poison'",
        "UPDATE moeplan_jobs SET version = 7 WHERE name = 'poison'",
    ],
)
def test_a_row_that_cannot_be_read_harms_no_other_job(start: Start, postgres: str, damage: str) -> None:
    """It is left out, named and counted; a newer incarnation heals it, and so does deleting it."""
    environment = {"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}
    first = start(environment=environment).serving(solver=False)
    with first.client() as client:
        for name in ("healthy", "poison"):
            client.create_job(name, small_job())
        client.create_job("other", small_job(layers=3))
        first.kill()
    with psycopg.connect(postgres, autocommit=True) as connection:
        assert connection.execute(damage).rowcount == 1
    second = start(environment=environment).serving(solver=False)
    with second.client() as client:
        eventually(lambda: client.job("jobs/healthy").status.owner == second.address)
        eventually(lambda: second.metric("moeplan_jobs_unreadable") == 1)
        assert {event["job"] for event in second.events("job not readable")} == {"jobs/poison"}
        assert "jobs/healthy" in {job.name for job in client.jobs()}
        assert "jobs/poison" not in {job.name for job in client.jobs()}
        for call in (
            lambda: client.job("jobs/poison"),
            lambda: client.create_job("poison", small_job()),
            lambda: Rank(client, "jobs/poison", 0).next("welcome"),
        ):
            with pytest.raises((ServiceError, grpc.RpcError), match="cannot be read"):
                call()
        client.create_job("late", small_job())  # the lease task goes on
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute("UPDATE moeplan_jobs SET owner = 'gone', leased_until = 0 WHERE name = 'late'")
        eventually(lambda: client.job("jobs/late").status.owner == second.address and second.events("job lost"))
        assert client.create_job("poison", small_job(), incarnation=1).status.plan_version > 1
        assert second.metric("moeplan_jobs_unreadable") == 0
        for name in ("healthy", "poison", "other", "late"):
            client.delete_job(f"jobs/{name}")


def test_a_row_that_cannot_be_read_can_be_deleted(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = start(data=data).serving(solver=False)
    with first.client() as client:
        client.create_job("poison", small_job())
    first.terminate()
    make_jobs_unreadable(data)
    second = start(data=data).serving(solver=False)
    with second.client() as client:
        assert not list(client.jobs())
        client.delete_job("jobs/poison")
        assert second.metric("moeplan_jobs_unreadable") == 0
        assert client.create_job("poison", small_job()).status.plan_version == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_plan_that_cannot_be_kept_costs_no_other(
    shared: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Plans that wait together are written together; a row that is in the way of one stops that one only."""
    url = request.getfixturevalue("postgres") if shared else ""
    store = Store(url, tmp_path, owner="me", address="here", lease_s=30.0, kept=100, metrics=Metrics())
    names = [f"job-{number}" for number in range(8)]

    async def write() -> list[BaseException | None]:
        await store.open()
        for name in names:
            await store.create(name, 1, b"spec", 1, b"first")
        in_the_way = "INSERT INTO moeplan_plans (job, version, plan) VALUES ('job-3', 2, 'rubbish')"
        if shared:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(in_the_way)
        else:
            with contextlib.closing(sqlite3.connect(tmp_path / "moeplan.sqlite3")) as database, database:
                database.execute(in_the_way)
        saves = [store.save(name, incarnation=1, version=2, plan=b"second") for name in [*names, "nobody's"]]
        try:
            done = await asyncio.gather(*saves, return_exceptions=True)
            for name in names:
                row, plan = await store.job(name), await store.plan(name, None)
                assert row is not None
                assert plan is not None
                assert (row.version, plan.plan) == ((1, b"rubbish") if name == "job-3" else (2, b"second"))
            await store.save(names[0], incarnation=5, spec=b"other")
            row = await store.job(names[0])
            assert row is not None
            assert (row.incarnation, row.spec, row.version) == (5, b"other", 2)
            return done
        finally:
            await store.close()

    *kept, lost = asyncio.run(write())
    assert isinstance(lost, LeaseLostError)
    assert [type(found) for found in kept] == [StoreError if name == "job-3" else type(None) for name in names]


FULL = """
    CREATE FUNCTION full_disk() RETURNS trigger AS $$ BEGIN
        RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
    END $$ LANGUAGE plpgsql;
    CREATE TRIGGER full_disk BEFORE INSERT ON moeplan_plans EXECUTE FUNCTION full_disk()
"""
"""What a full disk is to a client of PostgreSQL: rows that are there can be changed, as their space is used again."""


def test_a_daemon_is_not_ready_for_as_long_as_the_databases_disk_is_full(start: Start, postgres: str) -> None:
    """Leases are renewed all the while; that they are does not make it ready."""
    daemon = start(environment={"MOEPLAN_STORE": postgres, "MOEPLAN_LEASE_S": LEASE_S}).serving(solver=False)
    with daemon.client() as client, psycopg.connect(postgres, autocommit=True) as connection:
        client.create_job("kept", small_job())
        connection.execute(FULL)
        try:
            with pytest.raises(ServiceError, match="No space left") as error:
                Client(daemon.address, timeout_s=5).create_job("refused", small_job())
            assert error.value.reason == "STORE_FULL"
            eventually(lambda: health_of(daemon.address) == NOT_SERVING)
            leased = "SELECT leased_until FROM moeplan_jobs WHERE name = 'kept'"
            before = connection.execute(leased).fetchone()
            eventually(lambda: connection.execute(leased).fetchone() != before)
            eventually(lambda: len(daemon.events("store failed")) >= 3)
            assert health_of(daemon.address) == NOT_SERVING
            assert len(daemon.events("not ready")) == 1
        finally:
            connection.execute("DROP FUNCTION full_disk CASCADE")
        eventually(lambda: health_of(daemon.address) == SERVING)
        assert not daemon.events("job lost")
        assert [job.name for job in client.jobs()] == ["jobs/kept"]
        assert connection.execute("SELECT count(*) FROM moeplan_jobs").fetchone() == (1,)  # nothing of the probes
        client.create_job("after", small_job())
        for name in ("kept", "after"):
            client.delete_job(f"jobs/{name}")


def test_a_store_has_failed_until_there_is_room_for_what_it_refused(tmp_path: Path) -> None:
    """What is smaller may find room, and rows may go; neither helps the plan that did not."""
    store = Store("", tmp_path, owner="me", address="here", lease_s=30.0, kept=100, metrics=Metrics())

    def allow(pages: int) -> None:
        with contextlib.closing(store._database.engine.raw_connection()) as connection:
            connection.cursor().execute(f"PRAGMA max_page_count = {pages}")

    async def write() -> None:
        await store.open()
        try:
            for name in ("first", "second"):
                await store.create(name, 1, b"spec", 1, bytes(100_000))
            assert not store.failure
            allow(80)
            with pytest.raises(StoreError, match="full"):
                await store.create("large", 1, b"spec", 1, bytes(300_000))
            await store.create("small", 1, b"spec", 1, b"plan")
            await store.delete("first")
            assert "full" in store.failure
            with pytest.raises(StoreError, match="full"):
                await store.probe()
            assert "full" in store.failure
            allow(1_000)
            await store.probe()
            assert not store.failure
            assert sorted(row.name for row in await store.jobs("", 10, 1_000)) == ["second", "small"]
        finally:
            await store.close()

    asyncio.run(write())


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
    command = [psql, postgres, "-Atc", "select version()"]
    version = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert version.stdout.startswith("PostgreSQL")
