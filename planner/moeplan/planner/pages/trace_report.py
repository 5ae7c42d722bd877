"""The document of a trace: what its steps ask for, and what each strategy would have made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moeplan.api.job_plans import Decision, Reason
from moeplan.api.jobs import Forecast, ForecastMethod, JobSpec, Payback, Replan
from moeplan.planner.files.plan_file import PlanFile
from moeplan.planner.pages.document import Seconds, StrategySteps, chunk, plan_row
from moeplan.planner.studies.replay import Outcome, Strategy, replay
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Plan
from moeplan.solvers.policies.registry import find
from moeplan.solvers.problem.arrays import Int64

__all__ = ["MOST_NUMBERS", "Rhythm", "Shown", "holding", "trace_document", "usual"]

MOST_NUMBERS = 1_200_000
"""Counts and loads of all steps shown: about 3 MB of a page. Of longer traces every second, third, ... step is."""

COST_FIELDS = ("compute", "lost", "traffic", "moves")


@dataclass(frozen=True, slots=True)
class Shown:
    """A strategy and how a page speaks of it.

    Attributes:
        strategy: What is replayed.
        label: A few words.
        about: A sentence.
        held: The plan file that it holds from the first step to the last, if it does.
    """

    strategy: Strategy
    label: str
    about: str
    held: PlanFile | None = None


@dataclass(frozen=True, slots=True)
class Rhythm:
    """When layouts are planned anew.

    Attributes:
        every: Steps from one plan to the next, and those over which a gain counts against the time to move.
        window: Steps that a plan is made from.
    """

    every: int
    window: int


def usual(spec: JobSpec, rhythm: Rhythm) -> list[Shown]:
    """Experts in order; EPLB as engines use it; ours where it pays.

    Args:
        spec: The job, whose `replan` and `forecast` are to be set.
        rhythm: When to plan.
    """
    every = rhythm.every
    ours = replace(spec, forecast=Forecast(window_steps=rhythm.window), replan=Replan(every, Payback(every)))
    about = f"Re-planned every {every} steps where the gain over {every} steps pays for moving the weights."
    return [*_beside(spec, rhythm), Shown(Strategy("hybrid", ours), "moeplan", about)]


def holding(spec: JobSpec, rhythm: Rhythm, held: PlanFile, layers: Sequence[int]) -> list[Shown]:
    """Experts in order; EPLB as engines use it; a plan that is held from the first step to the last."""
    plan = replace(spec, initial=tuple(held.layouts[layer] for layer in layers), split_rule=held.split_rule)
    about = f"The layouts of {held.path.name}, made by policy {held.policy}, from the first step to the last."
    return [*_beside(spec, rhythm), Shown(Strategy("plan", plan, plans=False), held.path.name, about, held)]


def _beside(spec: JobSpec, rhythm: Rhythm) -> list[Shown]:
    """Experts in order, and what others do, with the rule of the split that is asked for, if they can have it."""
    every = rhythm.every
    mean = Forecast(ForecastMethod.MEAN, window_steps=rhythm.window)
    policy = find("eplb")
    rule = spec.split_rule if spec.split_rule in policy.rules else None
    eplb = replace(spec, policy="eplb", split_rule=rule, max_moves=None, forecast=mean, replan=Replan(every))
    about = (
        f"DeepSeek's EPLB on the mean of {rhythm.window} steps, every {every} steps whatever moves; "
        f"{rule or policy.split} split."
    )
    return [
        Shown(Strategy("static", spec, plans=False), "static", "Experts in order, one replica each: nothing moves."),
        Shown(Strategy("eplb", eplb), "EPLB", about),
    ]


@dataclass(slots=True)
class _Kept:
    """Figures kept of one strategy while the trace goes by."""

    loads: list[Int64]
    cost: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COST_FIELDS})
    lost_s: float = 0.0


def trace_document(
    trace: Trace,
    layers: Sequence[int],
    shown: Sequence[Shown],
    *,
    cost_text: str,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, object]:
    """Replay a trace and write down what a page shows of it.

    Args:
        trace: Recorded steps.
        layers: Layers to show.
        shown: What to replay; the first is what others are compared with, the last the one that the page is about. All
            for jobs of the same cluster and expert, and of as many layers.
        cost_text: The cost model in words.
        on_step: Called after every step of every strategy, for progress.

    Returns:
        ``{"head", "chunks", "plans"}``, see `moeplan.planner.pages.document`.
    """
    spec = shown[-1].strategy.spec
    places = spec.cluster.devices * spec.cluster.max_slots
    each = len(layers) * (trace.experts + len(shown) * places)
    every = max(1, -(-trace.steps * each // MOST_NUMBERS))
    kept = [_Kept([]) for _ in shown]
    demand: list[Int64] = []

    def judged(strategy: int, step: int, layer: int, plan: Plan) -> None:
        """Keep the loads of a layer, and what it loses."""
        mine = kept[strategy]
        compute = float(plan.cost.compute_s[0])
        mine.lost_s += compute * (1 - 1 / max(plan.mean_imbalance, 1.0))
        if step % every == 0:
            if layer == 0:
                mine.loads.append(np.zeros((len(layers), spec.cluster.devices, spec.cluster.max_slots), np.int64))
            quota = plan.split.quota[0]
            mine.loads[-1][layer, :, : quota.shape[1]] = quota
        if layer == len(layers) - 1:
            mine.cost["lost"].append(mine.lost_s)
            mine.lost_s = 0.0

    def steps() -> Iterator[Int64]:
        for number, counts in enumerate(trace.read()):
            if number % every == 0:
                demand.append(counts[list(layers)].sum(axis=1))
            yield counts[list(layers)]

    outcomes = replay(steps(), [one.strategy for one in shown], on_step, judged)
    numbers = list(range(0, trace.steps, every))
    strategies = [_steps(mine, outcome, numbers, every) for mine, outcome in zip(kept, outcomes, strict=True)]
    head = {
        "kind": "trace",
        "title": trace.path.name,
        "first_step": trace.first_step,
        "all_steps": trace.steps,
        "thinned": every,
        "layers": list(layers),
        "experts": trace.experts,
        "sources": trace.sources,
        "devices": spec.cluster.devices,
        "slots": spec.cluster.max_slots,
        "nodes": spec.cluster.nodes,
        "speed": spec.cluster.speed.tolist(),
        "strategies": [{"name": one.strategy.name, "label": one.label, "about": one.about} for one in shown],
        "cost": {"weight_bytes": spec.expert.weight_bytes, "text": cost_text},
    }
    return {
        "head": head,
        "chunks": [chunk(numbers, np.stack(demand), strategies)],
        "plans": [
            row
            for index, (one, outcome) in enumerate(zip(shown, outcomes, strict=True))
            for row in (_plans(index, outcome) if one.held is None else [_held(index, one.held, layers)])
        ],
    }


def _steps(kept: _Kept, outcome: Outcome, numbers: Sequence[int], every: int) -> StrategySteps:
    kept.cost["compute"] = [step.compute_s for step in outcome.steps]
    kept.cost["traffic"] = [step.traffic_s for step in outcome.steps]
    kept.cost["moves"] = [step.moves_s for step in outcome.steps]
    sums = {name: np.add.reduceat(values, numbers).tolist() for name, values in kept.cost.items()}
    begins = [0, *(plan.decision.step + 1 for plan in outcome.plans[1:])]  # a plan holds from the step after it
    version = np.searchsorted(begins, numbers, side="right") - 1
    loads = np.stack(kept.loads)
    layouts = np.full((len(outcome.plans), *loads.shape[1:]), -1, np.int32)
    for index, plan in enumerate(outcome.plans):
        for layer in plan.layers:
            slots = layer.layout.slots
            layouts[index, layer.layer, :, : slots.shape[1]] = slots
    return StrategySteps(layouts, version.tolist(), loads, Seconds(**sums))


def _plans(index: int, outcome: Outcome) -> list[dict[str, object]]:
    by_step = {plan.decision.step: plan for plan in outcome.plans[1:]}
    return [
        plan_row(index, decision, by_step[decision.step] if decision.changed_layers else None)
        for decision in outcome.decisions
    ]


def _held(index: int, held: PlanFile, layers: Sequence[int]) -> dict[str, object]:
    """The row of a plan that was made elsewhere."""
    promises = [
        {
            "layer": number,
            "before": held.promises[layer].before,
            "predicted": held.promises[layer].imbalance,
            "gap": held.promises[layer].gap,
            "moved": 0,
        }
        for number, layer in enumerate(layers)
    ]
    row = plan_row(index, Decision(Reason.INITIAL, changed_layers=len(layers)), None)
    return {**row, "reason": "held", "layers": promises}
