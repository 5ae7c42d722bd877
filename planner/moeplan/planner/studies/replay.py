"""Cost that a job would have had: a trace run step by step through the daemon's own planning, under the cost model.

A replay reports each step to a `PlanningJob` as the ranks would, plans what it asks for with `plan_layers` as a worker
would, and lets it decide. The layouts decided on hold from the next step on, which waits for their weights. Each step
is charged its modelled time under the layouts in force, with its own counts divided by the rule that came with each
layout, as ranks do it: compute and traffic of all layers, one after the other.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np

from moeplan.api.job_plans import Decision, JobPlan
from moeplan.api.jobs import ForecastMethod, JobSpec, Payback, Replan
from moeplan.planner.jobs.job import PlanningJob
from moeplan.planner.jobs.job_plan import move_time_s
from moeplan.planner.jobs.solve import LayersTask, plan_layers
from moeplan.planner.jobs.window import Cells, Report
from moeplan.solvers.plan.plan import Plan
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.solving.solver import evaluate

__all__ = ["Outcome", "StepCost", "Strategy", "replay", "usual_strategies"]

MOST_BYTES = 2**29
"""Memory for the window of all strategies, which share its steps."""
UNLIMITED_S = 1e9
"""A replay has time: searches end by their limit of work, so that the same trace gives the same decisions."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """When to move, under a name.

    Attributes:
        name: What to call it.
        spec: The job; its `replan` says when to look and when to take a plan.
        plans: Whether it plans at all; if not, the initial layouts stay.
    """

    name: str
    spec: JobSpec
    plans: bool = True


def usual_strategies(spec: JobSpec, *, every: int, look: int, horizon: int, caution: float) -> list[Strategy]:
    """Never, always, every so often, as DeepSeek's EPLB does, and when it pays.

    Args:
        spec: The job, without a rule of when to re-plan.
        every: Steps between plans of those that plan every so often.
        look: Steps between looks of the one that moves when it pays.
        horizon: Steps over which it counts a gain.
        caution: How many times over the gain must pay the move.
    """
    regular = Replan(every_steps=every)
    average = replace(spec.forecast, method=ForecastMethod.MEAN)  # what EPLB is given where it is in use
    pays = Replan(every_steps=look, payback=Payback(horizon, caution))
    return [
        Strategy("static", spec, plans=False),
        Strategy(f"eplb every {every}", replace(spec, policy="eplb", max_moves=None, forecast=average, replan=regular)),
        Strategy("hybrid every step", replace(spec, replan=Replan(every_steps=1))),
        Strategy(f"hybrid every {every}", replace(spec, replan=regular)),
        Strategy("hybrid when it pays", replace(spec, replan=pays)),
    ]


@dataclass(frozen=True, slots=True)
class StepCost:
    """Modelled seconds of one step, all layers together.

    Attributes:
        compute_s: Slowest device's compute.
        traffic_s: Exchange of tokens.
        moves_s: Weights sent before the step.
        imbalance: Largest load over mean load, averaged over the layers.
    """

    compute_s: float
    traffic_s: float
    moves_s: float
    imbalance: float

    @property
    def total_s(self) -> float:
        """All of them."""
        return self.compute_s + self.traffic_s + self.moves_s


@dataclass(slots=True)
class Outcome:
    """Costs and decisions of a strategy over a trace.

    Attributes:
        name: Name of the strategy.
        steps: One per step of the trace.
        decisions: Every decision to move or to stay, with its numbers.
        plans: The layouts that it began with, and every plan taken.
        moved_replicas: Replicas sent, over all steps and layers.
    """

    name: str
    steps: list[StepCost] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    plans: list[JobPlan] = field(default_factory=list)
    moved_replicas: int = 0

    @property
    def total_s(self) -> float:
        """Modelled seconds of all steps."""
        return sum(step.total_s for step in self.steps)

    @property
    def plans_taken(self) -> int:
        """Decisions to move."""
        return sum(decision.changed_layers > 0 for decision in self.decisions)


Judged = Callable[[int, int, int, Plan], None]
"""Hears, of every strategy (its index), step and layer, the layout in force with the step's own counts."""


def replay(
    steps: Iterable[Int64],
    strategies: Sequence[Strategy],
    on_step: Callable[[], None] = lambda: None,
    on_judged: Judged = lambda strategy, step, layer, judged: None,
) -> list[Outcome]:
    """Run a trace through several strategies side by side.

    Args:
        steps: int64[layers, sources, experts] of each step, in order; sources are the jobs' ranks.
        strategies: What to run; all for jobs of the trace's size.
        on_step: Called after every step of every strategy, for progress.
        on_judged: Called with what became of every layer in every step.

    Returns:
        One outcome per strategy, in order.
    """
    runs = [_Run(strategy, partial(on_judged, index)) for index, strategy in enumerate(strategies)]
    longest = max(strategy.spec.forecast.window_steps for strategy in strategies)
    for number, tokens in enumerate(_kept(steps, longest + 1)):
        for run in runs:
            run.step(number, tokens)
            on_step()
    return [run.outcome for run in runs]


def _kept(steps: Iterable[Int64], length: int) -> Iterator[Int64]:
    """The steps, which are held until `length` others have come: in a file where memory is not for so many."""
    iterator = iter(steps)
    first = next(iterator, None)
    if first is None:
        return
    if first.nbytes * length <= MOST_BYTES:
        yield first
        yield from iterator
        return
    with tempfile.TemporaryFile() as file:
        ring = np.asarray(np.memmap(file, np.int64, "w+", shape=(length, *first.shape)))
        for number, tokens in enumerate(chain([first], iterator)):
            ring[number % length] = tokens
            yield ring[number % length]


class _Run:
    def __init__(self, strategy: Strategy, on_judged: Callable[[int, int, Plan], None]) -> None:
        self.strategy = strategy
        self.job = PlanningJob.begin(strategy.spec, incarnation=1)
        self.outcome = Outcome(strategy.name, plans=[self.job.plan])
        self.on_judged = on_judged
        self.pending_moves_s = 0.0

    def step(self, number: int, tokens: Int64) -> None:
        self.outcome.steps.append(self._cost(number, tokens))
        self.pending_moves_s = 0.0
        if self.strategy.plans:
            self._plan(number, tokens)

    def _cost(self, number: int, tokens: Int64) -> StepCost:
        compute_s = traffic_s = imbalance = 0.0
        for layer, counts in zip(self.job.plan.layers, tokens, strict=True):
            problem = replace(self.strategy.spec.problem(Demand.of(counts), layer.layout), max_moves=None)
            judged = evaluate(problem, layer.layout, layer.split_rule)
            compute_s += float(judged.cost.compute_s[0])
            traffic_s += float(judged.cost.communication_s[0])
            imbalance += judged.mean_imbalance / len(tokens)
            self.on_judged(number, layer.layer, judged)
        return StepCost(compute_s, traffic_s, self.pending_moves_s, imbalance)

    def _plan(self, number: int, tokens: Int64) -> None:
        spec, job = self.strategy.spec, self.job
        cells = Cells.of(np.arange(spec.layers), np.arange(spec.ranks))
        task = job.report(Report(number, cells, tokens), now_s=float(number))
        if task is None:
            return
        candidates = plan_layers(
            LayersTask(task.layers, task.outlooks, task.policy, task.parameters, time.monotonic() + UNLIMITED_S)
        )
        before = job.plan
        plan = job.solved(task, candidates, solve_s=0.0)
        if plan is not None:
            job.commit(plan)
            self.outcome.plans.append(plan)
            for old, new in zip(before.layers, plan.layers, strict=True):
                seconds, moved = move_time_s(spec.cluster, spec.moved_bytes, old.layout, new.layout)
                self.pending_moves_s += seconds
                self.outcome.moved_replicas += moved
        self.outcome.decisions.append(job.decision)
