"""OpenTelemetry traces: one shows all that became of a rank's statistics, up to the plan that it applies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.daemon import WAIT_S, Rank, Start, eventually, small_job, tokens
from tests.support.repository import ROOT

from moeplan.api.errors import NotFoundError

collector_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
collector_pb2_grpc = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
pytest.importorskip("opentelemetry.sdk.trace")

SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
"""Milliseconds after which spans are sent."""

TRAINING = """
    import sys, time
    import numpy as np
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from moeplan.runtime_client.planning.planner_stream import PlannerStream
    from tests.support.daemon import small_job, tokens

    address, collector = sys.argv[1:]
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=collector)))
    trace.set_tracer_provider(provider)
    with trace.get_tracer("training").start_as_current_span("training"):
        stream = PlannerStream(address, "traced", small_job(), 0, rank=0, reports_for=[0, 1])
    stream.report(0, tokens(0, ranks=2))
    while stream.newest < 2:
        time.sleep(0.05)
    stream.applied(stream.newest, 1)
    stream.close()
    provider.shutdown()
"""


class Collector:
    """Takes what programs send in OTLP over gRPC.

    Attributes:
        spans: All spans so far, as dicts with the service's name.
    """

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        collector_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            service = {pair.key: pair.value.string_value for pair in resource.resource.attributes}["service.name"]
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                values = {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}
                times = {"start": span.start_time_unix_nano, "end": span.end_time_unix_nano}
                values["failed"] = span.status.code == 2
                ids = {"trace": span.trace_id, "id": span.span_id, "parent": span.parent_span_id}
                self.spans.append({"service": service, "name": span.name, **ids, **times, **values})
        return collector_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in list(self.spans) if span["name"] == name]

    def stop(self) -> None:
        self._server.stop(0).wait(WAIT_S)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


def test_one_trace_from_the_ranks_statistics_to_the_applied_plan(start: Start, collector: Collector) -> None:
    daemon = start("--traces", collector.endpoint, environment=SOON).serving()
    command = [sys.executable, "-c", textwrap.dedent(TRAINING), daemon.address, collector.endpoint]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "OTEL_SERVICE_NAME": "trainer"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (training,) = collector.named("training")
    (applied,) = eventually(lambda: collector.named("moeplan.applied"))
    version = applied["moeplan.version"]

    def look() -> Any:
        looks = collector.named("moeplan.look")
        return next(
            (span for span in looks if span["moeplan.version"] == version and span["moeplan.changed_layers"]), None
        )

    found = eventually(look)
    eventually(lambda: any(span["moeplan.version"] == version for span in collector.named("moeplan.apply")))
    parts = {span["name"]: span for span in collector.spans if span["parent"] == found["id"]}
    assert set(parts) == {f"moeplan.{name}" for name in ("statistics", "solve", "store", "send", "apply")}
    inner = {span["name"] for span in collector.spans if span["parent"] == parts["moeplan.solve"]["id"]}
    assert inner == {"moeplan.queue", "moeplan.worker"}
    # All of it in the trace of the training, of both programs.
    reported = collector.named("moeplan.report")[0]
    assert {span["trace"] for span in (found, *parts.values(), reported, applied)} == {training["trace"]}
    assert found["parent"] == reported["parent"] == applied["parent"] == training["id"]
    assert (found["service"], training["service"]) == ("moeplan", "trainer")
    assert found["moeplan.job"] == "jobs/traced"
    ends = [parts[f"moeplan.{name}"]["end"] for name in ("statistics", "solve", "store", "send", "apply")]
    assert ends == sorted(ends)
    assert (parts["moeplan.send"]["moeplan.streams"], parts["moeplan.apply"]["moeplan.superseded"]) == (1, False)


def test_a_rank_that_traces_nothing_has_a_trace_for_each_look(start: Start, collector: Collector) -> None:
    daemon = start("--traces", collector.endpoint, environment=SOON).serving()
    with daemon.client() as client:
        rank = Rank(client, client.create_job("plain", small_job()).name, 0, hello={"reports_for": [0, 1]})
        for step in range(2):
            rank.report(step, tokens(step, ranks=2))
            eventually(lambda: len(collector.named("moeplan.look")) >= rank.sequence)
        looks = collector.named("moeplan.look")
        assert len({span["trace"] for span in looks}) == len(looks)
        assert not any(span["parent"] for span in looks)
        rank.close()
    daemon.terminate()


def test_a_solve_that_fails_is_marked(start: Start, collector: Collector) -> None:
    daemon = start("--traces", collector.endpoint, "--limit", "solve_s=0.1", environment=SOON).serving()
    (worker,) = daemon.workers()
    os.kill(worker, signal.SIGSTOP)
    with daemon.client() as client:
        rank = Rank(client, client.create_job("hangs", small_job()).name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        (look,) = eventually(lambda: collector.named("moeplan.look"))
        assert look["moeplan.reason"] == "solve_failed"
        assert collector.named("moeplan.solve")[0]["failed"]
        assert collector.named("moeplan.worker")[0]["moeplan.outcome"] == "overrun"
        rank.close()


def test_a_collector_that_is_away_holds_nothing_up(start: Start) -> None:
    one_by_one = SOON | {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}  # each is tried for ten seconds
    daemon = start("--traces", "http://127.0.0.1:1", environment=one_by_one).serving()
    with daemon.client() as client:
        name = client.create_job("alone", small_job()).name
        rank = Rank(client, name, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(0, ranks=2))
        assert rank.next("plan_update").plan.version == 2
        client.delete_job(name)
        assert isinstance(rank.error(), NotFoundError)
    assert daemon.terminate() == 0


def test_an_address_without_a_scheme_is_refused(start: Start) -> None:
    status, output = start("--traces", "127.0.0.1:4317").end()
    assert status == 2
    assert "traces = 127.0.0.1:4317: must be http://host:port, or https://host:port" in output


def test_without_the_package_the_line_to_write_is_said(start: Start, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "opentelemetry"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ModuleNotFoundError('none here', name='opentelemetry')")
    paths = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    status, output = start("--traces", "http://127.0.0.1:1", environment={"PYTHONPATH": paths}).end()
    assert status == 1
    assert "pip install 'moeplan[traces]'" in output
    assert "Traceback" not in output
