"""The rank's line to the planner: real daemons, real ranks, and planners that misbehave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import grpc
import numpy as np
import pytest
import torch.distributed as dist
from tests.support.daemon import DaemonProcess, Start, eventually, started
from tests.support.equality import same
from torch.utils.data import DataLoader, Dataset

from moeplan.api.client import Client
from moeplan.api.jobs import Closing, Forecast, ForecastMethod, JobSpec, Payback, Replan
from moeplan.runtime_client.errors import AgreementError
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.planning.agreement import Agreement
from moeplan.runtime_client.planning.planner_stream import PlannerStream
from moeplan.runtime_client.planning.session import PlannerSession
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.v1 import job_pb2, planner_pb2, planner_pb2_grpc, tensor_pb2

LAYERS, EXPERTS, SLOTS = 2, 8, 6
LIMIT_S = 150.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    for starter in started(lambda: tmp_path_factory.mktemp("data")):
        yield starter().serving()


def contiguous(devices: int) -> Layout:
    return Layout.contiguous(EXPERTS, np.full(devices, -(-EXPERTS // devices), np.int32))


def counts_of(rank: int, step: int) -> Int64:
    """Uneven, and drifting."""
    rng = np.random.default_rng([rank, step // 10])
    return rng.integers(0, 100, (LAYERS, EXPERTS)) ** 2


def train(session: PlannerSession, rank: int, steps: int, until: int, seen: list[Any]) -> None:
    """Steps until so many switches, and at least so many steps; the same number on all ranks."""
    end = time.monotonic() + LIMIT_S
    step = 0
    while step < steps or (session.switches < until and time.monotonic() < end):
        if session.step(counts_of(rank, step)):
            seen.append((step, session.version))
        step += 1
        time.sleep(0.01)


# Agreement


def votes(newest: Sequence[Sequence[int]], kept: Sequence[set[int]]) -> list[int | None]:
    agreement = Agreement(dist.new_group(backend="gloo"), timeout=timedelta(seconds=20))
    rank = dist.get_rank()
    outcome = [agreement.vote(version, kept[rank].__contains__) for version in newest[rank]]
    agreement.finish()
    return outcome


def test_ranks_switch_together_to_the_newest_version_that_all_hold(ranks: Any) -> None:
    newest = [[1, 3, 3, 3, 3, 3], [0, 2, 3, 3, 3, 3], [2, 3, 3, 3, 4, 4]]
    first, *others = ranks(3, votes, newest, [{1, 2, 3}, {1, 2, 3}, {2, 3, 4}])
    assert first == [None, None, 2, 3, None, None]
    assert all(other == first for other in others)


def test_a_version_that_one_rank_never_saw_is_passed_over(ranks: Any) -> None:
    newest = [[1, 1, 2, 2], [2, 2, 2, 2]]
    first, second = ranks(2, votes, newest, [{1, 2}, {2}])
    assert first == second == [None, None, None, 2]


def lonely_vote() -> str:
    agreement = Agreement(dist.new_group(backend="gloo"), timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        time.sleep(2.5)
        return ""
    agreement.vote(1, lambda version: True)
    with pytest.raises(AgreementError) as raised:
        agreement.vote(1, lambda version: True)
    return str(raised.value)


def test_waiting_for_a_rank_has_a_limit(ranks: Any) -> None:
    message, _ = ranks(2, lonely_vote)
    assert "limit 1 s" in message


# With a daemon


def planned(address: str, job: str, reporting: Any, steps: int, until: int, rank_seconds: float = 0.0) -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    seen: list[Any] = []
    applied: list[Any] = [contiguous(size)] * LAYERS

    def apply(plan: Sequence[PlannedLayer]) -> None:
        applied[:] = [planned.layout for planned in plan]

    with PlannerSession(
        address, job, applied, apply, slots=SLOTS, reporting=reporting, timeout=timedelta(seconds=30)
    ) as session:
        if rank == 1:
            time.sleep(rank_seconds)
        step, end, done = 0, time.monotonic() + LIMIT_S, False
        while not done:
            if session.step(counts_of(rank, step)):
                seen.append((step, session.version, [layout.slots.tolist() for layout in applied]))
            step += 1
            time.sleep(0.01 + rank_seconds / 100)
            votes = [None] * size
            dist.all_gather_object(votes, (session.switches >= until and step >= steps) or time.monotonic() > end)
            done = all(votes)
        status = session.status
    return seen, status


def rules_in_force(
    address: str, job: str, reporting: Any, policy: str, rule: SplitRule | None, expected: str
) -> set[str]:
    """The split rules that come with plans until the expected one does, on a cluster with a slow rank."""
    size = dist.get_world_size()
    found: set[str] = set()

    def apply(plan: Sequence[PlannedLayer]) -> None:
        assert all(planned.division.cluster.speed[1] == 0.5 for planned in plan)
        found.update(planned.division.rule for planned in plan)

    cluster = Cluster.uniform(size, SLOTS, speed=[1.0, 0.5, 1.0][:size])
    with PlannerSession(
        address,
        job,
        [contiguous(size)] * LAYERS,
        apply,
        slots=SLOTS,
        cluster=cluster,
        policy=policy,
        split_rule=rule,
        reporting=reporting,
        timeout=timedelta(seconds=30),
    ) as session:
        end, step = time.monotonic() + LIMIT_S, 0
        while expected not in found and time.monotonic() < end:  # the first version may be the layouts it began with
            session.step(counts_of(dist.get_rank(), step))
            step += 1
            time.sleep(0.01)
    return found


@pytest.mark.parametrize("reporting", ["rank", "group"])
@pytest.mark.parametrize(
    ("policy", "rule", "expected"),
    [("eplb", None, "even"), ("hybrid", None, "optimal"), ("hybrid", SplitRule.EVEN, "even")],
)
def test_the_split_rule_of_the_plan_reaches_every_rank(
    ranks: Any, daemon: DaemonProcess, reporting: str, policy: str, rule: SplitRule | None, expected: str
) -> None:
    job = f"rule-{reporting}-{policy}-{rule or 'own'}"
    first, *others = ranks(3, rules_in_force, daemon.address, job, reporting, policy, rule, expected)
    assert expected in first
    assert first <= {expected, rule or "optimal"}  # layers that stay have the rule that they began with
    assert others == [first] * 2


@pytest.mark.parametrize("reporting", ["rank", "node", "group"])
def test_all_ranks_run_the_same_layouts_from_the_same_step(ranks: Any, daemon: DaemonProcess, reporting: Any) -> None:
    (first, status), *others = ranks(3, planned, daemon.address, f"by-{reporting}", reporting, 20, 2)
    assert len(first) >= 2  # a third plan need not be better
    assert all(seen == first for seen, _ in others)
    versions = [version for _, version, _ in first]
    assert versions == sorted(set(versions))
    assert status.connected
    assert status.sent > 10
    assert [s is not None for _, s in others] == [reporting == "rank"] * 2
    with daemon.client() as client:
        job = client.job(f"jobs/by-{reporting}")
        assert job.status.applied_version == versions[-1]
        assert job.status.connected_ranks == 0  # all took leave
        plan = client.plan(f"jobs/by-{reporting}/plans/{versions[-1]}")
    for layer, slots in zip(plan.layers, first[-1][2], strict=True):
        sent = layer.layout.slots
        assert np.array_equal(np.array(slots)[:, : sent.shape[1]], sent)


def described(address: str) -> str | None:
    """A session of every setting; what a cluster with other slots is told."""
    cluster = Cluster.uniform(2, SLOTS, speed=[1.0, 2.0])
    layouts = [contiguous(2)] * LAYERS
    given: Any = {
        "cluster": cluster,
        "expert": ExpertSpec(weight_bytes=100),
        "policy": "hybrid",
        "parameters": SolveParameters(work_limit=50),
        "forecast": Forecast(ForecastMethod.MEAN, window_steps=3),
        "replan": Replan(2, Payback(50)),
        "closing": Closing(timeout_s=3),
        "max_moves": 4,
        "groups": 2,
        "merge_sources": True,
    }
    with PlannerSession(address, "described", layouts, lambda layouts: None, slots=SLOTS, **given) as session:
        eventually(lambda: session.status is not None and session.status.connected)
        if dist.get_rank() == 0:
            with Client(address) as client:
                spec = client.job("jobs/described").spec
            assert same(spec, JobSpec(layers=LAYERS, experts=EXPERTS, ranks=2, initial=tuple(layouts), **given))
        dist.barrier()
    with pytest.raises(ProblemError, match=r"cluster\.slots") as refused:
        PlannerSession(address, "described", layouts, lambda layouts: None, slots=SLOTS - 1, cluster=cluster)
    return str(refused.value)


def test_a_job_is_described_by_the_arguments_of_its_session(ranks: Any, daemon: DaemonProcess) -> None:
    first, second = ranks(2, described, daemon.address)
    assert first == second == "cluster.slots = [6, 6]: must be `slots` (5) on every device"


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("address", "planner", "address = 'planner': must be 'host:port'"),
        ("address", "http://planner:7433", "address = 'http://planner:7433': must be 'host:port'"),
        ("job_id", "My run", "job_id = 'My run': must be 1 to 63 of a-z, 0-9 and -, beginning with a letter"),
        ("layouts", [], r"layouts = none: must be one per MoE layer; write \[layer.layout for layer in layers\]"),
        ("layouts", [np.zeros((1, 8), np.int32)], r"layouts\[0\] = array.*: must be Layout; write \[layer.layout"),
        ("reporting", "nodes", "reporting = nodes: must be rank, node or group"),
    ],
)
def test_a_session_that_could_never_be_is_refused_at_once(argument: str, value: Any, words: str) -> None:
    given: dict[str, Any] = {"address": "127.0.0.1:1", "job_id": "odd", "layouts": [contiguous(1)] * LAYERS}
    with pytest.raises(ProblemError, match=words):
        PlannerSession(**given | {argument: value}, apply=lambda plan: None, slots=EXPERTS)


def sessions_of_others() -> list[str]:
    told = []
    for members in ([1, 0], [1 - dist.get_rank()]):
        with pytest.raises(ProblemError) as refused:
            PlannerSession("127.0.0.1:1", "odd", [contiguous(2)], lambda plan: None, slots=SLOTS, ranks=members)
        told.append(str(refused.value))
    return told


def test_a_session_has_the_ranks_of_its_own_group_in_their_order(ranks: Any) -> None:
    first, _ = ranks(2, sessions_of_others)
    assert first == [
        "ranks = [1, 0]: must ascend, as those of process groups do; write [0, 1]",
        "ranks = [1]: must be those of the group that this rank, 0, is in",
    ]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (np.ones((LAYERS + 1, EXPERTS), np.int64), rf"array of shape \(3, 8\): must be \[{LAYERS}, {EXPERTS}\]"),
        (np.ones((LAYERS, EXPERTS - 1), np.int64), r"array of shape \(2, 7\)"),
        (np.full((LAYERS, EXPERTS), 0.9), "array of float64: must hold integers"),
        (np.full((LAYERS, EXPERTS), -1), "must be at least 0"),
    ],
)
def test_counts_that_are_none_are_refused_at_once(counts: Any, words: str) -> None:
    layouts = [contiguous(1)] * LAYERS
    with PlannerSession("127.0.0.1:1", "odd", layouts, apply=lambda plan: None, slots=EXPERTS) as session:
        with pytest.raises(ProblemError, match=words):
            session.step(counts)
        assert not session.step(np.ones((LAYERS, EXPERTS), np.int64))


@pytest.mark.parametrize("failed", [False, True], ids=["ended", "failed"])
def test_a_session_that_is_over_takes_no_steps(failed: bool) -> None:
    layouts = [contiguous(1)] * LAYERS
    with (
        suppress(KeyError),
        PlannerSession("127.0.0.1:1", "over", layouts, apply=lambda plan: None, slots=EXPERTS) as session,
    ):
        if failed:
            raise KeyError("what training ended by")
    with pytest.raises(RuntimeError, match="step within its `with`, or make another PlannerSession"):
        session.step(np.ones((LAYERS, EXPERTS), np.int64))


def test_a_slow_rank_is_waited_for(ranks: Any, daemon: DaemonProcess) -> None:
    (first, _), (second, _) = ranks(2, planned, daemon.address, "slow", "rank", 5, 1, 1.0)
    assert first == second
    assert first


def test_training_goes_on_without_a_planner(ranks: Any) -> None:
    (seen, status), _ = ranks(2, planned, "127.0.0.1:1", "alone", "rank", 30, 0)
    assert seen == []
    assert not status.connected
    assert "UNAVAILABLE" in status.error


def test_a_planner_that_is_killed_and_comes_back_goes_on_planning(start: Start, tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/planner"
    daemon = start("--listen", address, data=tmp_path / "data").serving()
    seen: list[Any] = []
    with PlannerSession(address, "killed", [contiguous(1)] * LAYERS, lambda layouts: None, slots=EXPERTS) as session:
        train(session, 0, 5, 1, seen)
        assert seen
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait(10)
        train(session, 0, 20, 0, seen)
        assert session.status is not None
        connections, sent = session.status.connections, session.status.sent
        start("--listen", address, data=tmp_path / "data").serving()
        end = time.monotonic() + LIMIT_S
        while session.status.sent < sent + 5 and time.monotonic() < end:
            session.step(counts_of(0, 0))
            time.sleep(0.01)
        assert session.status.connections == connections + 1
        assert session.status.sent >= sent + 5


# With planners that misbehave


class OddPlanner(planner_pb2_grpc.PlannerServiceServicer):
    """A real server that sends one plan, and remembers what it is told."""

    def __init__(self, plan: job_pb2.JobPlan) -> None:
        self.plan = plan
        self.failed: list[planner_pb2.PlanFailed] = []

    def CreateJob(self, request: Any, context: Any) -> planner_pb2.CreateJobResponse:  # noqa: N802
        return planner_pb2.CreateJobResponse(job=request.job)

    def StreamRank(self, requests: Any, context: Any) -> Iterator[planner_pb2.StreamRankResponse]:  # noqa: N802
        next(requests)
        yield planner_pb2.StreamRankResponse(welcome=planner_pb2.Welcome(credit=10, plan=self.plan))
        for request in requests:
            if request.WhichOneof("message") == "failed":
                self.failed.append(request.failed)


@contextmanager
def odd_planner(plan: job_pb2.JobPlan, kind: Any = OddPlanner) -> Iterator[tuple[str, Any]]:
    server = grpc.server(ThreadPoolExecutor(8))
    odd = kind(plan)
    planner_pb2_grpc.add_PlannerServiceServicer_to_server(odd, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", odd
    server.stop(1).wait(5)


def plan_of(slots: Any, incarnation: int = 7, **fields: Any) -> job_pb2.JobPlan:
    table = np.asarray(slots, np.int32)
    tensor = tensor_pb2.Tensor(shape=table.shape, type=tensor_pb2.DATA_TYPE_INT32, data=table.tobytes())
    values: dict[str, Any] = {"layer": 0, "version": 1, "layout": tensor} | fields
    layer = job_pb2.LayerPlan(**values)
    return job_pb2.JobPlan(version=1, incarnation=incarnation, layers=[layer])


GOOD = [[0, 1], [2, 3]]
ODD = {
    "an expert is missing": plan_of([[0, 1], [2, 1]]),
    "a replica twice on a device": plan_of([[0, 0], [1, 2]]),
    "an expert that does not exist": plan_of([[0, 1], [2, 9]]),
    "too wide": plan_of([[0, 1, 2], [3, 0, 1]]),
    "wrong devices": plan_of([[0, 1], [2, 3], [0, 1]]),
    "not a table": plan_of([0, 1, 2, 3]),
    "a layer that does not exist": plan_of(GOOD, layer=5),
    "no layers": job_pb2.JobPlan(version=1, incarnation=7),
    "another incarnation": plan_of(GOOD, incarnation=6),
    "cut short": plan_of(
        GOOD, layout=tensor_pb2.Tensor(shape=[2, 2], type=tensor_pb2.DATA_TYPE_INT32, data=b"\0\0\0\0")
    ),
    "another type": plan_of(
        GOOD, layout=tensor_pb2.Tensor(shape=[2, 2], type=tensor_pb2.DATA_TYPE_FLOAT64, data=b"\0" * 32)
    ),
}


def stream_to(address: str) -> PlannerStream:
    spec = JobSpec(Cluster.uniform(2, 2), layers=1, experts=4)
    return PlannerStream(address, "odd", spec, 7, rank=0)


@pytest.mark.parametrize("name", sorted(ODD))
def test_a_plan_that_does_not_validate_is_refused_and_reported(name: str) -> None:
    with odd_planner(ODD[name]) as (address, odd):
        stream = stream_to(address)
        end = time.monotonic() + 20
        while not odd.failed and time.monotonic() < end:
            time.sleep(0.01)
        stream.close()
    assert stream.newest == 0
    assert stream.status.refused >= 1
    assert odd.failed[0].version == 1
    assert odd.failed[0].reason in stream.status.error


class Complaining(OddPlanner):
    """Welcomes every rank, and then finds what it says wrong."""

    welcomed = 0

    def StreamRank(self, requests: Any, context: Any) -> Iterator[planner_pb2.StreamRankResponse]:  # noqa: N802
        next(requests)
        self.welcomed += 1
        yield planner_pb2.StreamRankResponse(welcome=planner_pb2.Welcome(credit=10, plan=self.plan))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "statistics.tokens.shape = [1, 1, 3]: must be [1, 1, 4]")


def test_a_rank_that_says_what_is_wrong_comes_back_less_and_less_often() -> None:
    """Nothing changes by saying it again: its waits double, so in two seconds there is room for five at most."""
    with odd_planner(plan_of(GOOD), Complaining) as (address, odd):
        stream = stream_to(address)
        eventually(lambda: odd.welcomed >= 2)
        begun, before = time.monotonic(), odd.welcomed
        time.sleep(2)
        came, passed = odd.welcomed - before, time.monotonic() - begun
        stream.close()
    # The n-th wait is at least 0.05 s x 2^n long.
    assert 0.05 * (2 ** (came - 1) - 1) <= passed
    assert "INVALID_ARGUMENT: statistics.tokens.shape" in stream.status.error


def test_a_rank_that_is_told_when_to_come_back_does_not_come_before(start: Start) -> None:
    """A full daemon says 5 s: in two there is no second attempt."""
    daemon = start("--limit", "streams=1").serving(solver=False)
    refused = 'grpc_server_handled_total{code="RESOURCE_EXHAUSTED",method="/moeplan.v1.PlannerService/StreamRank"}'
    spec = JobSpec(Cluster.uniform(2, 3), layers=1, experts=4, ranks=2)
    first = PlannerStream(daemon.address, "full", spec, 1, rank=0)
    eventually(lambda: first.status.connected)
    second = PlannerStream(daemon.address, "full", spec, 1, rank=1)
    eventually(lambda: "streams are open" in second.status.error)
    time.sleep(2)
    attempts = daemon.metric(refused)
    second.close()
    first.close()
    assert attempts == 1


def test_a_good_plan_is_held() -> None:
    with odd_planner(plan_of(GOOD)) as (address, _):
        stream = stream_to(address)
        end = time.monotonic() + 20
        while not stream.newest and time.monotonic() < end:
            time.sleep(0.01)
        stream.close()
    held = stream.plan(1)
    assert held is not None
    ((layout, rule),) = held.layers
    assert layout.slots.tolist() == GOOD
    assert rule is SplitRule.OPTIMAL


def test_statistics_that_nobody_takes_are_dropped_not_hoarded() -> None:
    stream = stream_to("127.0.0.1:1")
    for step in range(300):
        stream.report(step, np.ones((1, 1, 4), np.int64))
    assert stream.status.dropped == 300 - 256
    stream.close()


class Squares(Dataset[int]):
    """A data set that works in forked processes."""

    def __init__(self, session: PlannerSession) -> None:
        self.session = session

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        assert self.session._stream is not None
        self.session._stream.report(0, np.ones((1, 1, 4), np.int64))
        return index**2


def test_workers_of_a_data_loader_may_fork_meanwhile(daemon: DaemonProcess) -> None:
    seen: list[Any] = []
    with PlannerSession(
        daemon.address, "forks", [contiguous(1)] * LAYERS, lambda layouts: None, slots=EXPERTS
    ) as session:
        train(session, 0, 5, 1, seen)
        loader = DataLoader(Squares(session), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=30)
        assert sorted(value for batch in loader for value in batch.tolist()) == [i**2 for i in range(8)]
        assert session.status is not None
        sent = session.status.sent
        train(session, 0, 5, 0, seen)
        assert session.status.connections == 1
        assert session.status.sent >= sent
