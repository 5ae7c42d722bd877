"""Small messages that ask for much memory: refused by a product of their fields, before any of it is taken."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.daemon import DaemonProcess, small_job, small_problem

from moeplan.api import wire
from moeplan.api.errors import InvalidRequestError, error_of
from moeplan.v1 import job_pb2, planner_pb2, solver_pb2, tensor_pb2

SIZES = st.sampled_from([1, 2, 64, 1_024, 4_095, 4_096, 65_535, 65_536])
REPEATS = st.sampled_from([1, 2, 64, 4_095, 65_535, 65_536])


PROPERTY = settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def jobs(draw: st.DrawFn) -> job_pb2.Job:
    """A job whose every number is small or the largest allowed."""
    job = wire.write_job_spec(small_job())
    job.ClearField("initial_layouts")
    del job.cluster.slots[:], job.cluster.node[:], job.cluster.speed[:]
    job.cluster.slots.extend([draw(SIZES)] + [draw(st.sampled_from([0, 1, 64, 65_536]))] * draw(REPEATS))
    del job.cluster.slots[65_536:]
    job.layers, job.experts, job.ranks = draw(SIZES), draw(SIZES), draw(SIZES | st.just(0))
    job.forecast.window_steps = draw(st.sampled_from([1, 8, 256]))
    job.closing.max_lag_steps = draw(st.sampled_from([1, 1_024]))
    job.merge_sources = draw(st.booleans())
    if draw(st.booleans()):
        shape = [draw(SIZES | st.sampled_from([0, 2**31])) for _ in range(3)]
        job.initial_layouts.CopyFrom(tensor_pb2.Tensor(shape=shape, type=tensor_pb2.DATA_TYPE_INT32))
    return job


def refused_or_done(call: Any, request: Any) -> None:
    """The call ends with an answer, or with a status that is not a fault of the server."""
    try:
        call(request, timeout=20)
    except grpc.RpcError as error:
        refused = error_of(error)
        assert refused.code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ), refused


def unharmed(daemon: DaemonProcess) -> None:
    """The daemon lives, and no call was a fault of it."""
    assert daemon.process.poll() is None
    failed = [event["exception"].splitlines()[-1] for event in daemon.events("call failed")]
    assert not failed


def test_no_job_takes_more_memory_than_the_limits_say(frugal: DaemonProcess) -> None:
    with frugal.client() as client:

        @PROPERTY
        @given(jobs())
        def create(job: job_pb2.Job) -> None:
            refused_or_done(client.planner.CreateJob, planner_pb2.CreateJobRequest(job_id="bomb", job=job))
            for known in list(client.jobs()):
                assert client.plan(f"{known.name}/plans/-").version  # what was accepted can be sent
                client.delete_job(known.name)

        create()
    unharmed(frugal)


@pytest.mark.parametrize(
    ("slots", "layers", "experts", "text"),
    [
        ([65_536] + [1] * 4_095, 1, 64, "layers x devices x most slots are 268435456"),
        ([65_536] + [1] * 1_023, 1, 64, "layers x devices x most slots are 67108864"),
        ([1] * 65_536, 1, 65_536, "devices x experts are 4294967296"),
        ([4_090] * 1, 4_096, 64, r"a message may have 67108864 \(limits.message_bytes\)"),
    ],
)
def test_what_is_refused_says_which_product(
    frugal: DaemonProcess, slots: list[int], layers: int, experts: int, text: str
) -> None:
    job = job_pb2.Job(layers=layers, experts=experts, ranks=1)
    job.cluster.slots.extend(slots)
    with frugal.client() as client, pytest.raises(InvalidRequestError, match=text):
        client._call("planner", "CreateJob", planner_pb2.CreateJobRequest(job_id="bomb", job=job))


def test_who_has_reported_counts_as_memory(frugal: DaemonProcess) -> None:
    """A bit per layer, rank and step, where sources are merged: 4,096 x 65,536 x 2,059 of them."""
    job = job_pb2.Job(layers=4_096, experts=1, ranks=65_536, merge_sources=True)
    job.cluster.slots.extend([1])
    job.closing.max_lag_steps = 1_024
    with frugal.client() as client, pytest.raises(InvalidRequestError, match="window_steps"):
        client._call("planner", "CreateJob", planner_pb2.CreateJobRequest(job_id="bomb", job=job))


def test_no_solve_takes_more_memory_than_its_worker_has(frugal: DaemonProcess) -> None:
    lengths = st.lists(SIZES | st.sampled_from([0, 2**31, 2**62]), min_size=1, max_size=4)
    with frugal.client() as client:

        @PROPERTY
        @given(lengths, st.sampled_from([1, 2, 3, 4]), st.sampled_from(["tokens", "current", "forbidden"]))
        def solve(shape: list[int], kind: int, place: str) -> None:
            problem = wire.write_problem(small_problem())
            tensors = {
                "tokens": problem.demand.tokens,
                "current": problem.current,
                "forbidden": problem.constraints.forbidden,
            }
            tensors[place].CopyFrom(tensor_pb2.Tensor(shape=shape, type=tensor_pb2.DataType.ValueType(kind)))
            refused_or_done(client.solver.Solve, solver_pb2.SolveRequest(problems=[problem]))

        solve()
    unharmed(frugal)
