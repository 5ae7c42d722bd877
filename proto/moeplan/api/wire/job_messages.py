"""Jobs and their plans, to and from messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeplan.api.job_plans import Decision, JobPlan, LayerPlan, Reason
from moeplan.api.jobs import (
    Closing,
    Forecast,
    ForecastMethod,
    Job,
    JobSpec,
    JobStatus,
    Payback,
    Replan,
    StatisticsCount,
    check_incarnation,
    check_size,
)
from moeplan.api.wire.problem_messages import (
    read_cluster,
    read_expert,
    read_parameters,
    write_cluster,
    write_expert,
    write_parameters,
)
from moeplan.api.wire.tensors import field, read_array, read_layout, read_layouts, write_layout, write_layouts
from moeplan.api.wire.times import read_duration, read_seconds, read_time, write_duration, write_time
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.split_rules import SplitRule, split_rule
from moeplan.v1 import job_pb2

__all__ = [
    "read_job",
    "read_job_plan",
    "read_job_spec",
    "read_status",
    "read_stored_plan",
    "write_job_plan",
    "write_job_spec",
    "write_status",
]

_FORECAST, _CLOSING, _REPLAN = Forecast(), Closing(), Replan()
_METHODS = {job_pb2.Forecast.Method.Value(f"METHOD_{method.name}"): method for method in ForecastMethod}
_METHODS[job_pb2.Forecast.METHOD_UNSPECIFIED] = _FORECAST.method
_CODES = {
    reason: job_pb2.Decision.REASON_UNSPECIFIED
    if reason is Reason.UNKNOWN
    else job_pb2.Decision.Reason.Value(f"REASON_{reason.name}")
    for reason in Reason
}
_REASONS = {code: reason for reason, code in _CODES.items()}


def read_job_spec(message: job_pb2.Job, *, checked: bool = False) -> JobSpec:
    """The owner's description of a job; the fields that the server sets are ignored.

    If `checked`, it comes from the daemon's own store, and its layouts were checked before.

    Raises:
        ProblemError: a field is out of range, or no layout can exist.
    """
    with field("job"):
        cluster = read_cluster(message.cluster)
        expert = read_expert(message.expert)
        parameters = read_parameters(message.parameters)
        forecast = _read_forecast(message.forecast)
    if not checked:  # an older daemon may have taken and kept a larger one
        check_incarnation("job.incarnation", message.incarnation)
    initial: tuple[Layout, ...] = ()
    if message.HasField("initial_layouts"):
        layers, experts = message.layers, message.experts
        check_size(cluster, layers, experts, message.ranks)
        initial = read_layouts("job.initial_layouts", message.initial_layouts, layers, experts, checked=checked)
    return JobSpec(
        cluster=cluster,
        layers=message.layers,
        experts=message.experts,
        ranks=message.ranks,
        initial=initial,
        expert=expert,
        policy=message.policy or JobSpec.policy,
        parameters=parameters,
        forecast=forecast,
        replan=_read_replan(message.replan),
        closing=_read_closing(message.closing),
        max_moves=message.max_moves if message.HasField("max_moves") else None,
        groups=message.groups or 1,
        merge_sources=message.merge_sources,
        split_rule=split_rule("job.split_rule", message.split_rule) if message.split_rule else None,
        spill_slots=message.spill_slots if message.HasField("spill_slots") else None,
    )


def write_job_spec(spec: JobSpec, incarnation: int = 0) -> job_pb2.Job:
    """The message of a job, as its owner sends it at its start number `incarnation`."""
    payback = spec.replan.payback
    return job_pb2.Job(
        incarnation=incarnation,
        cluster=write_cluster(spec.cluster),
        expert=write_expert(spec.expert),
        layers=spec.layers,
        experts=spec.experts,
        ranks=spec.ranks,
        policy=spec.policy,
        parameters=write_parameters(spec.parameters),
        forecast=job_pb2.Forecast(
            method=job_pb2.Forecast.Method.Value(f"METHOD_{spec.forecast.method.name}"),
            window_steps=spec.forecast.window_steps,
            smoothing=spec.forecast.smoothing,
        ),
        replan=job_pb2.Replan(
            every_steps=spec.replan.every_steps,
            payback=None
            if payback is None
            else job_pb2.Payback(horizon_steps=payback.horizon_steps, cost_factor=payback.cost_factor),
        ),
        closing=job_pb2.Closing(
            max_lag_steps=spec.closing.max_lag_steps,
            timeout=write_duration(spec.closing.timeout_s),
            quorum=spec.closing.quorum,
        ),
        initial_layouts=write_layouts(spec.initial),
        max_moves=spec.max_moves,
        groups=spec.groups,
        merge_sources=spec.merge_sources,
        split_rule=spec.split_rule or "",
        spill_slots=spec.spill_slots,
    )


def read_job(message: job_pb2.Job) -> Job:
    """A job as the server knows it.

    Raises:
        ProblemError: a field is out of range.
    """
    return Job(
        name=message.name,
        incarnation=message.incarnation,
        spec=read_job_spec(message),
        created=read_time(message.create_time),
        status=read_status(message.status),
    )


def read_status(message: job_pb2.JobStatus) -> JobStatus:
    """The state of a job as its server knows it."""
    count = message.statistics
    return JobStatus(
        plan_version=message.plan_version,
        connected_ranks=message.connected_ranks,
        closed_step=message.closed_step if message.HasField("closed_step") else None,
        applied_version=message.applied_version,
        decision=_read_decision(message.decision) if message.HasField("decision") else None,
        statistics=StatisticsCount(count.accepted, count.duplicate, count.late, count.missing, count.early),
        owner=message.owner,
        silent_ranks=tuple(message.silent_ranks),
        late_ranks=tuple(message.late_ranks),
        saved_s=message.saved_s,
        failure=_read_decision(message.failure) if message.HasField("failure") else None,
    )


def write_status(status: JobStatus) -> job_pb2.JobStatus:
    """The message of what the server knows about a job."""
    count = status.statistics
    return job_pb2.JobStatus(
        plan_version=status.plan_version,
        connected_ranks=status.connected_ranks,
        closed_step=status.closed_step,
        applied_version=status.applied_version,
        decision=None if status.decision is None else _write_decision(status.decision),
        statistics=job_pb2.StatisticsCount(
            accepted=count.accepted,
            duplicate=count.duplicate,
            late=count.late,
            missing=count.missing,
            early=count.early,
        ),
        owner=status.owner,
        silent_ranks=status.silent_ranks,
        late_ranks=status.late_ranks,
        saved_s=status.saved_s,
        failure=None if status.failure is None else _write_decision(status.failure),
    )


def read_job_plan(message: job_pb2.JobPlan) -> JobPlan:
    """A version of a job's plan, with the layers that the message holds.

    Raises:
        ProblemError: a layout is none.
    """
    return _read_job_plan(message, [read_layout(_layout_of(layer), layer.layout) for layer in message.layers])


def read_stored_plan(message: job_pb2.JobPlan, experts: int) -> JobPlan:
    """The same from the daemon's own store: layouts of `experts` experts, which were checked when they were made.

    Raises:
        ProblemError: a layout is not a whole tensor.
    """
    tables = [read_array(_layout_of(layer), layer.layout) for layer in message.layers]
    return _read_job_plan(message, [Layout.trusted(table, experts) for table in tables])


def write_job_plan(job: str, plan: JobPlan, after_version: int = 0) -> job_pb2.JobPlan:
    """The message of a plan of the job named `job`, with the layers that are newer than `after_version`."""
    return job_pb2.JobPlan(
        name=f"{job}/plans/{plan.version}",
        version=plan.version,
        incarnation=plan.incarnation,
        layers=[_write_layer(layer) for layer in plan.layers_after(after_version)],
        decision=_write_decision(plan.decision),
        create_time=None if plan.created is None else write_time(plan.created),
        solve_time=write_duration(plan.solve_s),
    )


def _read_job_plan(message: job_pb2.JobPlan, layouts: Sequence[Layout]) -> JobPlan:
    return JobPlan(
        version=message.version,
        incarnation=message.incarnation,
        layers=tuple(_read_layer(layer, layout) for layer, layout in zip(message.layers, layouts, strict=True)),
        decision=_read_decision(message.decision),
        solve_s=read_seconds(message.solve_time),
        created=read_time(message.create_time) if message.HasField("create_time") else None,
    )


def _layout_of(layer: job_pb2.LayerPlan) -> str:
    return f"layers[{layer.layer}].layout"


def _read_layer(message: job_pb2.LayerPlan, layout: Layout) -> LayerPlan:
    return LayerPlan(
        layer=message.layer,
        version=message.version,
        layout=layout,
        split_rule=split_rule(f"layers[{message.layer}].split_rule", message.split_rule or SplitRule.OPTIMAL),
        cost_s=message.cost_s if message.HasField("cost_s") else None,
        bound=message.bound if message.HasField("bound") else None,
        gap=message.gap if message.HasField("gap") else None,
        imbalance=message.imbalance if message.HasField("imbalance") else None,
        imbalance_before=message.imbalance_before if message.HasField("imbalance_before") else None,
        moved_replicas=message.moved_replicas,
    )


def _write_layer(layer: LayerPlan) -> job_pb2.LayerPlan:
    return job_pb2.LayerPlan(
        layer=layer.layer,
        version=layer.version,
        layout=write_layout(layer.layout),
        cost_s=layer.cost_s,
        bound=layer.bound,
        gap=layer.gap,
        imbalance=layer.imbalance,
        imbalance_before=layer.imbalance_before,
        moved_replicas=layer.moved_replicas,
        split_rule=layer.split_rule,
    )


def _read_decision(message: job_pb2.Decision) -> Decision:
    return Decision(
        reason=_REASONS.get(message.reason, Reason.UNKNOWN),
        step=message.step,
        window_steps=message.window_steps,
        cost_before_s=message.cost_before_s,
        cost_after_s=message.cost_after_s,
        move_cost_s=message.move_cost_s,
        horizon_steps=message.horizon_steps,
        changed_layers=message.changed_layers,
        detail=message.detail,
    )


def _write_decision(decision: Decision) -> job_pb2.Decision:
    return job_pb2.Decision(
        reason=_CODES[decision.reason],
        step=decision.step,
        window_steps=decision.window_steps,
        cost_before_s=decision.cost_before_s,
        cost_after_s=decision.cost_after_s,
        move_cost_s=decision.move_cost_s,
        horizon_steps=decision.horizon_steps,
        changed_layers=decision.changed_layers,
        detail=decision.detail,
    )


def _read_forecast(message: job_pb2.Forecast) -> Forecast:
    if message.method not in _METHODS:
        raise ProblemError("forecast.method", message.method, "must be LAST, MEAN, EMA or SCENARIOS")
    return Forecast(
        method=_METHODS[message.method],
        window_steps=message.window_steps or _FORECAST.window_steps,
        smoothing=message.smoothing or _FORECAST.smoothing,
    )


def _read_replan(message: job_pb2.Replan) -> Replan:
    payback = None
    if message.HasField("payback"):
        payback = Payback(message.payback.horizon_steps)
        if message.payback.HasField("cost_factor"):
            payback = replace(payback, cost_factor=message.payback.cost_factor)
    return Replan(message.every_steps or _REPLAN.every_steps, payback)


def _read_closing(message: job_pb2.Closing) -> Closing:
    return Closing(
        max_lag_steps=message.max_lag_steps or _CLOSING.max_lag_steps,
        timeout_s=read_duration("job.closing.timeout", message.timeout)
        if message.HasField("timeout")
        else _CLOSING.timeout_s,
        quorum=message.quorum if message.HasField("quorum") else _CLOSING.quorum,
    )
