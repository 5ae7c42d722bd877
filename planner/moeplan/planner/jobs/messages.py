"""Between the messages of jobs, reports and plans and the types of the planning core."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from moeplan.api import wire
from moeplan.api.jobs import Closing, Forecast, ForecastMethod, JobSpec, Payback, Replan
from moeplan.planner.jobs.job_plan import Decision, JobPlan, LayerPlan, Reason
from moeplan.planner.jobs.window import Report
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.v1 import job_pb2, planner_pb2

__all__ = ["read_job", "read_plan", "read_report", "timestamp", "write_decision", "write_plan"]

_FORECAST, _CLOSING = Forecast(), Closing()
_METHODS = {
    job_pb2.Forecast.METHOD_UNSPECIFIED: ForecastMethod.SCENARIOS,
    job_pb2.Forecast.METHOD_LAST: ForecastMethod.LAST,
    job_pb2.Forecast.METHOD_MEAN: ForecastMethod.MEAN,
    job_pb2.Forecast.METHOD_EMA: ForecastMethod.EMA,
    job_pb2.Forecast.METHOD_SCENARIOS: ForecastMethod.SCENARIOS,
}


def read_job(job: job_pb2.Job) -> JobSpec:
    """What the owner of a job said; the fields that the server sets are ignored.

    Raises:
        ProblemError: a field is out of range, or no layout can exist.
    """
    with wire.field("job"):
        cluster = wire.read_cluster(job.cluster)
        expert = wire.read_expert(job.expert)
        parameters = wire.read_parameters(job.parameters)
    if job.incarnation < 0:
        raise ProblemError("job.incarnation", job.incarnation, "must be at least 0")
    if not 1 <= job.experts <= 65_536 or not 1 <= job.layers <= 4_096:
        raise ProblemError("job.layers, job.experts", [job.layers, job.experts], "must be 1..4096 and 1..65536")
    if job.forecast.method not in _METHODS:
        raise ProblemError("job.forecast.method", job.forecast.method, "must be LAST, MEAN, EMA or SCENARIOS")
    payback = None
    if job.replan.HasField("payback"):
        message = job.replan.payback
        payback = Payback(message.horizon_steps, message.cost_factor if message.HasField("cost_factor") else 1.0)
    closing = Closing(
        max_lag_steps=job.closing.max_lag_steps or _CLOSING.max_lag_steps,
        timeout_s=wire.read_duration("job.closing.timeout", job.closing.timeout)
        if job.closing.HasField("timeout")
        else _CLOSING.timeout_s,
        quorum=job.closing.quorum if job.closing.HasField("quorum") else _CLOSING.quorum,
    )
    if job.HasField("initial_layouts"):
        initial = _read_layouts(job)
    else:
        with wire.field("job"):
            initial = (Layout.contiguous(job.experts, cluster.slots),) * job.layers
    return JobSpec(
        cluster=cluster,
        layers=job.layers,
        experts=job.experts,
        ranks=job.ranks or cluster.devices,
        initial=initial,
        expert=expert,
        policy=job.policy or JobSpec.policy,
        parameters=parameters,
        forecast=Forecast(
            _METHODS[job.forecast.method],
            job.forecast.window_steps or _FORECAST.window_steps,
            job.forecast.smoothing or _FORECAST.smoothing,
        ),
        replan=Replan(job.replan.every_steps or 1, payback),
        closing=closing,
        max_moves=job.max_moves if job.HasField("max_moves") else None,
        groups=job.groups or 1,
        merge_sources=job.merge_sources,
    )


def _read_layouts(job: job_pb2.Job) -> tuple[Layout, ...]:
    tables = wire.read_array("job.initial_layouts", job.initial_layouts)
    if tables.dtype.kind != "i" or tables.ndim != 3 or len(tables) != job.layers:
        found = f"{tables.dtype} of shape {list(tables.shape)}"
        raise ProblemError("job.initial_layouts", found, f"must be int32[{job.layers}, devices, width]")
    layouts = []
    for index, table in enumerate(tables):
        with wire.field(f"job.initial_layouts[{index}]"):
            layouts.append(Layout(table, job.experts))
    return tuple(layouts)


def read_report(spec: JobSpec, speaks_for: tuple[int, ...], message: planner_pb2.Statistics) -> Report:
    """Statistics of a stream that reports for `speaks_for`.

    Raises:
        ProblemError: a layer, a rank, the shape or a count is not one of the job.
    """
    if message.step < 0:
        raise ProblemError("statistics.step", message.step, "must be at least 0")
    # What the message leaves out needs no check, and nearly every message leaves out both.
    if message.layers:
        layers = np.array(message.layers, np.int64)
        _check_ids("statistics.layers", layers, spec.layers)
    else:
        layers = np.arange(spec.layers, dtype=np.int64)
    ranks = np.array(message.ranks or speaks_for, np.int64)
    if message.ranks:
        _check_ids("statistics.ranks", ranks, spec.ranks)
        if not set(message.ranks) <= set(speaks_for):
            stranger = min(set(message.ranks) - set(speaks_for))
            raise ProblemError("statistics.ranks", stranger, "must be one of the ranks that the hello reports for")
    tokens = wire.read_counts("statistics.tokens", message.tokens)
    expected = (len(layers), len(ranks), spec.experts)
    if tokens.shape != expected:
        raise ProblemError(
            "statistics.tokens.shape", list(tokens.shape), f"must be [layers, ranks, experts] = {list(expected)}"
        )
    return Report(message.step, layers, ranks, tokens)


def _check_ids(name: str, ids: np.ndarray[tuple[int], np.dtype[np.int64]], limit: int) -> None:
    if len(ids) == 1:
        if not 0 <= ids[0] < limit:
            raise ProblemError(name, int(ids[0]), f"must be 0..{limit - 1}")
        return
    outside = (ids < 0) | (ids >= limit)
    if outside.any():
        raise ProblemError(name, int(ids[outside][0]), f"must be 0..{limit - 1}")
    if len(np.unique(ids)) != len(ids):
        raise ProblemError(name, ids.tolist()[:16], "must not repeat")


def write_decision(decision: Decision) -> job_pb2.Decision:
    """The message of a decision."""
    return job_pb2.Decision(
        reason=job_pb2.Decision.Reason.Value(f"REASON_{decision.reason.name}"),
        step=decision.step,
        window_steps=decision.window_steps,
        cost_before_s=decision.cost_before_s,
        cost_after_s=decision.cost_after_s,
        move_cost_s=decision.move_cost_s,
        horizon_steps=decision.horizon_steps,
        changed_layers=decision.changed_layers,
        detail=decision.detail,
    )


def write_plan(job: str, plan: JobPlan, created: Timestamp, after_version: int = 0) -> job_pb2.JobPlan:
    """The message of a plan, with the layers that are newer than `after_version`."""
    return job_pb2.JobPlan(
        name=f"{job}/plans/{plan.version}",
        version=plan.version,
        incarnation=plan.incarnation,
        layers=[_write_layer(layer) for layer in plan.layers_after(after_version)],
        decision=write_decision(plan.decision),
        create_time=created,
        solve_time=wire.write_duration(plan.solve_s),
    )


def _write_layer(layer: LayerPlan) -> job_pb2.LayerPlan:
    return job_pb2.LayerPlan(
        layer=layer.layer,
        version=layer.version,
        layout=wire.write_array(layer.layout.slots),
        cost_s=layer.cost_s,
        bound=layer.bound,
        gap=layer.gap,
        imbalance=layer.imbalance,
        imbalance_before=layer.imbalance_before,
        moved_replicas=layer.moved_replicas,
        split_rule=layer.split_rule,
    )


def read_plan(message: job_pb2.JobPlan, experts: int) -> JobPlan:
    """A whole plan, as the store keeps it; its layouts were checked when they were made.

    Raises:
        ProblemError: a layout is not a whole tensor.
    """
    decision = message.decision
    return JobPlan(
        version=message.version,
        incarnation=message.incarnation,
        layers=tuple(
            LayerPlan(
                layer=layer.layer,
                version=layer.version,
                layout=Layout.trusted(wire.read_array(f"layers[{layer.layer}].layout", layer.layout), experts),
                split_rule=layer.split_rule,
                cost_s=layer.cost_s if layer.HasField("cost_s") else None,
                bound=layer.bound if layer.HasField("bound") else None,
                gap=layer.gap if layer.HasField("gap") else None,
                imbalance=layer.imbalance if layer.HasField("imbalance") else None,
                imbalance_before=layer.imbalance_before if layer.HasField("imbalance_before") else None,
                moved_replicas=layer.moved_replicas,
            )
            for layer in message.layers
        ),
        decision=Decision(
            reason=Reason[job_pb2.Decision.Reason.Name(decision.reason).removeprefix("REASON_")],
            step=decision.step,
            window_steps=decision.window_steps,
            cost_before_s=decision.cost_before_s,
            cost_after_s=decision.cost_after_s,
            move_cost_s=decision.move_cost_s,
            horizon_steps=decision.horizon_steps,
            changed_layers=decision.changed_layers,
            detail=decision.detail,
        ),
        solve_s=message.solve_time.seconds + message.solve_time.nanos * 1e-9,
    )


def timestamp(seconds: float) -> Timestamp:
    """The message of a Unix time."""
    message = Timestamp()
    message.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return message
