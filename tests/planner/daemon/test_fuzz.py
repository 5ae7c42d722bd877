"""Every request message with arbitrary content: a status, never a crash, and the next good request works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.daemon import DaemonProcess, small_job, small_problem

from moeplan.api import wire
from moeplan.api.client import Client
from moeplan.api.errors import error_of
from moeplan.solvers import SolveParameters
from moeplan.v1 import planner_pb2, solver_pb2, tensor_pb2

INTEGERS = st.sampled_from([0, 1, 2, 3, 7, 8, -1, 100, 4_096, 65_536, 2**31 - 1, -(2**31)]) | st.integers(-10, 100)
FLOATS = st.sampled_from([0.0, 1.0, -1.0, 1e308, 1e-308, float("inf"), float("nan")]) | st.floats()
NAMES = st.sampled_from(
    ["", "jobs/fuzz", "jobs/fuzz/plans/-", "jobs/fuzz/plans/1", "hybrid", "eplb", "optimal", "fuzz"]
)
BYTES = st.binary(max_size=64)

METHODS = [
    (service.full_name, method.name, method.input_type, method.client_streaming, method.server_streaming)
    for service in (
        planner_pb2.DESCRIPTOR.services_by_name["PlannerService"],
        solver_pb2.DESCRIPTOR.services_by_name["SolverService"],
    )
    for method in service.methods
]


def good(name: str) -> Message | None:
    """A request that is in order, for some types."""
    problem = wire.write_problem(small_problem())
    parameters = wire.write_parameters(SolveParameters(deadline_s=0.2, work_limit=20))
    match name:
        case "SolveRequest":
            return solver_pb2.SolveRequest(problems=[problem], parameters=parameters)
        case "SolveAnytimeRequest":
            return solver_pb2.SolveAnytimeRequest(problem=problem, parameters=parameters)
        case "EvaluateRequest":
            layout = wire.write_array(np.arange(16, dtype=np.int32).reshape(4, 4) % 8)
            return solver_pb2.EvaluateRequest(problem=problem, layout=layout)
        case "CreateJobRequest":
            return planner_pb2.CreateJobRequest(job_id="fuzz", job=wire.write_job_spec(small_job()))
        case "StreamRankRequest":
            statistics = planner_pb2.Statistics(
                sequence=1, step=1, tokens=wire.write_array(np.ones((2, 1, 8), np.int32))
            )
            return planner_pb2.StreamRankRequest(statistics=statistics)
    return None


def scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    match field.type:
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return FLOATS
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_STRING:
            return NAMES | st.text(max_size=80)
        case FieldDescriptor.TYPE_BYTES:
            return BYTES
        case FieldDescriptor.TYPE_UINT32 | FieldDescriptor.TYPE_UINT64:
            return INTEGERS.map(abs)
        case FieldDescriptor.TYPE_INT64:
            return INTEGERS | st.sampled_from([2**62, -(2**63), 2**53 + 1])
        case _:
            return INTEGERS


@st.composite
def mutated(draw: st.DrawFn, message: Message, depth: int = 0) -> Message:
    """The message with a few of its fields replaced, dropped or added, at any depth."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if message.DESCRIPTOR is tensor_pb2.Tensor.DESCRIPTOR and draw(st.booleans()):
        return message
    for field in draw(st.lists(st.sampled_from(fields), max_size=3)) if fields else ():
        action = draw(st.sampled_from(["clear", "set", "descend"]))
        if action == "clear":
            message.ClearField(field.name)
        elif field.message_type is not None and depth < 4:
            if field.is_repeated:
                container = getattr(message, field.name)
                child = container[0] if container and action == "descend" else container.add()
            else:
                child = getattr(message, field.name)
                child.SetInParent()
            draw(mutated(child, depth + 1))
        elif field.message_type is None and field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalar(field), max_size=4)))
        elif field.message_type is None:
            setattr(message, field.name, draw(scalar(field)))
    return message


@pytest.mark.parametrize(
    ("service", "method", "kind", "client_stream", "server_stream"), METHODS, ids=[method[1] for method in METHODS]
)
def test_fuzz(
    frugal: DaemonProcess,
    service: str,
    method: str,
    kind: Descriptor,
    client_stream: bool,
    server_stream: bool,
) -> None:
    with frugal.client() as client:
        _fuzz(frugal, client, service, method, kind, client_stream, server_stream)


def _fuzz(
    daemon: DaemonProcess,
    client: Client,
    service: str,
    method: str,
    kind: Descriptor,
    client_stream: bool,
    server_stream: bool,
) -> None:
    stub = getattr(client.solver if "Solver" in service else client.planner, method)
    request_type = {
        name: getattr(module, name)
        for module in (planner_pb2, solver_pb2)
        for name in module.DESCRIPTOR.message_types_by_name
    }[kind.name]
    client.create_job("fuzz", small_job(), incarnation=2**40)

    @settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        base = good(kind.name) if data.draw(st.booleans()) else None
        request = data.draw(mutated(base or request_type()))
        _check(stub, request, client_stream, server_stream)

    fuzz()
    assert daemon.process.poll() is None
    assert not daemon.events("call failed"), daemon.events("call failed")
    assert not daemon.events("stream failed"), daemon.events("stream failed")
    assert client.solve([small_problem()])
    assert client.create_job("after-fuzz", small_job()).name


def _check(stub: Callable[..., Any], request: Message, client_stream: bool, server_stream: bool) -> None:
    try:
        if client_stream:
            hello = planner_pb2.Hello(job="jobs/fuzz", incarnation=2**40, session="fuzz", reports_for=[0, 1])
            requests = [planner_pb2.StreamRankRequest(hello=hello), request, request]
            for _ in stub(iter(requests), timeout=3):
                pass
        elif server_stream:
            for _, _ in zip(stub(request, timeout=1), range(3), strict=False):
                pass
        else:
            stub(request, timeout=3)
    except grpc.RpcError as error:
        refused = error_of(error)
    else:
        return
    assert refused.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), refused
