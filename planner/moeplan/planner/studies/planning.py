"""Planning layouts from a trace: the window's forecast, all layers together, and what they gain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import (
    Cluster,
    Constraints,
    Demand,
    ExpertSpec,
    Forecast,
    Layout,
    Plan,
    Problem,
    ProblemError,
    SolveParameters,
    SplitRule,
    evaluate,
    forecast,
    share_slots,
    solve_layers,
)
from moeplan.solvers.construct.fill import fill_for_even_split
from moeplan.solvers.plan.cost import between_nodes
from moeplan.solvers.problem.arrays import Int64

if TYPE_CHECKING:
    from moeplan.api.client import Client

__all__ = ["Gain", "PlanRequest", "PlannedLayer", "plan_trace"]


@dataclass(frozen=True, slots=True, eq=False)
class PlanRequest:
    """Layers of a trace to plan, and for what.

    Attributes:
        trace: Recorded steps.
        layers: Layers to plan.
        cluster: Devices and links.
        policy: Name of the policy.
        parameters: How hard to try, per layer.
        forecast: How the demand to plan for follows from the window, and how many steps that has.
        until: Step of the trace that the window ends before; None for the end of the trace.
        expert: Costs of an expert and of a token.
        constraints: Limits on where replicas may be.
        split_rule: How the system that will run the layouts divides tokens; None for the policy's own.
        groups: Groups of consecutive experts.
        current: Layouts in force, by layer.
        max_moves: Most replicas that a re-plan of a layer may copy; None for no limit.
        failed: Devices that are gone.
        fill_slots: Whether every slot must hold an expert, as engines want it that divide tokens evenly.
    """

    trace: Trace
    layers: Sequence[int]
    cluster: Cluster
    policy: str = "hybrid"
    parameters: SolveParameters = field(default=SolveParameters())
    forecast: Forecast = field(default=Forecast())
    until: int | None = None
    expert: ExpertSpec = field(default=ExpertSpec())
    constraints: Constraints = field(default=Constraints())
    split_rule: SplitRule | None = None
    groups: int = 1
    current: Mapping[int, Layout] = field(default_factory=dict)
    max_moves: int | None = None
    failed: Sequence[int] = ()
    fill_slots: bool = False

    @property
    def end(self) -> int:
        """Number of steps of the trace that come before the window ends."""
        return self.trace.steps if self.until is None else self.until


@dataclass(frozen=True, slots=True)
class Gain:
    """Imbalance under the layout in force, or the static one where there is none, and under the plan.

    Attributes:
        before: Of the old layout; None where it does not hold every expert, because devices failed.
        after: Of the new layout.
    """

    before: float | None
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """One layer's plan and what it gains.

    Attributes:
        layer: Index of the layer in the trace.
        plan: The plan.
        judged: The step after the window, or its last one where the trace ends with it, int64[sources, experts].
        window: Gain on what the window forecasts.
        next_step: Gain on the step after the window; None where the trace ends with it.
        between_nodes: Share of the tokens computed on a different node from their source; None where the trace does
            not tell sources apart, or there is one node.
        move_bytes: Weights to copy; None where nothing is in force, or the size of an expert is not known.
    """

    layer: int
    plan: Plan
    judged: Int64
    window: Gain
    next_step: Gain | None
    between_nodes: float | None
    move_bytes: int | None


def plan_trace(
    request: PlanRequest,
    *,
    client: Client | None = None,
    shared_slots: int | None = None,
    on_plan: Callable[[], None] = lambda: None,
) -> list[PlannedLayer]:
    """Plan layers from the forecast that `compare`, `replay` and the daemon use too.

    Args:
        request: What to plan.
        client: Daemon to solve in; None for this process.
        shared_slots: Slots per device over all layers, to be divided by what each layer gains, in this process; None
            for those of the cluster in each layer.
        on_plan: Called whenever a layer is planned, for progress.

    Raises:
        TraceError: the trace is damaged.
        ProblemError: `until` is no step of the trace, or a layer cannot be planned; then the error's field may begin
            with ``layers[number].``.
        ServiceError: the daemon has no answer.
    """
    problems, judged = _read(request)
    with _numbered(request.layers):
        plans = _solve(problems, request, client, shared_slots, on_plan)
        if request.fill_slots:
            plans = [_filled(problem, plan) for problem, plan in zip(problems, plans, strict=True)]
    return [
        _judge(layer, problem, plan, step, unseen=request.end < request.trace.steps)
        for layer, problem, plan, step in zip(request.layers, problems, plans, judged, strict=True)
    ]


def _read(request: PlanRequest) -> tuple[list[Problem], list[Int64]]:
    """A problem per layer; and the step after the window, or else its last one."""
    trace, end = request.trace, request.end
    if not 1 <= end <= trace.steps:
        raise ProblemError("until", end, f"must be 1 to {trace.steps}, the number of steps of the trace")
    first, judged = max(0, end - request.forecast.window_steps), min(end, trace.steps - 1)
    problems, last = [], []
    for layer, steps in zip(request.layers, trace.by_layer(request.layers, first, judged + 1), strict=True):
        problems.append(_problem(request, layer, steps[: end - first]))
        last.append(steps[-1].copy())  # not a view, which would hold them all
    return problems, last


def _problem(request: PlanRequest, layer: int, window: Int64) -> Problem:
    problem = Problem(
        request.cluster,
        forecast(window, request.forecast),
        request.expert,
        current=request.current.get(layer),
        max_moves=request.max_moves,
        groups=request.groups,
        constraints=request.constraints,
        split_rule=request.split_rule,
    )
    return problem.without(request.failed) if request.failed else problem


def _solve(
    problems: Sequence[Problem],
    request: PlanRequest,
    client: Client | None,
    shared_slots: int | None,
    on_plan: Callable[[], None],
) -> list[Plan]:
    policy, parameters = request.policy, request.parameters
    if shared_slots is not None:
        return share_slots(problems, shared_slots, policy=policy, parameters=parameters).plans
    if client is not None:  # one call for each, so that no call takes long
        plans = []
        for problem in problems:
            plans += client.solve([problem], policy=policy, parameters=parameters)
            on_plan()
        return plans
    if parameters.deadline_s is not None:
        parameters = replace(parameters, deadline_s=parameters.deadline_s * len(problems))
    return solve_layers(problems, policy=policy, parameters=parameters, on_plan=on_plan)


def _filled(problem: Problem, plan: Plan) -> Plan:
    """The plan with a replica in every slot."""
    kept = None if problem.max_moves is None else problem.current
    layout = fill_for_even_split(plan.layout, problem.mean_load, kept)
    if layout is plan.layout:
        return plan
    full = evaluate(problem, layout, plan.split.rule)
    return replace(full, policy=plan.policy, bound=plan.bound, seconds=plan.seconds, termination=plan.termination)


@contextmanager
def _numbered(layers: Sequence[int]) -> Iterator[None]:
    """Errors of ``problems[index]`` raised inside name the layer of the trace instead."""
    try:
        yield
    except ProblemError as error:
        head, bracket, rest = error.field.partition("].")
        if not bracket or not head.startswith("problems["):
            raise
        layer = layers[int(head.removeprefix("problems["))]
        raise type(error)(f"layers[{layer}].{rest}", error.value, error.reason) from None


def _judge(layer: int, problem: Problem, plan: Plan, judged: Int64, *, unseen: bool) -> PlannedLayer:
    rule = plan.split.rule
    before = problem.current or Layout.contiguous(problem.experts, problem.capacity)
    # Judged without limits: a layout in force need not keep those that the plan does, and layers may share slots.
    room = np.where(problem.cluster.slots > 0, problem.experts, 0)
    free = Problem(replace(problem.cluster, slots=room, memory_bytes=None), problem.demand)
    window = Gain(_imbalance(free, before, rule), plan.mean_imbalance)
    next_step = None
    if unseen:
        demand = replace(free, demand=Demand.of(judged))
        planned = _imbalance(demand, plan.layout, rule)
        assert planned is not None, "a plan holds every expert"
        next_step = Gain(_imbalance(demand, before, rule), planned)
    crossing = None
    if problem.cluster.nodes > 1 and problem.demand.sources > 1:
        crossing = float(problem.demand.weights @ between_nodes(problem, plan.layout, plan.split))
    weights = problem.expert.weight_bytes
    return PlannedLayer(
        layer=layer,
        plan=plan,
        judged=judged,
        window=window,
        next_step=next_step,
        between_nodes=crossing,
        move_bytes=len(plan.moves) * weights if plan.moves is not None and weights else None,
    )


def _imbalance(problem: Problem, layout: Layout, rule: SplitRule) -> float | None:
    """Mean imbalance of a layout; None where an expert has no replica."""
    if not layout.placed.any(axis=0).all():
        return None
    return evaluate(problem, layout, rule).mean_imbalance
