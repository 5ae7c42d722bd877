"""Steps whose routes are known, made of a trace: what planning them leaves, beside layouts and spilling that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple, TypedDict

import numpy as np

from moeplan.planner.traces.trace import Trace, TraceError
from moeplan.solvers import (
    Cluster,
    Demand,
    KnownRoutes,
    Layout,
    Problem,
    QuotaPlanner,
    SpillOptions,
    SplitRule,
    evaluate,
    plan_known,
    solve,
)
from moeplan.solvers.problem.arrays import Int32, Int64

__all__ = ["KnownRow", "KnownStudy", "KnownVariant", "study_known"]


@dataclass(frozen=True, slots=True)
class KnownVariant:
    """What of a step may be planned.

    Attributes:
        name: What reports call it.
        max_moves: Most experts of a layer whose home one step may change; None for no limit.
        reordered: Whether samples may change places.
    """

    name: str
    max_moves: int | None
    reordered: bool


class KnownRow(TypedDict):
    """Outcome of one way to run the steps; `moved` is per layer and step."""

    variant: str
    imbalance: float
    p95: float
    moved: float | None
    replicas: float
    seconds: float | None


class KnownStudy(TypedDict):
    """The answer of `study_known`."""

    steps: int
    micro_batches: int
    rows: list[KnownRow]


class _Step(NamedTuple):
    """Figures of one step: the last three are means over layers, or layers and micro-batches."""

    imbalance: float
    moved: float
    replicas: float
    seconds: float


def study_known(
    trace: Trace,
    options: SpillOptions,
    variants: Sequence[KnownVariant],
    micro_batches: int,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> KnownStudy:
    """Cut a trace into steps of `micro_batches` recorded ones each, and run them in every way.

    A recorded step is a micro-batch, and what a rank routed in it a sample; the last steps that do not fill a step of
    their own are left out. Static experts stay where `options` has them. EPLB is given the loads of the very step, and
    as many slots as homes and spare slots are together; its split is even, as in its own system, or the best one.
    Variants of `plan_known` follow the trace, each with homes of its own.

    Args:
        trace: Recorded steps.
        options: Homes of the start, spare slots, domains and limits; experts and spare slots the same on every device.
        variants: What to plan.
        micro_batches: Micro-batches of a step.
        on_step: Called after every step, for progress.

    Returns:
        Imbalance is the time of the slowest devices over that of balanced ones, each summed over layers and
        micro-batches of a step; mean over steps, and 95th percentile. `moved` is the share of experts that changed
        their home, or of slots that got another expert, from the second step on; `replicas` are transient ones of a
        layer and micro-batch; `seconds` is what planning a step takes.

    Raises:
        ProblemError: the trace does not suit the options.
        TraceError: the trace is shorter than a step.
    """
    slots = trace.experts // options.devices + int(options.spare[0])
    cluster = Cluster.uniform(options.devices, slots)
    home: dict[str, Int32 | None] = {variant.name: None for variant in variants}
    layouts: list[Layout | None] = [None] * trace.layers
    found: dict[str, list[_Step]] = {}
    steps = 0
    for routes in _steps(trace, micro_batches):
        order = np.arange(routes.samples)
        loads = routes.loads(order)
        idle = replace(options, spare=np.zeros_like(options.spare))
        found.setdefault("static", []).append(_spilled(loads, idle))
        even, best, layouts = _eplb(loads, cluster, layouts)
        found.setdefault("EPLB, loads of the step, even split", []).append(even)
        found.setdefault("EPLB, loads of the step, best split", []).append(best)
        found.setdefault("spilling alone", []).append(_spilled(loads, options))
        for variant in variants:
            begin = perf_counter()
            plan = plan_known(
                routes,
                options,
                home=home[variant.name],
                max_moves=variant.max_moves,
                reordered=variant.reordered,
            )
            seconds = perf_counter() - begin
            home[variant.name] = plan.home
            spilled = _spilled(routes.loads(plan.order), options, plan.home)
            moved = float(plan.moved.sum() / plan.home.size)
            found.setdefault(variant.name, []).append(spilled._replace(moved=moved, seconds=seconds))
        steps += 1
        on_step()
    if not steps:
        raise TraceError(trace.path, f"has {trace.steps} steps; a step of {micro_batches} micro-batches needs as many")
    return {
        "steps": steps,
        "micro_batches": micro_batches,
        "rows": [_row(name, figures, {variant.name for variant in variants}) for name, figures in found.items()],
    }


def _steps(trace: Trace, micro_batches: int) -> Iterator[KnownRoutes]:
    recorded: list[Int64] = []
    for counts in trace.read():
        recorded.append(counts)
        if len(recorded) == micro_batches:
            samples = np.concatenate([step.swapaxes(0, 1) for step in recorded])
            every = np.arange(trace.sources)
            yield KnownRoutes(
                samples,
                np.repeat(np.arange(micro_batches), trace.sources),
                np.tile(every, micro_batches),
                trace.sources,
            )
            recorded.clear()


def _spilled(loads: Int64, options: SpillOptions, home: Int32 | None = None) -> _Step:
    """What spilling leaves of int64[micro_batches, layers, experts], with int32[layers, experts] homes."""
    time, balanced, replicas = 0.0, 0.0, 0
    for layer in range(loads.shape[1]):
        held = options if home is None else replace(options, home=home[layer])
        for plan in QuotaPlanner(held, 1, layers=len(loads)).plan_layers(loads[:, layer, np.newaxis]):
            time += plan.makespan
            balanced += plan.balanced
            replicas += plan.replicas
    return _Step(time / balanced, 0.0, replicas / (loads.shape[0] * loads.shape[1]), 0.0)


def _eplb(loads: Int64, cluster: Cluster, layouts: Sequence[Layout | None]) -> tuple[_Step, _Step, list[Layout | None]]:
    """EPLB for the sum of a step, judged on its micro-batches by an even split and by the best."""
    new: list[Layout | None] = []
    time, balanced, moved = np.zeros(2), 0.0, []
    for layer, before in enumerate(layouts):
        tokens = loads[:, layer]
        problem = Problem(cluster, Demand.of(tokens.sum(axis=0)), current=before)
        plan = solve(problem, policy="eplb")
        new.append(plan.layout)
        total = float(tokens.sum())
        judged = replace(problem, demand=Demand.of(tokens[:, np.newaxis], tokens.sum(axis=1)), current=None)
        for i, rule in enumerate((SplitRule.EVEN, SplitRule.OPTIMAL)):
            time[i] += total * evaluate(judged, plan.layout, rule).mean_imbalance
        balanced += total
        if plan.moves is not None:
            moved.append(len(plan.moves) / cluster.total_slots)
    even, best = (_Step(float(t) / balanced, float(np.mean(moved)) if moved else 0.0, 0.0, 0.0) for t in time)
    return even, best, new


def _row(name: str, figures: Sequence[_Step], planned: set[str]) -> KnownRow:
    imbalance = [step.imbalance for step in figures]
    moves = [step.moved for step in figures[1:]]
    fixed = name in ("static", "spilling alone") or not moves
    return {
        "variant": name,
        "imbalance": float(np.mean(imbalance)),
        "p95": float(np.quantile(imbalance, 0.95)),
        "moved": None if fixed else float(np.mean(moves)),
        "replicas": float(np.mean([step.replicas for step in figures])),
        "seconds": float(np.mean([step.seconds for step in figures])) if name in planned else None,
    }
