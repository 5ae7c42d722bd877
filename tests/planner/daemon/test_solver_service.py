"""The solver service: answers, limits, deadlines, cancellation, workers that die."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
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

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.errors import DeadlineError, InvalidRequestError, PreconditionError, UnavailableError, error_of
from moeplan.solvers import (
    Cluster,
    Constraints,
    Demand,
    ExpertSpec,
    Layout,
    Problem,
    ProblemError,
    SolveParameters,
    Termination,
    available_policies,
    evaluate,
    solve,
)
from moeplan.v1 import problem_pb2, solver_pb2, solver_pb2_grpc, tensor_pb2


def hard_problem() -> Problem:
    """A search that runs until its deadline: its work limit would take hours and its target cannot be reached."""
    tokens = (np.random.default_rng(0).pareto(1.0, (32, 1, 128)) * 100).astype(np.int64)
    return Problem(Cluster.uniform(32, 6), Demand.of(tokens))


ENDLESS = SolveParameters(work_limit=2**31 - 1, target_gap=0.0)


def test_solve_gives_what_the_library_gives(client: Client) -> None:
    problems = [small_problem(seed) for seed in range(3)]
    for policy in ("hybrid", "eplb"):
        plans = client.solve(problems, policy=policy)
        for problem, plan in zip(problems, plans, strict=True):
            expected = solve(problem, policy=policy)
            assert (plan.policy, plan.split.rule) == (policy, expected.split.rule)
            assert plan.layout == expected.layout
            np.testing.assert_array_equal(plan.split.quota, expected.split.quota)
            assert plan.cost.mean_s == expected.cost.mean_s
            assert plan.termination is expected.termination
            assert plan.mean_imbalance == expected.mean_imbalance
            assert plan.bound == expected.bound
            assert plan.moves is None


def test_layers_are_solved_by_several_workers(start: Start) -> None:
    """The answer is the same, in the same order, and an error names the layer that the caller knows."""
    daemon = start(workers=4).serving()
    eventually(lambda: daemon.metric("moeplan_workers_ready") == 4)  # one is kept for jobs
    problems = [small_problem(seed) for seed in range(7)]
    with daemon.client() as client:
        plans = client.solve(problems)
        assert daemon.metric('moeplan_solves_total{kind="solve",outcome="done"}') == 3
        for problem, plan in zip(problems, plans, strict=True):
            assert plan.layout == solve(problem).layout
        messages = [wire.write_problem(problem) for problem in problems]
        for wrong in (6, 3):
            messages[wrong].tail = 2.0
            with pytest.raises(grpc.RpcError) as error:
                client.solver.Solve(solver_pb2.SolveRequest(problems=messages), timeout=WAIT_S)
            refused = error_of(error.value)
            assert isinstance(refused, InvalidRequestError)
            assert list(refused.violations) == [f"problems[{wrong}].tail"]
        pids = daemon.workers()
        client.solve(problems)
        assert daemon.workers() == pids  # an error of one part harms no worker of another


def test_every_parameter_travels(client: Client) -> None:
    """Also what exact models are solved with: the policy `ilp` uses it, and refuses a solver that is not there."""
    sent = SolveParameters(2.5, 77, 0.125, 0.0625, 4_000_000_000, "highs", 3, prove=True)
    again = wire.read_parameters(
        problem_pb2.SolveParameters.FromString(wire.write_parameters(sent).SerializeToString())
    )
    assert again == sent
    assert wire.read_parameters(problem_pb2.SolveParameters()) == SolveParameters()
    problem = small_problem(devices=2, experts=4)
    (plan,) = client.solve([problem], policy="ilp", parameters=SolveParameters(solver="highs", threads=2, prove=True))
    assert plan.mean_imbalance == solve(problem, policy="ilp").mean_imbalance
    with pytest.raises(InvalidRequestError, match="'nonsense'") as error:
        client.solve([problem], policy="ilp", parameters=SolveParameters(solver="nonsense"))
    assert list(error.value.violations) == ["parameters.solver"]


def test_moves_are_told(client: Client) -> None:
    problem = small_problem()
    current = Layout.contiguous(problem.experts, problem.cluster.slots)
    problem = Problem(problem.cluster, problem.demand, current=current, max_moves=3)
    (plan,) = client.solve([problem])
    expected = solve(problem).moves
    assert expected is not None
    assert plan.moves is not None
    assert plan.moves.expert.tolist() == expected.expert.tolist()
    assert plan.moves.device.tolist() == expected.device.tolist()
    assert plan.moves.source.tolist() == expected.source.tolist()
    assert len(plan.moves) <= 3


def test_evaluate(client: Client) -> None:
    problem = small_problem()
    layout = Layout.contiguous(problem.experts, problem.cluster.slots)
    for rule in ("even", "optimal"):
        plan = client.evaluate(problem, layout, rule)
        assert plan.mean_imbalance == evaluate(problem, layout, rule).mean_imbalance
        assert plan.split.rule == rule


def test_policies(client: Client) -> None:
    assert [policy.name for policy in client.policies()] == list(available_policies())


def test_anytime_plans_get_better(client: Client) -> None:
    parameters = SolveParameters(deadline_s=1.0, work_limit=2_000)
    *on_the_way, last = plans = list(client.solve_anytime(hard_problem(), parameters=parameters))
    values = [plan.mean_imbalance for plan in on_the_way]
    assert values == sorted(set(values), reverse=True)
    assert last.mean_imbalance == values[-1]
    assert {plan.termination for plan in on_the_way} == {Termination.UNFINISHED}
    assert last.termination in (Termination.WORK_LIMIT, Termination.DEADLINE)
    assert all(plan.gap == pytest.approx(plan.mean_imbalance / plan.bound - 1) for plan in plans)


def test_anytime_needs_a_deadline(client: Client) -> None:
    request = solver_pb2.SolveAnytimeRequest(problem=wire.write_problem(small_problem()))
    with pytest.raises(grpc.RpcError, match=r"parameters\.deadline"):
        list(client.solver.SolveAnytime(request))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.ClearField("problems"), "problems"),
        (lambda r: setattr(r, "policy", "nonsense"), "policy"),
        (lambda r: setattr(r.problems[0].demand.tokens, "type", 77), "problems[0].demand.tokens.type"),
        (lambda r: setattr(r.problems[0].demand.tokens, "data", b"x"), "problems[0].demand.tokens.data"),
        (lambda r: r.problems[0].demand.weights.extend([float("nan")]), "problems[0].demand.weights[1]"),
        (lambda r: r.problems[0].cluster.speed.append(1.0), "problems[0].cluster.speed"),
        (lambda r: r.problems[0].cluster.ClearField("slots"), "problems[0].cluster.devices"),
        (lambda r: setattr(r.parameters, "target_gap", -1.0), "parameters.target_gap"),
        (lambda r: setattr(r.parameters, "traffic_tolerance", -1.0), "parameters.traffic_tolerance"),
        (lambda r: setattr(r.parameters, "threads", -1), "parameters.threads"),
        (lambda r: setattr(r.problems[0], "max_moves", 1), "problems[0].max_moves"),
    ],
)
def test_bad_requests_name_the_field(client: Client, change: object, field: str) -> None:
    request = solver_pb2.SolveRequest(problems=[wire.write_problem(small_problem())])
    change(request)  # type: ignore[operator]
    with pytest.raises(InvalidRequestError) as error:
        client._call("solver", "Solve", request)
    assert list(error.value.violations) == [field]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.5, 2.0**60])
def test_counts_must_be_counts(client: Client, value: float) -> None:
    counts = np.ones((4, 8))
    counts[2, 3] = value
    problem = wire.write_problem(small_problem())
    problem.demand.tokens.CopyFrom(wire.write_array(counts))
    with pytest.raises(InvalidRequestError, match=r"demand\.tokens\[2, 3\]"):
        client._call("solver", "Solve", solver_pb2.SolveRequest(problems=[problem]))


def test_shape_that_overflows(client: Client) -> None:
    problem = wire.write_problem(small_problem())
    problem.demand.tokens.CopyFrom(
        tensor_pb2.Tensor(shape=[2**62, 2**62, 4], type=tensor_pb2.DATA_TYPE_INT64, data=b"")
    )
    with pytest.raises(InvalidRequestError, match=r"demand\.tokens\.shape"):
        client._call("solver", "Solve", solver_pb2.SolveRequest(problems=[problem]))


def test_infeasible_says_what_is_short(client: Client) -> None:
    problem = wire.write_problem(small_problem())
    del problem.cluster.slots[:]
    problem.cluster.slots.extend([1, 1, 1, 1])
    with pytest.raises(PreconditionError, match="8 experts need 4 more") as error:
        client._call("solver", "Solve", solver_pb2.SolveRequest(problems=[problem]))
    assert error.value.reason == "INFEASIBLE"


def test_the_callers_deadline_bounds_the_solve(daemon: DaemonProcess) -> None:
    """The search stops by itself before the deadline, so the caller gets a plan and not an error."""
    with Client(daemon.address, timeout_s=4.0) as client:
        (plan,) = client.solve([hard_problem()], parameters=ENDLESS)
    assert plan.gap > 0


def test_cancelling_frees_the_worker(daemon: DaemonProcess, client: Client) -> None:
    before = daemon.metric('moeplan_solves_total{kind="solve",outcome="cancelled"}')
    request = client._solve([hard_problem()], "", ENDLESS)
    call = client.solver.Solve.future(request, timeout=WAIT_S)
    eventually(lambda: daemon.metric("moeplan_workers_busy") == 1)
    call.cancel()
    eventually(lambda: daemon.metric('moeplan_solves_total{kind="solve",outcome="cancelled"}') > before)
    assert client.solve([small_problem()])


def test_a_killed_worker_is_replaced_and_its_request_fails_clearly(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        request = client._solve([hard_problem()], "", ENDLESS)
        # Without retries, so that the status of the very call is seen.
        with grpc.insecure_channel(daemon.address, [("grpc.enable_retries", 0)]) as channel:
            solve_ = channel.unary_unary(
                "/moeplan.v1.SolverService/Solve",
                request_serializer=solver_pb2.SolveRequest.SerializeToString,
                response_deserializer=solver_pb2.SolveResponse.FromString,
            )
            call = solve_.future(request, timeout=WAIT_S)
            eventually(lambda: daemon.metric("moeplan_workers_busy") == 1)
            # The worker that the test before had killed may still be there for a moment.
            (worker,) = eventually(lambda: workers if len(workers := daemon.workers()) == 1 else None)
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(grpc.RpcError) as error:
                call.result(WAIT_S)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "worker" in str(error.value.details())
        assert client.solve([small_problem()])
        assert daemon.workers() != [worker]


def test_a_stopped_worker_is_killed_when_its_time_is_over(daemon: DaemonProcess, client: Client) -> None:
    (worker,) = eventually(daemon.workers)
    os.kill(worker, signal.SIGSTOP)
    with Client(daemon.address, timeout_s=1) as hasty, pytest.raises(DeadlineError):
        hasty.solve([small_problem()])
    assert client.solve([small_problem()])
    assert eventually(lambda: not Path(f"/proc/{worker}").exists())


def test_a_dead_zygote_is_replaced(daemon: DaemonProcess, client: Client) -> None:
    (zygote,) = children(daemon.process.pid)
    (worker,) = eventually(daemon.workers)
    os.kill(zygote, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{worker}").exists())  # workers do not outlive it
    assert client.solve([small_problem()])
    assert children(daemon.process.pid) != [zygote]


def own(daemon: DaemonProcess) -> Client:
    """A client with a connection of its own, as another process has."""
    client = daemon.client()
    channel = grpc.insecure_channel(daemon.address, [("grpc.use_local_subchannel_pool", 1)])
    client._channels.append(channel)
    client.solver = solver_pb2_grpc.SolverServiceStub(channel)
    return client


def test_one_callers_solves_hold_up_neither_jobs_nor_other_callers(start: Start) -> None:
    """Whatever one has waiting: a job comes before it, and another caller has the next turn."""
    daemon = start(workers=1).serving()
    with own(daemon) as greedy, own(daemon) as modest:
        request = greedy._solve([hard_problem()], "", ENDLESS)
        calls = [greedy.solver.Solve.future(request, timeout=WAIT_S) for _ in range(9)]
        eventually(lambda: daemon.metric("moeplan_queue_depth") == 8)
        name = greedy.create_job("first", small_job()).name
        rank = Rank(greedy, name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        eventually(lambda: daemon.metric("moeplan_queue_depth") == 9)
        small = modest.solver.Solve.future(modest._solve([small_problem()], "", SolveParameters()), timeout=WAIT_S)
        eventually(lambda: daemon.metric("moeplan_queue_depth") == 10)
        for pid in daemon.workers():  # the solve that runs ends, and the job's is the first turn
            os.kill(pid, signal.SIGKILL)
        assert rank.next("plan_update").plan.version == 2
        assert daemon.metric('moeplan_queue_seconds_count{kind="job"}') >= 1
        eventually(lambda: daemon.metric("moeplan_workers_busy") == 1)
        if not small.done():  # at most one of the other's was before it
            for pid in daemon.workers():
                os.kill(pid, signal.SIGKILL)
        assert small.result(WAIT_S).plans
        for call in calls:
            call.cancel()
        rank.close()


def test_a_full_queue_has_room_for_who_has_least_in_it(daemon: DaemonProcess) -> None:
    with own(daemon) as greedy, own(daemon) as modest:
        request = greedy._solve([hard_problem()], "", ENDLESS)
        calls = [greedy.solver.Solve.future(request, timeout=WAIT_S) for _ in range(5)]
        eventually(lambda: daemon.metric("moeplan_queue_depth") == 4)
        small = modest.solver.Solve.future(modest._solve([small_problem()], "", SolveParameters()), timeout=WAIT_S)
        refused = eventually(lambda: [call for call in calls if call.done()])
        assert [call.code() for call in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        for call in calls:
            call.cancel()
        assert small.result(WAIT_S).plans
    eventually(lambda: daemon.metric("moeplan_queue_depth") == 0)


def test_the_last_of_several_workers_is_for_jobs(start: Start) -> None:
    daemon = start(workers=2).serving()
    eventually(lambda: daemon.metric("moeplan_workers_ready") == 2)
    with daemon.client() as client:
        request = client._solve([hard_problem()], "", ENDLESS)
        calls = [client.solver.Solve.future(request, timeout=WAIT_S) for _ in range(2)]
        eventually(lambda: daemon.metric("moeplan_queue_depth") == 1)
        rank = Rank(client, client.create_job("first", small_job()).name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        assert rank.next("plan_update").plan.version == 2
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        rank.close()


def test_the_wait_for_a_worker_counts_towards_the_deadline(daemon: DaemonProcess, client: Client) -> None:
    """A deadline in the request is of the whole, as that of a call is: not so long again once a worker is free."""
    running = client.solver.Solve.future(client._solve([hard_problem()], "", ENDLESS), timeout=WAIT_S)
    eventually(lambda: daemon.metric("moeplan_workers_busy") == 1)
    with pytest.raises(DeadlineError, match="waiting for a worker"):
        client.solve([hard_problem()], parameters=replace(ENDLESS, deadline_s=0.5))
    running.cancel()


def test_a_solve_without_a_deadline_has_one(start: Start) -> None:
    daemon = start("--limit", "free_solve_s=0.5").serving()
    with daemon.client() as client:
        request = client._solve([hard_problem()], "", ENDLESS)
        assert client.solver.Solve(request).plans  # would take hours


def test_a_full_queue_says_when_to_come_back(daemon: DaemonProcess, client: Client) -> None:
    request = client._solve([hard_problem()], "", ENDLESS)
    calls = [client.solver.Solve.future(request, timeout=WAIT_S) for _ in range(5)]
    eventually(lambda: daemon.metric("moeplan_queue_depth") == 4)
    with pytest.raises(UnavailableError) as error:
        client.solve([small_problem()])
    assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.reason == "QUEUE_FULL"
    assert error.value.retry_s
    for call in calls:
        call.cancel()
    eventually(lambda: daemon.metric("moeplan_queue_depth") == 0)
    assert client.solve([small_problem()])


def test_too_much_memory_is_refused(client: Client) -> None:
    cluster = Cluster.uniform(20_000, 1)
    current = Layout.contiguous(20_000, cluster.slots)
    problem = Problem(cluster, Demand.of(np.ones(20_000, np.int64)), current=current)
    with pytest.raises(UnavailableError, match="worker") as error:
        client.solve([problem], policy="static")
    assert error.value.reason == "WORKER_MEMORY"
    assert client.solve([small_problem()])


def test_a_message_that_is_too_large(limited: DaemonProcess) -> None:
    with limited.client() as client:
        with pytest.raises(UnavailableError, match="larger than max"):
            client.solve([hard_problem()])
        assert client.policies()


def test_the_loop_is_free_while_workers_solve(client: Client) -> None:
    """Other calls are answered during a long solve."""
    with ThreadPoolExecutor(1) as other:
        solving = other.submit(client.solve, [hard_problem()], parameters=replace(ENDLESS, deadline_s=2))
        answers = 0
        while not solving.done():
            client.policies()
            answers += 1
        solving.result()
    assert answers > 20


def test_constraints_and_failed_devices_travel(client: Client) -> None:
    current = Layout.contiguous(8, [3, 3, 3, 3])
    limits = Constraints(forbidden=np.array([[0, 1]]), pinned=np.array([[7, 2]]), min_tokens=3, device_move_bytes=20)
    problem = Problem(
        Cluster.uniform(4, 3, nodes=2),
        Demand.of(np.arange(1, 65).reshape(2, 4, 8)),
        ExpertSpec(weight_bytes=10),
        current=current,
        constraints=limits,
        tail=0.5,
    ).without([0])
    there = wire.read_problem(wire.write_problem(problem))
    assert there.constraints.names == limits.names
    assert there.tail == 0.5
    assert np.array_equal(there.limits.held, problem.limits.held)
    [plan] = client.solve([problem])
    assert plan.layout == solve(problem).layout
    assert (plan.layout.slots[0] == -1).all()
    assert 7 in plan.layout.slots[2]
    message = wire.write_problem(small_problem())
    message.failed.append(9)
    with pytest.raises(ProblemError, match=r"failed\[0\] = 9: must be"):
        wire.read_problem(message)
