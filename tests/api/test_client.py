"""The client gives what the library gives, asks for jobs in our own types, and says plainly why there is no answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, eventually, small_job, small_problem, tokens
from tests.support.equality import same

from moeplan.api import (
    AsyncClient,
    Client,
    Forecast,
    InvalidRequestError,
    JobSpec,
    NotFoundError,
    Payback,
    Reason,
    Replan,
    Security,
    UnavailableError,
    wire,
)
from moeplan.solvers import (
    Cluster,
    Demand,
    ExpertSpec,
    Layout,
    Plan,
    Problem,
    ProblemError,
    SolveParameters,
    available_policies,
    evaluate,
    solve,
)
from moeplan.v1 import solver_pb2, solver_pb2_grpc

VARIABLES = ("MOEPLAN_TOKEN_FILE", "MOEPLAN_CA", "MOEPLAN_CERTIFICATE", "MOEPLAN_KEY")


def uneven() -> Problem:
    """Unequal scenarios, speeds, nodes and links, and a layout in force."""
    rng = np.random.default_rng(1)
    counts = (rng.pareto(1.2, (3, 4, 16)) * 100).astype(np.int64)
    cluster = Cluster.uniform(4, 6, nodes=2, speed=[1.0, 1.5, 1.0, 0.5])
    expert = ExpertSpec(weight_bytes=10**6, token_bytes=4096, seconds_per_token=1e-6)
    current = Layout.contiguous(16, cluster.slots)
    return Problem(cluster, Demand.of(counts, [1, 2, 4]), expert, current=current, max_moves=6, tail=0.5)


def assert_same(there: Plan, here: Plan) -> None:
    """Equal in all but the time that it took."""
    for name in set(Plan.__dataclass_fields__) - {"seconds"}:
        assert same(getattr(there, name), getattr(here, name)), name
    assert there.seconds > 0 or here.policy == "given"


@pytest.mark.parametrize("policy", ["hybrid", "ilp", "traffic"])
def test_solve_gives_the_plan_that_the_library_gives(client: Client, policy: str) -> None:
    problem = uneven()
    if policy == "traffic":
        problem = Problem(problem.cluster, problem.demand, problem.expert)
    parameters = SolveParameters(work_limit=500)
    (plan,) = client.solve([problem], policy=policy, parameters=parameters)
    assert_same(plan, solve(problem, policy=policy, parameters=parameters))


def test_solve_gives_one_plan_per_problem_in_order(client: Client) -> None:
    problems = [small_problem(seed) for seed in range(4)]
    for plan, problem in zip(client.solve(iter(problems)), problems, strict=True):
        assert_same(plan, solve(problem))


def test_evaluate_gives_what_the_library_gives(client: Client) -> None:
    problem = uneven()
    layout = Layout.contiguous(16, problem.cluster.slots)
    for rule in ("even", "optimal", "home"):
        assert_same(client.evaluate(problem, layout, rule), evaluate(problem, layout, rule))


def test_the_last_anytime_plan_is_the_solve(client: Client) -> None:
    problem = uneven()
    parameters = SolveParameters(deadline_s=20, work_limit=300)
    plans = list(client.solve_anytime(problem, parameters=parameters))
    objectives = [plan.objective for plan in plans]
    assert objectives == sorted(objectives, reverse=True)
    assert same(plans[-1].layout, solve(problem, parameters=SolveParameters(work_limit=300)).layout)


def test_whoever_stops_asking_ends_the_solve(daemon: DaemonProcess, client: Client) -> None:
    endless = SolveParameters(deadline_s=60, work_limit=2**31 - 1, target_gap=0.0)
    counts = (np.random.default_rng(0).pareto(1.0, (32, 1, 128)) * 100).astype(np.int64)
    plans = client.solve_anytime(Problem(Cluster.uniform(32, 6), Demand.of(counts)), parameters=endless)
    assert next(plans).gap > 0
    plans.close()  # type: ignore[attr-defined]
    eventually(lambda: daemon.metric('moeplan_solves_total{kind="anytime",outcome="cancelled"}'))
    assert client.solve([small_problem()])


def test_policies(client: Client) -> None:
    known = available_policies().values()
    assert [(p.name, p.source, p.split_rule, p.summary) for p in client.policies()] == [
        (p.name, p.source, p.split, p.summary) for p in known
    ]


def test_a_job_is_what_was_asked_for(client: Client) -> None:
    spec = JobSpec(
        Cluster.uniform(2, 6, speed=[1.0, 2.0]),
        layers=2,
        experts=8,
        expert=ExpertSpec(weight_bytes=1000),
        parameters=SolveParameters(work_limit=50),
        forecast=Forecast(window_steps=3),
        replan=Replan(every_steps=2, payback=Payback(horizon_steps=100)),
        max_moves=4,
    )
    made = client.create_job("asked", spec, incarnation=7)
    assert (made.name, made.incarnation, made.status.plan_version) == ("jobs/asked", 7, 1)
    assert same(made.spec, spec)
    assert same(client.job("jobs/asked").spec, spec)
    assert same(client.create_job("asked", spec, incarnation=7).spec, spec)
    assert "jobs/asked" in [job.name for job in client.jobs()]
    plan = client.plan("jobs/asked/plans/-")
    assert plan.decision.reason is Reason.INITIAL
    assert tuple(layer.layout for layer in plan.layers) == spec.initial
    assert plan.created is not None
    client.delete_job("jobs/asked")
    with pytest.raises(NotFoundError, match="jobs/asked does not exist"):
        client.job("jobs/asked")


def test_plans_are_watched_as_they_are_made(client: Client) -> None:
    name = client.create_job("watched", small_job()).name
    plans = client.watch_plans(name)
    assert next(plans).version == 1
    rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
    rank.report(0, tokens(0, ranks=2))
    newer = next(plans)
    assert newer.version == 2
    assert newer.decision.reason is Reason.GAIN
    for layer in newer.layers:
        assert layer.imbalance is not None
        assert layer.imbalance_before is not None
        assert layer.imbalance < layer.imbalance_before
    rank.close()


async def both(daemon: DaemonProcess) -> None:
    problem, layout = uneven(), Layout.contiguous(16, uneven().cluster.slots)
    parameters = SolveParameters(deadline_s=20, work_limit=50)
    with daemon.client() as client:
        async with AsyncClient(daemon.address, timeout_s=WAIT_S) as asking:
            (there,), (here,) = await asking.solve([problem]), client.solve([problem])
            assert_same(there, here)
            assert_same(await asking.evaluate(problem, layout, "even"), client.evaluate(problem, layout, "even"))
            last = [plan async for plan in asking.solve_anytime(problem, parameters=parameters)][-1]
            assert last.layout == list(client.solve_anytime(problem, parameters=parameters))[-1].layout
            assert await asking.policies() == client.policies()
            job = await asking.create_job("awaited", small_job(), incarnation=2)
            assert same(job, client.job(job.name))
            assert same(await asking.job(job.name), job)
            assert [found.name async for found in asking.jobs()] == [found.name for found in client.jobs()]
            assert same(await asking.plan(f"{job.name}/plans/1"), client.plan(f"{job.name}/plans/1"))
            watched: AsyncIterator[Any] = asking.watch_plans(job.name)
            assert (await anext(watched)).version == 1
            await watched.aclose()  # type: ignore[attr-defined]
            await asking.delete_job(job.name)
            with pytest.raises(NotFoundError):
                await asking.job(job.name)


def test_the_asynchronous_client_gives_the_same(daemon: DaemonProcess) -> None:
    asyncio.run(both(daemon))


def test_what_the_server_refuses_names_the_field(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="policy = 'hyb': must be one of") as error:
        client.solve([small_problem()], policy="hyb")
    assert list(error.value.violations) == ["policy"]


# Servers that are away, or not to be believed


def test_no_daemon_says_how_to_start_one() -> None:
    for address in ("127.0.0.1:1", "unix:/nowhere/at/all", "no-such-host.invalid:7433"):
        with Client(address, timeout_s=10) as client, pytest.raises(UnavailableError) as error:
            client.policies()
        assert str(error.value) == f"no daemon answers at {address}; start one with `moeplan serve`"
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError, match="no daemon answers"):
        next(client.watch_plans("jobs/x"))


def test_no_daemon_for_the_asynchronous_client() -> None:
    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            await client.policies()

    with pytest.raises(UnavailableError, match=r"no daemon answers at 127\.0\.0\.1:1; start one"):
        asyncio.run(ask())


class OddSolver(solver_pb2_grpc.SolverServiceServicer):
    """A real server whose plans are not the problem's."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def Solve(self, request: Any, context: Any) -> solver_pb2.SolveResponse:  # noqa: N802
        return solver_pb2.SolveResponse(plans=[self.plan])


@contextmanager
def odd_solver(plan: Any) -> Iterator[Client]:
    server = grpc.server(ThreadPoolExecutor(2))
    solver_pb2_grpc.add_SolverServiceServicer_to_server(OddSolver(plan), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        yield client
    server.stop(1).wait(5)


def test_figures_are_not_taken_on_trust() -> None:
    problem = small_problem()
    given = evaluate(problem, Layout.contiguous(problem.experts, problem.cluster.slots))
    message = wire.write_plan(given)
    message.mean_imbalance, message.cost_s = 1.0, 0.0
    with odd_solver(message) as client:
        (plan,) = client.solve([problem])
    assert_same(plan, given)


def test_a_plan_of_another_problem_is_refused() -> None:
    other = wire.write_plan(solve(small_problem(devices=2)))
    with odd_solver(other) as client, pytest.raises(ProblemError, match="the problem has 8 experts on 4 devices"):
        client.solve([small_problem(devices=4)])


def test_a_plan_that_breaks_the_problems_limits_is_refused() -> None:
    problem = small_problem()
    with odd_solver(wire.write_plan(solve(problem))) as client, pytest.raises(ProblemError, match="on device 0"):
        client.solve([problem.without([0])])


# Security


def test_security_is_read_from_files_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Security.from_files() == Security()
    paths = {name: tmp_path / name for name in VARIABLES}
    for name, path in paths.items():
        path.write_text(f"{name}\n")
        monkeypatch.setenv(name, str(path))
    token, ca, certificate, key = VARIABLES
    assert Security.from_files() == Security(token, paths[ca], paths[certificate], paths[key])
    other = tmp_path / "other"
    other.write_text("mine")
    assert Security.from_files(token=other, ca=other) == Security("mine", other, paths[certificate], paths[key])
    monkeypatch.setenv("MOEPLAN_TOKEN_FILE", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="missing"):
        Client("127.0.0.1:1")
    assert Client("127.0.0.1:1", Security(token="given")).address == "127.0.0.1:1"


def test_a_token_is_sent_and_never_shown() -> None:
    security = Security(token="correct-horse")
    assert security.metadata == (("authorization", "Bearer correct-horse"),)
    assert "correct-horse" not in repr(security)
    assert Security().metadata == ()
