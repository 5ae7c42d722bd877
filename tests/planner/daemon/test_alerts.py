"""Every alert fires when a real daemon gets into the state that it is for, and not before.

A metric or label that an alert asks for and that the daemon no longer has shows up here, as the alert stays silent. For
how long a condition must hold (`for`) is left to Prometheus.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from tests.planner.daemon.test_security import NOW, Authority
from tests.support.daemon import (
    WAIT_S,
    DaemonProcess,
    Rank,
    Start,
    eventually,
    make_jobs_unreadable,
    small_job,
    small_problem,
    tokens,
)
from tests.support.prometheus import Prometheus, Scrape, alerts, evaluate
from tests.support.slow_link import SlowLink, through

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.errors import ServiceError
from moeplan.api.jobs import Closing, JobSpec
from moeplan.v1 import planner_pb2

TRIED: set[str] = set()


def fires(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The alerts that a test brings to fire."""
    TRIED.update(names)
    return lambda test: test


def quiet(daemon: DaemonProcess, *names: str) -> Prometheus:
    """A Prometheus that has scraped the daemon twice, and none of these alerts fires."""
    prometheus = Prometheus(daemon)
    for _ in range(2):
        assert not any(prometheus.fires(name) for name in names)
    return prometheus


def report(client: Client, name: str, spec: JobSpec, steps: int = 1) -> Rank:
    """A rank that reports for all of a new job."""
    rank = Rank(client, client.create_job(name, spec).name, 0, hello={"reports_for": [0, 1]})
    for step in range(steps):
        rank.report(step, tokens(step, ranks=2))
    return rank


def report_and_see(rank: Rank, prometheus: Prometheus, alert: str) -> bool:
    """Whether the alert fires, after another step."""
    rank.report(rank.sequence, tokens(rank.sequence, ranks=2))
    return prometheus.fires(alert)


@fires("MoeplanDown")
def test_a_daemon_that_was_killed(start: Start) -> None:
    daemon = start().serving(solver=False)
    prometheus = quiet(daemon, "MoeplanDown")
    daemon.kill()
    assert prometheus.fires("MoeplanDown")


@fires("MoeplanNotReady", "MoeplanStoreFails", "MoeplanSolvesFail")
def test_a_store_whose_folder_is_removed(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    daemon = start(data=data).serving()
    prometheus = quiet(daemon, "MoeplanNotReady", "MoeplanStoreFails", "MoeplanSolvesFail")
    with daemon.client() as client:
        rank = report(client, "kept", small_job())
        rank.next("plan_update")
        data.rename(tmp_path / "elsewhere")
        eventually(lambda: report_and_see(rank, prometheus, "MoeplanSolvesFail"))
        eventually(lambda: prometheus.fires("MoeplanNotReady") and prometheus.fires("MoeplanStoreFails"))
        rank.close()


@fires("MoeplanSolvesFail")
def test_solves_whose_workers_hang(start: Start) -> None:
    daemon = start("--limit", "solve_s=0.1").serving()
    prometheus = quiet(daemon, "MoeplanSolvesFail")
    with daemon.client() as client:
        rank = report(client, "hangs", small_job())

        def hanging() -> bool:
            for worker in daemon.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGSTOP)
            return report_and_see(rank, prometheus, "MoeplanSolvesFail")

        eventually(hanging)
        rank.close()


@fires("MoeplanLeasesOld")
def test_a_database_that_answers_no_more(start: Start, postgres: str, link: Callable[[float], SlowLink]) -> None:
    path = link(0.0)
    daemon = start(environment={"MOEPLAN_STORE": through(path, postgres), "MOEPLAN_LEASE_S": "3"}).serving(solver=False)
    prometheus = quiet(daemon, "MoeplanLeasesOld")
    path.dead.set()
    eventually(lambda: prometheus.fires("MoeplanLeasesOld"))


@fires("MoeplanJobsUnreadable")
def test_a_job_that_cannot_be_read(start: Start, tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = start(data=data).serving(solver=False)
    quiet(first, "MoeplanJobsUnreadable")
    with first.client() as client:
        client.create_job("poison", small_job())
    first.terminate()
    make_jobs_unreadable(data)
    assert Prometheus(start(data=data).serving(solver=False)).fires("MoeplanJobsUnreadable")


@pytest.mark.slow
@fires("MoeplanJobsStalled")
def test_ranks_that_are_connected_and_silent(start: Start) -> None:
    daemon = start().serving(solver=False)
    with daemon.client() as client:
        rank = report(client, "silent", small_job(), steps=0)
        rank.next("welcome")
        prometheus = quiet(daemon, "MoeplanJobsStalled")
        time.sleep(60)
        eventually(lambda: prometheus.fires("MoeplanJobsStalled"))
        rank.close()


@fires("MoeplanPlansNotApplied")
def test_ranks_that_cannot_apply_their_plans(start: Start) -> None:
    daemon = start().serving()
    prometheus = quiet(daemon, "MoeplanPlansNotApplied")
    with daemon.client() as client:
        for number in range(5):
            rank = report(client, f"unfit-{number}", small_job())
            version = rank.next("plan_update").plan.version
            rank.send(failed=planner_pb2.PlanFailed(version=version, in_force_version=1, reason="no memory"))
            rank.next("plan_update")
            rank.close()
        assert prometheus.fires("MoeplanPlansNotApplied")


@fires("MoeplanJobsWait")
def test_jobs_that_wait_for_a_worker_that_hangs(start: Start) -> None:
    daemon = start("--limit", "solve_s=7").serving()
    prometheus = quiet(daemon, "MoeplanJobsWait")
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    with daemon.client() as client:
        ranks = [report(client, name, small_job()) for name in ("hangs", "waits")]
        eventually(lambda: prometheus.fires("MoeplanJobsWait"))
        for rank in ranks:
            rank.close()


@fires("MoeplanStatisticsUnused")
def test_a_rank_that_lags_behind_the_others(start: Start) -> None:
    daemon = start().serving(solver=False)
    prometheus = quiet(daemon, "MoeplanStatisticsUnused")
    with daemon.client() as client:
        name = client.create_job("apart", small_job(closing=Closing(timeout_s=0.1))).name
        ahead, behind = (Rank(client, name, rank) for rank in (0, 1))
        for step in range(10):
            ahead.report(step, tokens(step))
        eventually(lambda: client.job(name).status.closed_step == 9)
        for step in range(20):
            behind.report(step // 2, tokens(step))
        eventually(lambda: prometheus.fires("MoeplanStatisticsUnused"))
        ahead.close()
        behind.close()


@fires("MoeplanWorkersDie")
def test_workers_that_are_killed_again_and_again(start: Start) -> None:
    daemon = start().serving()
    prometheus = quiet(daemon, "MoeplanWorkersDie")
    with daemon.client() as client:
        for _ in range(11):
            for worker in daemon.workers():
                os.kill(worker, signal.SIGKILL)
            eventually(lambda: _solves(client))
    assert prometheus.fires("MoeplanWorkersDie")


def _solves(client: Client) -> bool:
    try:
        return bool(client.solve([small_problem()]))
    except ServiceError:
        return False


@fires("MoeplanFull")
def test_calls_beyond_a_limit(start: Start) -> None:
    daemon = start("--limit", "jobs=1").serving(solver=False)
    prometheus = quiet(daemon, "MoeplanFull")
    with daemon.client() as client:
        client.create_job("only", small_job())
        for number in range(11):
            request = planner_pb2.CreateJobRequest(job_id=f"more-{number}", job=wire.write_job_spec(small_job()))
            with pytest.raises(grpc.RpcError, match=r"limits\.jobs"):
                client.planner.CreateJob(request, timeout=WAIT_S)
    eventually(lambda: prometheus.fires("MoeplanFull"))


@fires("MoeplanSaturated")
def test_a_daemon_that_gets_too_little_of_the_processor(start: Start) -> None:
    """It is stopped most of the time, as by the quota of a container."""
    daemon = start().serving()
    prometheus = Prometheus(daemon)
    eventually(lambda: not prometheus.fires("MoeplanSaturated"))

    def starved() -> bool:
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        daemon.process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        return prometheus.fires("MoeplanSaturated")

    eventually(starved)


@fires("MoeplanCertificateEnds")
def test_a_certificate_that_ends_in_six_days(start: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("server", NOW + datetime.timedelta(days=8))
    daemon = start("--certificate", str(certificate), "--key", str(key)).serving(solver=False)
    with Client(daemon.address, Security(ca=authority.path)) as client:
        assert client.policies()
    eventually(lambda: daemon.metric("moeplan_certificate_end_seconds"))
    prometheus = quiet(daemon, "MoeplanCertificateEnds")
    authority.issue("server", NOW + datetime.timedelta(days=6))
    eventually(lambda: prometheus.fires("MoeplanCertificateEnds"))


def test_every_alert_has_a_test_that_makes_it_fire() -> None:
    assert {rule["alert"] for rule in alerts()} == TRIED


def test_a_quiet_daemon_raises_no_alert(start: Start) -> None:
    daemon = start().serving()
    with daemon.client() as client:
        rank = report(client, "quiet", small_job(), steps=3)
        rank.next("plan_update")
        quiet(daemon, *(rule["alert"] for rule in alerts()))
        rank.leave()


# What stands in for Prometheus


def series(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


SCRAPES = [
    Scrape(
        1_000.0 + 60 * number,
        {
            "up": {series(job="moeplan", instance="a"): 1.0, series(job="other", instance="a"): 0.0},
            "count_total": {series(instance="a", code="X"): count, series(instance="a", code="Y"): 2 * count},
            "lag": {series(instance="a"): count},
            "wait_bucket": {
                series(instance="a", le="1"): count,
                series(instance="a", le="5"): 2 * count,
                series(instance="a", le="+Inf"): 2 * count,
            },
        },
    )
    for number, count in enumerate((0.0, 10.0, 30.0, 6.0))  # begun anew before the last
]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * 3 - 4", 2.0),
        ('up{job="moeplan"} == 0', {}),
        ('up{job="other"} == 0', {series(job="other", instance="a"): 0.0}),
        ("time() - 180", 1_000.0),
        ("lag > 5 and lag < 7", {series(instance="a"): 6.0}),
        ("avg_over_time(lag[2m]) * 2", {series(instance="a"): 2 * 46 / 3}),
        ("increase(lag[1m])", {series(instance="a"): 6.0}),
        ('increase(count_total{code=~"X|Z"}[10m]) > 35', {series(instance="a", code="X"): 36.0}),
        ("sum by (instance) (rate(count_total[2m]))", {series(instance="a"): (26 + 52) / 120}),
        ("histogram_quantile(0.75, wait_bucket)", {series(instance="a"): 3.0}),
        ("lag > absent_total", {}),
    ],
)
def test_expressions_have_the_values_that_prometheus_gives(expression: str, value: object) -> None:
    assert evaluate(expression, SCRAPES) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    ["lag >= 5", "absent(lag)", "lag or up", "sum(lag)", 'lag{x!="y"}', "lag[5m]", "rate(lag)", "lag lag", "1 +", "-1"],
)
def test_what_is_not_known_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="not known here"):
        evaluate(expression, SCRAPES)


def test_one_sample_of_a_counter_is_no_increase() -> None:
    """A counter that begins with what it counts goes unseen, so those of alerts are there from the start."""
    last = SCRAPES[-1]
    assert evaluate("increase(new_total[5m])", [*SCRAPES, replace(last, samples={"new_total": {series(): 5.0}})]) == {}
