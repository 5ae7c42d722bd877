"""Judging policies on steps that they did not see: plan from a window, evaluate on the step right after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import (
    Cluster,
    Demand,
    Forecast,
    Layout,
    Problem,
    SolveParameters,
    SplitRule,
    evaluate,
    forecast,
    solve,
)
from moeplan.solvers.policies.registry import find

__all__ = ["Comparison", "Setting", "Summary", "compare", "summary"]

Summary = dict[str, float]


class NextStep(TypedDict):
    """Imbalance of the step after the window, by split."""

    even: Summary
    optimal: Summary


class Row(TypedDict):
    """Measurements of one policy; see `compare`."""

    policy: str
    fitted: Summary
    next_step: NextStep
    gap_to_bound: Summary
    moved_fraction: Summary
    plan_ms_per_layer: Summary


class Comparison(TypedDict):
    """The answer of `compare`."""

    policies: list[Row]


@dataclass(frozen=True, slots=True)
class Setting:
    """Conditions that all policies are given alike.

    Attributes:
        cluster: Devices and slots.
        layers: Layers to plan.
        groups: Expert groups, see `Problem.groups`.
        max_moves: Limit of moves per layer and re-plan for the policies that can honour it; None for none.
        parameters: How hard searches try, per layer.
        forecast: How the demand to plan for follows from the window.
        split_rule: Rule to plan for and to judge the window by; None for each policy's own, judged by the best split.
        every: Steps from one plan to the next.
        first: Step of the trace that the first window begins with.
        foresight: Whether policies plan from the very step that they are judged on.
    """

    cluster: Cluster
    layers: Sequence[int]
    groups: int = 1
    max_moves: int | None = None
    parameters: SolveParameters = field(default=SolveParameters())
    forecast: Forecast = field(default=Forecast())
    split_rule: SplitRule | None = None
    every: int = 20
    first: int = 0
    foresight: bool = False


@dataclass(slots=True)
class _Scores:
    """Everything measured of one policy; one entry per layer and window."""

    fitted: list[float] = field(default_factory=list)
    even: list[float] = field(default_factory=list)
    optimal: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    layouts: dict[int, Layout] = field(default_factory=dict)


def compare(
    trace: Trace,
    policies: Sequence[str],
    setting: Setting,
    on_plan: Callable[[], None] = lambda: None,
) -> Comparison:
    """Plan each window of a trace with each policy and evaluate on the step after it.

    Every policy continues from its own previous layout, and plans for the forecast. Imbalance is largest load over mean
    load, per layer. `fitted` is that of the forecast's scenarios, averaged, and `gap_to_bound` its distance from what
    is proven, both with the split asked for, or else the best one;
    `next_step` that of the step after the window, with even and with the best split; `moved_fraction` counts the
    replicas that a re-plan copies, over all slots, the first plan left out.

    Args:
        trace: Recorded steps; a pass over them for as many layers as memory holds windows of.
        policies: Names.
        setting: What they are given.
        on_plan: Called after every plan, for progress.

    Returns:
        ``{"policies": [...]}``, ready for JSON.

    Raises:
        ProblemError: a policy does not exist or the setting does not suit the trace.
        TraceError: the trace is damaged, or shorter than a window and one step.
    """
    scores = {name: _Scores() for name in policies}
    length = setting.forecast.window_steps
    for layers in trace.passes(setting.layers, 3 * length):  # those kept, the window, and the one before
        for window in trace.windows(length, setting.every, setting.first, layers):
            for index, layer in enumerate(layers):
                after = Demand.of(window.next[index])
                coming = after if setting.foresight else forecast(window.history[:, index], setting.forecast)
                for name in policies:
                    _judge(layer, coming, after, name, setting, scores[name])
                    on_plan()
    return {"policies": [_report(name, score) for name, score in scores.items()]}


def _judge(layer: int, coming: Demand, after: Demand, name: str, setting: Setting, scores: _Scores) -> None:
    current = scores.layouts.get(layer)
    limited = current is not None and "max_moves" in find(name).honours
    problem = Problem(
        setting.cluster,
        coming,
        current=current,
        max_moves=setting.max_moves if limited else None,
        groups=setting.groups,
        split_rule=setting.split_rule,
    )
    plan = solve(problem, policy=name, parameters=setting.parameters)
    rule = setting.split_rule or SplitRule.OPTIMAL
    judged = plan if plan.split.rule is rule else evaluate(problem, plan.layout, rule)
    step = replace(problem, demand=after, current=None, max_moves=None)
    scores.fitted.append(judged.mean_imbalance)
    scores.gap.append(judged.gap)
    scores.even.append(evaluate(step, plan.layout, SplitRule.EVEN).mean_imbalance)
    scores.optimal.append(evaluate(step, plan.layout, SplitRule.OPTIMAL).mean_imbalance)
    scores.seconds.append(plan.seconds)
    if plan.moves is not None:
        scores.moved.append(len(plan.moves) / setting.cluster.total_slots)
    scores.layouts[layer] = plan.layout


def _report(name: str, scores: _Scores) -> Row:
    return {
        "policy": name,
        "fitted": summary(scores.fitted),
        "next_step": {"even": summary(scores.even), "optimal": summary(scores.optimal)},
        "gap_to_bound": {"mean": float(np.mean(scores.gap)), "max": float(np.max(scores.gap))},
        "moved_fraction": {"mean": float(np.mean(scores.moved)) if scores.moved else 0.0},
        "plan_ms_per_layer": {
            "p50": float(np.quantile(scores.seconds, 0.5) * 1e3),
            "p99": float(np.quantile(scores.seconds, 0.99) * 1e3),
        },
    }


def summary(values: Sequence[float]) -> Summary:
    """Mean, 95th percentile and maximum."""
    return {"mean": float(np.mean(values)), "p95": float(np.quantile(values, 0.95)), "max": float(np.max(values))}
