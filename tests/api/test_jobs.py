"""A job and its plans mean the same in a message, and a job that cannot be is refused before anything is sent."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.equality import same
from tests.support.instances import problems, random_layout

from moeplan.api import (
    Closing,
    Decision,
    Forecast,
    ForecastMethod,
    Job,
    JobPlan,
    JobSpec,
    JobStatus,
    LayerPlan,
    Payback,
    Reason,
    Replan,
    StatisticsCount,
    wire,
)
from moeplan.api.jobs import MAX_INCARNATION
from moeplan.solvers import Cluster, ExpertSpec, InfeasibleError, Layout, ProblemError, SolveParameters
from moeplan.solvers.problem.split_rules import RANK_RULES, SplitRule
from moeplan.v1 import job_pb2

CLUSTER = Cluster.uniform(2, 6)
BOTH_HOLD_0 = Layout(np.array([[0, 1, 2, 3, -1], [4, 5, 6, 7, 0]]), 8)
COUNTS = st.integers(0, 2**62)
SECONDS = st.floats(0, 1e6)
TIMES = st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC))
DECISIONS = st.builds(
    Decision,
    reason=st.sampled_from(Reason),
    step=COUNTS,
    window_steps=st.integers(0, 4096),
    cost_before_s=SECONDS,
    cost_after_s=SECONDS,
    move_cost_s=SECONDS,
    horizon_steps=st.integers(0, 2**31 - 1),
    changed_layers=st.integers(0, 4096),
    detail=st.text(max_size=20),
)


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    """Jobs in which every field may differ from its default."""
    problem = draw(problems())
    layers = draw(st.integers(1, 3))
    given_layouts = draw(st.booleans())
    spill_slots = None if given_layouts else draw(st.none() | st.integers(0, 9))
    token_bytes = draw(st.sampled_from([0, 4096]))
    return JobSpec(
        cluster=problem.cluster,
        layers=layers,
        experts=problem.experts,
        ranks=draw(st.integers(0, 9)),
        initial=tuple(random_layout(problem, layer) for layer in range(layers)) if given_layouts else (),
        expert=ExpertSpec(weight_bytes=draw(st.integers(0, 2**40)), token_bytes=token_bytes),
        policy=draw(st.sampled_from(["hybrid", "eplb"])),
        spill_slots=spill_slots,
        parameters=SolveParameters(work_limit=draw(st.integers(0, 9999)), seed=draw(st.integers(0, 9))),
        forecast=draw(st.builds(Forecast, st.sampled_from(ForecastMethod), st.integers(1, 4096), st.floats(0.001, 1))),
        replan=Replan(
            draw(st.integers(1, 99)), draw(st.none() | st.builds(Payback, st.integers(1, 99), st.floats(0, 9)))
        ),
        closing=draw(
            st.builds(
                Closing,
                st.integers(1, 1024),
                st.integers(1, 10**13).map(lambda nanos: nanos / 10**9),
                st.floats(0, 1),
            )
        ),
        max_moves=draw(st.none() | st.integers(0, 99)),
        groups=draw(st.sampled_from([groups for groups in (1, 2, 5) if problem.experts % groups == 0])),
        merge_sources=draw(st.booleans()) and not token_bytes,
        split_rule=draw(st.none() | st.sampled_from(sorted(RANK_RULES))),
    )


@given(specs(), st.integers(0, MAX_INCARNATION))
def test_jobs(spec: JobSpec, incarnation: int) -> None:
    message = job_pb2.Job.FromString(wire.write_job_spec(spec, incarnation).SerializeToString())
    assert same(wire.read_job_spec(message), spec)
    assert message.incarnation == incarnation
    assert wire.write_job_spec(wire.read_job_spec(message), incarnation) == message


@given(
    st.builds(
        JobStatus,
        plan_version=COUNTS,
        connected_ranks=st.integers(0, 65_536),
        closed_step=st.none() | COUNTS,
        applied_version=COUNTS,
        decision=st.none() | DECISIONS,
        statistics=st.builds(StatisticsCount, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
        owner=st.text(max_size=20),
    )
)
def test_what_the_server_knows(status: JobStatus) -> None:
    assert wire.read_status(wire.write_status(status)) == status


@st.composite
def job_plans(draw: st.DrawFn) -> JobPlan:
    problem = draw(problems())
    figure = st.none() | SECONDS
    layers = tuple(
        LayerPlan(
            layer=index,
            version=draw(st.integers(1, 9)),
            layout=random_layout(problem, index),
            split_rule=draw(st.sampled_from(SplitRule)),
            cost_s=draw(figure),
            bound=draw(figure),
            gap=draw(figure),
            imbalance=draw(figure),
            imbalance_before=draw(figure),
            moved_replicas=draw(st.integers(0, 99)),
        )
        for index in range(draw(st.integers(1, 3)))
    )
    nanos = draw(st.integers(0, 10**12))
    return JobPlan(9, draw(COUNTS), layers, draw(DECISIONS), nanos / 10**9, draw(st.none() | TIMES))


@given(job_plans())
def test_plans_of_jobs(plan: JobPlan) -> None:
    message = job_pb2.JobPlan.FromString(wire.write_job_plan("jobs/x", plan).SerializeToString())
    assert message.name == "jobs/x/plans/9"
    assert same(wire.read_job_plan(message), plan)
    assert same(wire.read_stored_plan(message, plan.layers[0].layout.experts), plan)
    newer = wire.read_job_plan(wire.write_job_plan("jobs/x", plan, after_version=5))
    assert same(newer, replace(plan, layers=plan.layers_after(5)))


def test_a_reason_of_a_newer_server_is_unknown_and_no_error() -> None:
    message = wire.write_job_plan("jobs/x", JobPlan(1, 0, (), Decision(Reason.GAIN)))
    message.decision.reason = 99  # type: ignore[assignment]
    assert wire.read_job_plan(message).decision.reason is Reason.UNKNOWN


def test_a_message_that_says_little_is_a_job_with_the_defaults() -> None:
    """What a program in another language leaves out is what a program in Python leaves out."""
    message = job_pb2.Job(cluster=wire.write_cluster(CLUSTER), layers=2, experts=8)
    assert same(wire.read_job_spec(message), JobSpec(CLUSTER, layers=2, experts=8))
    message.replan.payback.horizon_steps = 7
    assert wire.read_job_spec(message).replan == Replan(payback=Payback(7))


def test_defaults_of_a_job() -> None:
    spec = JobSpec(CLUSTER, layers=2, experts=8)
    assert spec.ranks == 2
    assert spec.initial == (Layout.contiguous(8, [6, 6]),) * 2


def test_a_job_of_the_server() -> None:
    spec, created = JobSpec(CLUSTER, layers=1, experts=8), datetime(2026, 1, 2, 3, tzinfo=UTC)
    message = wire.write_job_spec(spec, 3)
    message.name = "jobs/x"
    message.create_time.CopyFrom(wire.write_time(created))
    message.status.CopyFrom(wire.write_status(JobStatus(5)))
    assert same(wire.read_job(message), Job("jobs/x", 3, spec, created, JobStatus(5)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layers": 0}, "job.layers = 0: must be 1 to 4096"),
        ({"experts": 2**31}, "job.experts = 2147483648: must be 1 to 65536"),
        ({"ranks": -1}, "job.ranks = -1: must be 0 to 65536"),
        ({"experts": 13}, "cluster.slots = 12 slots: 13 experts need 1 more"),
        ({"groups": 3}, "groups = 3: must divide the number of experts"),
        ({"max_moves": -1}, "job.max_moves = -1: must be at least 0, or None"),
        ({"initial": (Layout.contiguous(8, [6, 6]),)}, "job.initial_layouts = 1 layouts: must be 2"),
        ({"initial": (Layout.contiguous(7, [6, 6]),) * 2}, r"job.initial_layouts\[0\].experts = 7: must be 8"),
        ({"initial": (Layout.contiguous(8, [4, 4, 4]),) * 2}, r"job.initial_layouts\[0\].devices = 3"),
        (
            {"initial": (Layout(np.array([range(8), range(8)]), 8),) * 2},
            r"initial_layouts\[0\].slots\[0\] = 8 replicas",
        ),
        ({"spill_slots": -1}, "job.spill_slots = -1: must be 0 to"),
        (
            {"spill_slots": 1, "initial": (Layout(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), 8), BOTH_HOLD_0)},
            r"job.initial_layouts\[1\] = 9 replicas: must be one per expert \(8\)",
        ),
        ({"merge_sources": True, "expert": ExpertSpec(token_bytes=1)}, "job.merge_sources"),
    ],
)
def test_a_job_that_cannot_be_is_refused(change: dict[str, Any], error: str) -> None:
    values: dict[str, Any] = {"cluster": CLUSTER, "layers": 2, "experts": 8}
    with pytest.raises(ProblemError, match=error):
        JobSpec(**(values | change))


def test_experts_that_do_not_fit_into_memory_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="8 experts need 4 more"):
        JobSpec(Cluster.uniform(2, 6, memory_bytes=20), layers=1, experts=8, expert=ExpertSpec(weight_bytes=10))


def test_every_field_of_a_job_is_in_the_round_trip() -> None:
    """A field that is added to a type and forgotten in its conversion shows here, or in the properties above."""
    written = wire.write_job_spec(JobSpec(CLUSTER, layers=1, experts=8, max_moves=3))
    renamed = {"initial": "initial_layouts"}
    for field in fields(JobSpec):
        assert renamed.get(field.name, field.name) in written.DESCRIPTOR.fields_by_name
