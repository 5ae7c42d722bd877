"""Planning the layers of a job: what a worker does with a look at the window."""

from __future__ import annotations

import time
from dataclasses import dataclass

from moeplan.planner.jobs.job_plan import Candidate
from moeplan.planner.jobs.outlook import LayerOutlook
from moeplan.solvers.plan.parameters import SolveParameters

__all__ = ["LayersTask", "plan_layers", "until"]


@dataclass(frozen=True, slots=True, eq=False)
class LayersTask:
    """Layers of a job to be planned.

    Attributes:
        layers: Index of each.
        outlooks: What to forecast and plan, one for each.
        policy: Name of the policy.
        parameters: Limits of all of them together.
        end: When they must be done (``time.monotonic``).
    """

    layers: tuple[int, ...]
    outlooks: tuple[LayerOutlook, ...]
    policy: str
    parameters: SolveParameters
    end: float


def plan_layers(task: LayersTask) -> list[Candidate]:
    """Forecast and plan each layer, and judge the layout in force on the same forecast by the same split rule.

    Raises:
        ProblemError: the policy does not exist, or a layer cannot be planned.
    """
    from moeplan.solvers import evaluate, solve_layers  # the compiler loads slowly, and the daemon only passes tasks on

    if task.outlooks[0].spec.spill_slots is not None:
        from moeplan.planner.jobs.home_candidates import home_candidate  # likewise

        return [home_candidate(layer, outlook) for layer, outlook in zip(task.layers, task.outlooks, strict=True)]
    candidates = []
    problems = [outlook.problem() for outlook in task.outlooks]
    plans = solve_layers(problems, policy=task.policy, parameters=until(task.parameters, task.end))
    for layer, problem, plan in zip(task.layers, problems, plans, strict=True):
        assert problem.current is not None
        before = evaluate(problem, problem.current, plan.split.rule)
        candidates.append(
            Candidate(
                layer=layer,
                layout=plan.layout,
                split_rule=plan.split.rule,
                cost_s=plan.cost.mean_s,
                bound=plan.bound,
                gap=plan.gap,
                imbalance=plan.mean_imbalance,
                cost_before_s=before.cost.mean_s,
                imbalance_before=before.mean_imbalance,
                seconds=plan.seconds,
            )
        )
    return candidates


def until(parameters: SolveParameters, end: float) -> SolveParameters:
    """The parameters with a deadline no later than `end` (``time.monotonic``)."""
    return parameters.within(max(end - time.monotonic(), 1e-6))
