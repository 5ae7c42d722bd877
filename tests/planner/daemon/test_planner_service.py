"""The planner service: jobs, streams of ranks, plans."""

from __future__ import annotations

import itertools
import time
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, Start, eventually, small_job, tokens

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    ServiceError,
    UnavailableError,
)
from moeplan.api.job_plans import Reason
from moeplan.api.jobs import Closing, Forecast, ForecastMethod, JobSpec, Payback, Replan
from moeplan.solvers import Cluster, ExpertSpec, Layout, SolveParameters
from moeplan.v1 import job_pb2, planner_pb2, problem_pb2, tensor_pb2


@pytest.fixture
def job(client: Client, request: pytest.FixtureRequest) -> str:
    """A job of two ranks, named after the test."""
    name = request.node.name.replace("_", "-").replace("[", "-").replace("]", "").lower()[:60].rstrip("-")
    return client.create_job(name, small_job()).name


def test_create_get_list_delete(client: Client) -> None:
    names = [client.create_job(f"listed-{number}", small_job(policy="eplb")).name for number in range(5)]
    assert client.job(names[0]).spec.policy == "eplb"
    assert client.job(names[0]).status.plan_version == 1
    page = client.planner.ListJobs(planner_pb2.ListJobsRequest(page_size=2))
    seen = [job.name for job in page.jobs]
    while page.next_page_token:
        page = client.planner.ListJobs(planner_pb2.ListJobsRequest(page_size=2, page_token=page.next_page_token))
        assert len(page.jobs) <= 2
        seen += [job.name for job in page.jobs]
    assert seen == sorted(seen)
    assert set(names) <= set(seen)
    for name in names:
        client.delete_job(name)
    with pytest.raises(NotFoundError):
        client.job(names[0])
    with pytest.raises(NotFoundError):
        client.delete_job(names[0])


def test_one_step_from_the_far_future_does_not_end_planning(client: Client, job: str) -> None:
    rank = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    rank.report(2**62, tokens(0, ranks=2))
    for step in range(20):
        rank.report(step, tokens(step, ranks=2))
    eventually(lambda: client.job(job).status.closed_step == 19)
    rank.close()


def test_statistics_that_all_come_in_vain_are_said(daemon: DaemonProcess, client: Client, job: str) -> None:
    rank = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    rank.report(100, tokens(0, ranks=2))

    def warned() -> bool:
        rank.report(99, tokens(0, ranks=2))
        time.sleep(0.1)
        events = daemon.events("all statistics are late or early")
        return any(event["job"] == job and event["closed_step"] == 100 for event in events)

    eventually(warned)
    rank.close()


def test_creating_again_is_harmless_and_differing_is_not(client: Client) -> None:
    first = client.create_job("again", small_job())
    assert client.create_job("again", small_job()).created == first.created
    with pytest.raises(AlreadyExistsError) as error:
        client.create_job("again", small_job(layers=3))
    assert error.value.reason == "JOB_DIFFERS"
    later = client.create_job("again", small_job(layers=3), incarnation=1)
    assert later.status.plan_version == 2
    assert len(client.plan("jobs/again/plans/-").layers) == 3
    with pytest.raises(PreconditionError) as stale:
        client.create_job("again", small_job())
    assert stale.value.reason == "STALE_INCARNATION"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": 0}, "job.layers"),
        ({"ranks": -1}, "job.ranks"),
        ({"policy": "nonsense"}, "job.policy"),
        ({"policy": "eplb", "max_moves": 1}, "job.max_moves"),
        ({"forecast": job_pb2.Forecast(window_steps=-1)}, "job.forecast.window_steps"),
        ({"forecast": job_pb2.Forecast(smoothing=2)}, "job.forecast.smoothing"),
        ({"replan": job_pb2.Replan(every_steps=-1)}, "job.replan.every_steps"),
        ({"replan": job_pb2.Replan(payback=job_pb2.Payback())}, "job.replan.payback.horizon_steps"),
        ({"closing": job_pb2.Closing(quorum=float("nan"))}, "job.closing.quorum"),
        (
            {"forecast": job_pb2.Forecast(window_steps=4096), "layers": 4096, "ranks": 65536},
            "job.forecast.window_steps",
        ),
        ({"initial_layouts": tensor_pb2.Tensor(type=tensor_pb2.DATA_TYPE_INT32)}, "job.initial_layouts.data"),
        ({"incarnation": -1}, "job.incarnation"),
        ({"incarnation": 2**63 - 1}, "job.incarnation"),
        ({"expert": problem_pb2.ExpertSpec(seconds_per_token=1e300)}, "job.expert.seconds_per_token"),
        ({"cluster": problem_pb2.Cluster(slots=[6, 6], speed=[1e-308, 1e308])}, "job.cluster.speed[0]"),
        ({"cluster": problem_pb2.Cluster(slots=[6, 6], speed=[1.0, 1e7])}, "job.cluster.speed[0]"),
    ],
)
def test_bad_jobs_name_the_field(client: Client, change: dict[str, object], field: str) -> None:
    """Also to programs that write the messages themselves."""
    cluster = wire.write_cluster(Cluster.uniform(2, 6))
    message = job_pb2.Job(**{"cluster": cluster, "layers": 2, "experts": 8} | change)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as error:
        client._call("planner", "CreateJob", planner_pb2.CreateJobRequest(job_id="bad", job=message))
    assert list(error.value.violations) == [field]


@pytest.mark.parametrize("identity", ["", "Upper", "-x", "x-", "a" * 64, "a/b", "é"])
def test_bad_ids(client: Client, identity: str) -> None:
    with pytest.raises(InvalidRequestError, match="job_id"):
        client.create_job(identity, small_job())


def test_statistics_go_up_and_plans_come_down(client: Client, job: str) -> None:
    ranks = [Rank(client, job, rank) for rank in range(2)]
    for rank in ranks:
        welcome = rank.next("welcome")
        assert welcome.plan.version == 1
        assert len(welcome.plan.layers) == 2
    for number, rank in enumerate(ranks):
        rank.report(0, tokens(number))
    updates = [rank.next("plan_update").plan for rank in ranks]
    assert updates[0] == updates[1]
    plan = updates[0]
    assert plan.version == 2
    assert plan.decision.reason == job_pb2.Decision.REASON_GAIN
    assert plan.decision.cost_after_s < plan.decision.cost_before_s
    for layer in plan.layers:
        assert layer.version == 2
        assert layer.imbalance < layer.imbalance_before
        wire.read_layout("layout", layer.layout, 8)
    ranks[0].send(applied=planner_pb2.PlanApplied(version=2, step=1))
    assert eventually(lambda: client.job(job).status.applied_version == 2)
    status = client.job(job).status
    assert (status.connected_ranks, status.closed_step, status.statistics.accepted) == (2, 0, 4)
    for rank in ranks:
        rank.leave()
    assert eventually(lambda: client.job(job).status.connected_ranks == 0)


def test_updates_hold_only_what_changed(client: Client, job: str) -> None:
    with_both = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    with_both.next("welcome")
    with_both.report(0, tokens(0, ranks=2))
    first = with_both.next("plan_update").plan
    changed = tokens(0, ranks=2)
    alone = set(wire.read_array("layout", first.layers[1].layout)[0]) - set(
        wire.read_array("layout", first.layers[1].layout)[1]
    )
    changed[1] = 0
    changed[1, :, sorted(alone)] = 10_000  # experts that only the first device has
    for step in range(1, 12):  # the second layer's demand shifts, the first one's stays
        with_both.report(step, changed)
    second = with_both.next("plan_update").plan
    assert [layer.layer for layer in first.layers] == [0, 1]
    assert [layer.layer for layer in second.layers] == [1]
    whole = client.plan(f"{job}/plans/-")
    assert [layer.layer for layer in whole.layers] == [0, 1]
    assert client.plan(f"{job}/plans/1").version == 1
    with_both.close()


def test_a_rank_that_comes_back_gets_what_it_missed(client: Client, job: str) -> None:
    everyone = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    everyone.report(0, tokens(0, ranks=2))
    version = everyone.next("plan_update").plan.version
    everyone.close()
    again = Rank(client, job, 0, hello={"session": "session-0", "plan_version": version})
    welcome = again.next("welcome")
    assert welcome.plan.version == version
    assert not welcome.plan.layers
    again.close()
    fresh = Rank(client, job, 1)
    assert len(fresh.next("welcome").plan.layers) == 2
    fresh.close()


def test_statistics_are_acknowledged(client: Client, job: str) -> None:
    rank = Rank(client, job, 0)
    credit = rank.next("welcome").credit
    for step in range(credit):
        rank.report(step, tokens(step))
    assert rank.next("acknowledgement").sequence >= credit // 2
    rank.close()


def test_repeated_late_and_shuffled_statistics(client: Client, job: str) -> None:
    first, second = Rank(client, job, 0), Rank(client, job, 1)
    for step in (1, 0, 1):
        first.report(step, tokens(step))
    assert eventually(lambda: (c := client.job(job).status.statistics).duplicate and c).accepted == 4
    for step in (1, 0, 1):  # step 1 waits for step 0, which is open; both close, and the last report is late
        second.report(step, tokens(step))
    eventually(lambda: client.job(job).status.statistics.late == 2)
    first.report(0, tokens(0))
    count = eventually(lambda: (c := client.job(job).status.statistics).late == 4 and c)
    assert (count.accepted, count.duplicate) == (8, 2)
    assert client.job(job).status.closed_step == 1
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tokens": wire.write_array(np.full((2, 1, 8), np.nan))}, "statistics.tokens[0, 0, 0]"),
        ({"tokens": wire.write_array(np.full((2, 1, 8), -1))}, "statistics.tokens[0, 0, 0]"),
        ({"tokens": wire.write_array(np.full((2, 1, 8), 2**60))}, "statistics.tokens[0, 0, 0]"),
        ({"tokens": wire.write_array(np.ones((2, 1, 9), np.int64))}, "statistics.tokens.shape"),
        ({"tokens": wire.write_array(np.ones((2, 8), np.int64))}, "statistics.tokens.shape"),
        ({"tokens": tensor_pb2.Tensor()}, "statistics.tokens.type"),
        ({"step": -1}, "statistics.step"),
        ({"layers": [2, 0]}, "statistics.layers"),
        ({"layers": [0, 0]}, "statistics.layers"),
        ({"ranks": [1]}, "statistics.ranks"),
        ({"sequence": 0}, "statistics.sequence"),
    ],
)
def test_bad_statistics_end_the_stream_and_nothing_else(client: Client, fields: dict[str, object], field: str) -> None:
    name = client.create_job("bad-statistics", small_job()).name
    good, bad = Rank(client, name, 1), Rank(client, name, 0)
    good.next("welcome")
    bad.report(0, tokens(0), **fields)
    error = bad.error()
    assert isinstance(error, InvalidRequestError)
    assert list(error.violations) == [field]
    again = Rank(client, name, 0)
    again.next("welcome")
    step = (client.job(name).status.closed_step or 0) + 100
    good.report(step, tokens(1))
    again.report(step, tokens(0))
    eventually(lambda: client.job(name).status.closed_step == step)
    good.close()
    again.close()


@pytest.mark.parametrize(
    ("hello", "kind", "text"),
    [
        ({"job": "jobs/nowhere"}, NotFoundError, "jobs/nowhere"),
        ({"job": "nonsense"}, InvalidRequestError, "hello.job"),
        ({"rank": 2}, InvalidRequestError, "hello.rank"),
        ({"reports_for": [0, 7]}, InvalidRequestError, "hello.reports_for"),
        ({"reports_for": [0, 0]}, InvalidRequestError, "hello.reports_for"),
        ({"incarnation": -1}, InvalidRequestError, "hello.incarnation"),
        (
            {"incarnation": 2**63 - 1},
            InvalidRequestError,
            f"hello.incarnation = {2**63 - 1}: must be at most 2^53 ({2**53}); take the time of the start",
        ),
        ({"session": "x" * 65}, InvalidRequestError, "hello.session"),
    ],
)
def test_bad_hellos(client: Client, hello: dict[str, object], kind: type[ServiceError], text: str) -> None:
    name = client.create_job("hellos", small_job()).name
    error = Rank(client, name, 0, hello=hello).error()
    assert isinstance(error, kind)
    assert text in str(error)


def test_a_hello_that_is_refused_fences_nobody_out(client: Client) -> None:
    name = client.create_job("unfenced", small_job()).name
    Rank(client, name, 0, hello={"incarnation": 2**63 - 1}).error()
    assert client.job(name).incarnation == 0
    rank = Rank(client, name, 0)
    rank.next("welcome")
    rank.close()


def test_the_first_message_must_be_a_hello(client: Client, job: str) -> None:
    rank = Rank(client, "", 0)
    rank.report(0, tokens(0))
    assert isinstance(rank.error(), InvalidRequestError)
    silent = Rank(client, "", 0)
    assert silent.error().code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_two_processes_cannot_be_one_rank(client: Client, job: str) -> None:
    first = Rank(client, job, 0, hello={"session": "a"})
    first.next("welcome")
    error = Rank(client, job, 0, hello={"session": "b"}).error()
    assert isinstance(error, AlreadyExistsError)
    assert error.reason == "RANK_TAKEN"
    again = Rank(client, job, 0, hello={"session": "a"})  # a half-open connection is replaced by its own process
    again.next("welcome")
    assert first.error().reason == "SUPERSEDED"
    again.close()


def test_an_earlier_start_is_fenced_out(client: Client, job: str) -> None:
    old = Rank(client, job, 0)
    old.next("welcome")
    new = Rank(client, job, 0, hello={"incarnation": 3, "session": "new"})
    assert new.next("welcome").plan.version == 1
    assert old.error().reason == "SUPERSEDED"
    late = Rank(client, job, 1, hello={"incarnation": 2}).error()
    assert isinstance(late, PreconditionError)
    assert (late.reason, late.metadata["newest"]) == ("STALE_INCARNATION", "3")
    assert client.job(job).incarnation == 3
    new.close()


def test_a_plan_that_cannot_be_applied_is_taken_back(client: Client, job: str) -> None:
    rank = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    rank.report(0, tokens(0, ranks=2))
    version = rank.next("plan_update").plan.version
    rank.send(failed=planner_pb2.PlanFailed(version=version, in_force_version=1, reason="out of memory"))
    back = rank.next("plan_update").plan
    assert back.version == version + 1
    assert back.decision.reason == job_pb2.Decision.REASON_APPLY_FAILED
    for layer in back.layers:
        assert wire.read_layout("layout", layer.layout, 8) == Layout.contiguous(8, [6, 6])
    rank.close()


def test_watch(client: Client, job: str) -> None:
    plans = client.watch_plans(job)
    assert next(plans).version == 1
    rank = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    rank.report(0, tokens(0, ranks=2))
    assert next(plans).version == 2
    client.delete_job(job)
    with pytest.raises(NotFoundError):
        next(plans)
    assert isinstance(rank.error(), NotFoundError)


def test_a_slow_reader_gets_the_newest_plan(client: Client) -> None:
    """A reader that sleeps through many plans holds nothing up, costs no memory, and then finds the newest."""
    last = Forecast(ForecastMethod.LAST)
    job = client.create_job("slow-reader", small_job(forecast=last)).name
    slow = client.planner.WatchPlans(planner_pb2.WatchPlansRequest(job=job), timeout=WAIT_S)
    next(iter(slow))
    rank = Rank(client, job, 0, hello={"reports_for": [0, 1]})
    steps = itertools.count()

    def report() -> int:
        step = next(steps)
        rank.report(step, tokens(step, ranks=2))
        return client.job(job).status.plan_version

    newest = eventually(lambda: (version := report()) > 10 and version)
    seen = [next(iter(slow)).plan.version]
    while seen[-1] < newest:
        seen.append(next(slow).plan.version)
    assert seen == sorted(set(seen))
    rank.close()


def test_incomplete_steps_close_by_time(client: Client) -> None:
    name = client.create_job("incomplete", small_job(closing=Closing(timeout_s=0.2))).name
    rank = Rank(client, name, 0)
    rank.report(7, tokens(0))
    status = eventually(lambda: (s := client.job(name).status).closed_step is not None and s)
    assert (status.closed_step, status.statistics.missing) == (7, 2)
    rank.close()


def test_moves_that_do_not_pay_are_not_made(client: Client) -> None:
    never = Replan(payback=Payback(horizon_steps=1, cost_factor=1e30))
    dear = small_job(replan=never, expert=ExpertSpec(weight_bytes=2**40))
    name = client.create_job("dear", dear).name
    rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
    rank.report(0, tokens(0, ranks=2))
    decision = eventually(
        lambda: (d := client.job(name).status.decision) is not None and d.step == 0 and d.window_steps and d
    )
    assert decision.reason is Reason.GAIN_TOO_SMALL
    assert client.job(name).status.plan_version == 1
    rank.close()


def test_limits_of_jobs_memory_and_streams(limited: DaemonProcess) -> None:
    with limited.client() as client:
        wide = small_job(forecast=Forecast(window_steps=8), experts=64, slots=32, devices=4)
        client.create_job("one", wide)
        with pytest.raises(UnavailableError) as memory:
            client.create_job("two", wide)
        assert memory.value.reason == "MEMORY"
        for number in range(2):
            client.create_job(f"small-{number}", small_job())
        with pytest.raises(UnavailableError) as many:
            client.create_job("one-too-many", small_job())
        assert many.value.reason == "JOBS"
        request = planner_pb2.WatchPlansRequest(job="jobs/small-0")
        watches = [client.planner.WatchPlans(request, timeout=WAIT_S) for _ in range(3)]
        for watch in watches:
            next(watch)
        streams = Rank(client, "jobs/small-0", 0).error()
        assert streams.reason == "STREAMS"
        assert streams.retry_s
        for watch in watches:
            watch.cancel()
        eventually(lambda: limited.metric('moeplan_streams{kind="watch"}') == 0)
        rank = Rank(client, "jobs/small-0", 0)
        rank.next("welcome")
        rank.close()


def test_metrics_tell_what_happened(daemon: DaemonProcess) -> None:
    assert daemon.metric('moeplan_decisions_total{reason="gain"}') > 0
    assert daemon.metric("moeplan_statistics_bytes_total") > 0
    assert daemon.metric("moeplan_imbalance_before_count") == daemon.metric("moeplan_gap_count") > 0


def test_what_is_no_message_is_said_to_be_none(daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(daemon.address) as channel:
        for method in ("PlannerService/GetJob", "SolverService/Solve"):
            call: Any = channel.unary_unary(f"/moeplan.v1.{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff\xff\xff", timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream: Any = channel.stream_stream("/moeplan.v1.PlannerService/StreamRank")
        with pytest.raises(grpc.RpcError) as caught:
            next(stream(iter([b"\xff\xff\xff"]), timeout=WAIT_S))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not daemon.events("call failed")


def test_a_policy_or_solver_that_is_not_there_is_refused_at_once(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="did you mean hybrid"):
        client.create_job("typed", small_job(policy="hybird"))
    with pytest.raises(InvalidRequestError, match=r"parameters\.solver"):
        client.create_job("typed", small_job(parameters=SolveParameters(solver="gurobbi")))


def test_pages_are_cut_by_bytes_too(start: Start) -> None:
    """A page holds no more than half a message may; with its tokens every job comes, once."""
    daemon = start("--limit", "message_bytes=20000").serving(solver=False)
    with daemon.client() as client:
        big = JobSpec(Cluster.uniform(400, 2), 1, 8, ranks=1, merge_sources=True)
        names = [client.create_job(f"big-{number}", big).name for number in range(6)]
        first = client.planner.ListJobs(planner_pb2.ListJobsRequest(page_size=100))
        assert 0 < len(first.jobs) < len(names)
        assert first.next_page_token
        assert [job.name for job in client.jobs()] == names
