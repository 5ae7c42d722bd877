"""History of a job for the live page: its last steps, kept in memory, and its decisions."""

from __future__ import annotations

import pickle
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplan.api.job_plans import Decision, JobPlan
from moeplan.api.jobs import JobSpec
from moeplan.planner.daemon.workers.frames import Kind
from moeplan.planner.daemon.workers.pool import Workers
from moeplan.planner.jobs.job import PlanningJob
from moeplan.planner.jobs.job_plan import initial_plan
from moeplan.planner.jobs.loads import LoadsTask
from moeplan.planner.pages.document import Seconds, StrategySteps, chunk, plan_row
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.problem import ExpertSpec
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["MOST_STEPS", "JobHistory"]

MOST_STEPS = 240
"""Steps of a job that are kept."""

MOST_BYTES = 64 * 1024**2
"""Memory for the steps of all jobs together; each has its part, and older steps go."""

MOST_DECISIONS = 200
PASSES = 3
"""Forward times of a step: forward and backward, as in the cost model."""

JUDGE_S = 30.0


@dataclass(slots=True)
class _Step:
    number: int
    demand: Int64
    plan: JobPlan
    loads: Int64 | None = None


@dataclass(slots=True)
class JobHistory:
    """The last steps and decisions of one job since this daemon owns it."""

    spec: JobSpec
    incarnation: int
    steps: deque[_Step] = field(default_factory=deque)
    rows: deque[dict[str, object]] = field(default_factory=lambda: deque(maxlen=MOST_DECISIONS))
    version: int = 0
    _decision: Decision | None = None

    def collect(self, job: PlanningJob, jobs: int) -> None:
        """Take over what has closed and been decided since the last time.

        Args:
            job: The job.
            jobs: Number of jobs that share the memory.
        """
        last = self.steps[-1].number if self.steps else None
        for number, demand in job.demand_after(last):
            self.steps.append(_Step(number, demand, job.in_force))
        each = self.spec.layers * (self.spec.experts + 2 * self.spec.cluster.devices * self.spec.cluster.max_slots) * 8
        allowed = max(1, min(MOST_STEPS, MOST_BYTES // (each * max(jobs, 1))))
        while len(self.steps) > allowed:
            self.steps.popleft()
        if job.decision is not self._decision:
            self._decision = job.decision
            taken = job.plan if job.plan.decision is job.decision else None
            self.rows.append(plan_row(1, job.decision, taken))
            self.version += 1

    @property
    def _costs_known(self) -> bool:
        """True if the job says what a token costs: the default, a second, stands for any unit."""
        return self.spec.expert.seconds_per_token != ExpertSpec().seconds_per_token

    @property
    def rule(self) -> SplitRule:
        """The rule that loads are shown by."""
        return SplitRule.EVEN if self.spec.split_rule is SplitRule.EVEN else SplitRule.OPTIMAL

    def head(self, name: str) -> dict[str, object]:
        """The head of the job's document."""
        spec = self.spec
        notes = [f"Loads are what the {self.rule} split makes of each step's counts."]
        if not self._costs_known:
            notes.append("The job says no expert's cost, so time lost is a share, without seconds.")
        return {
            "kind": "job",
            "title": name,
            "incarnation": self.incarnation,
            "layers": list(range(spec.layers)),
            "experts": spec.experts,
            "sources": spec.sources,
            "devices": spec.cluster.devices,
            "slots": spec.cluster.max_slots,
            "nodes": spec.cluster.nodes,
            "speed": spec.cluster.speed.tolist(),
            "strategies": [
                {"name": "initial", "label": "first layouts", "about": "The layouts that the job began with."},
                {"name": "in force", "label": "layouts in force", "about": "Those that ranks report as applied."},
            ],
            "cost": {"weight_bytes": spec.expert.weight_bytes, "text": "the job's own cost of a token"},
            "most_steps": MOST_STEPS,
            "notes": notes,
        }

    async def chunk_after(self, number: int, most: int, workers: Workers) -> dict[str, object] | None:
        """The next steps after `number`, at most `most`; None where there are none.

        Raises:
            RefusalError: no worker has had time.
            ProblemError: the layouts do not suit the steps.
        """
        wanted = [step for step in self.steps if step.number > number][:most]
        if not wanted:
            return None
        first = initial_plan(self.spec, 1, self.incarnation)
        missing = [step for step in wanted if step.loads is None]
        if missing:
            layouts = (
                tuple(_layouts(first) for _ in missing),
                tuple(_layouts(step.plan) for step in missing),
            )
            task = LoadsTask(self.spec.cluster, np.stack([step.demand for step in missing]), layouts, self.rule)
            answer = await workers.run(Kind.LOADS, pickle.dumps(task, 5), limit_s=JUDGE_S, label="evaluate")
            for step, loads in zip(missing, pickle.loads(answer).swapaxes(0, 1), strict=True):
                step.loads = loads
        loads = np.stack([step.loads for step in wanted if step.loads is not None])
        plans = {id(step.plan): step.plan for step in wanted}
        index = {key: position for position, key in enumerate(plans)}
        return chunk(
            [step.number for step in wanted],
            np.stack([step.demand for step in wanted]),
            [
                StrategySteps(self._slots([first]), [0] * len(wanted), loads[:, 0], self._seconds(loads[:, 0])),
                StrategySteps(
                    self._slots(list(plans.values())),
                    [index[id(step.plan)] for step in wanted],
                    loads[:, 1],
                    self._seconds(loads[:, 1]),
                ),
            ],
        )

    def _slots(self, plans: list[JobPlan]) -> Any:
        cluster = self.spec.cluster
        found = np.full((len(plans), self.spec.layers, cluster.devices, cluster.max_slots), -1, np.int32)
        for row, plan in zip(found, plans, strict=True):
            for layer in plan.layers:
                slots = layer.layout.slots
                row[layer.layer, :, : slots.shape[1]] = slots
        return found

    def _seconds(self, loads: Int64) -> Seconds | None:
        """Time of the experts; what is sent is not known here."""
        if not self._costs_known:
            return None
        cost = PASSES * self.spec.expert.seconds_per_token
        speed = self.spec.cluster.speed
        devices = loads.sum(axis=3)
        most, mean = (devices / speed).max(axis=2), devices.sum(axis=2) / speed.sum()
        none = [0.0] * len(loads)
        return Seconds((cost * most).sum(axis=1).tolist(), (cost * (most - mean)).sum(axis=1).tolist(), none, none)


def _layouts(plan: JobPlan) -> Any:
    return tuple(layer.layout for layer in plan.layers)
