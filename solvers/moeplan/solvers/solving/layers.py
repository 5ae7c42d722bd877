"""Planning the layers of a model together, under one deadline.

Every layer's search runs in steps of a few milliseconds, and the next step goes to the layer that can gain most by it:
the one with the widest gap to its bound, counted less the longer it has not improved. So layers that are perfect after
their first construction cost nothing, and hard ones share what is left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from moeplan.solvers.objective.score import score
from moeplan.solvers.plan.cost import STEP
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.plan.plan import Plan
from moeplan.solvers.plan.termination import Termination
from moeplan.solvers.policies.registry import Policy, Progress, find
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.scalars import instance
from moeplan.solvers.solving.solver import check_asked, check_parameters, plan_of
from moeplan.solvers.split.rules import split

__all__ = ["solve_layers"]


def solve_layers(
    problems: Sequence[Problem],
    *,
    policy: str = "hybrid",
    parameters: SolveParameters = SolveParameters(),
    on_plan: Callable[[], None] = lambda: None,
    first: int = 0,
) -> list[Plan]:
    """Plan several layers; `parameters.deadline_s` is for all of them, its other limits for each.

    While the deadline is not reached the plans are those of `solve`, layer by layer.

    Args:
        problems: One per layer.
        policy: Name of a policy.
        parameters: How hard to try.
        on_plan: Called whenever a layer is done, for progress.
        first: Number of the first problem, for errors, which name ``problems[number]``.

    Raises:
        ProblemError: see `solve`.
    """
    chosen = find(policy)
    check_parameters(parameters)
    instance("problems", problems, Sequence, "a list of Problem, one per layer")
    start = time.perf_counter()
    deadline = float("inf") if parameters.deadline_s is None else start + parameters.deadline_s
    layers = []
    for i, problem in enumerate(problems, first):
        with _numbered(i):
            layers.append(_Layer(problem, check_asked(problem, chosen)))
    queue = [(-layer.hope, i) for i, layer in enumerate(layers)]
    heapq.heapify(queue)
    plans: list[Plan | None] = [None] * len(layers)
    while queue:
        _, i = heapq.heappop(queue)
        layer = layers[i]
        late = time.perf_counter() >= deadline
        with _numbered(first + i):
            if not (late and layer.last) and layer.advance(parameters, deadline):  # every layer may take a first step
                heapq.heappush(queue, (-layer.hope, i))
                continue
            plans[i] = layer.plan(parameters, late)
        on_plan()
    return [plan for plan in plans if plan is not None]


@contextmanager
def _numbered(index: int) -> Iterator[None]:
    """Errors raised inside say which problem they are of."""
    try:
        yield
    except ProblemError as error:
        raise type(error)(f"problems[{index}].{error.field}", error.value, error.reason) from None


@dataclass(slots=True)
class _Layer:
    """One layer's search."""

    problem: Problem
    policy: Policy
    search: Iterator[Progress] | None = None
    last: Progress | None = None
    value: float = float("inf")
    idle: int = 0
    seconds: float = 0.0

    def advance(self, parameters: SolveParameters, deadline: float) -> bool:
        """Take one step; whether there was one."""
        start = time.perf_counter()
        if self.search is None:  # a search knows the time from its first step
            left = None if deadline == float("inf") else max(1e-3, deadline - start)
            self.search = self.policy.search(self.problem, replace(parameters, deadline_s=left))
        progress = next(self.search, None)
        self.seconds += time.perf_counter() - start
        if progress is None:
            return False
        if self.last is None or progress.layout is not self.last.layout:
            rule = self.problem.split_rule or self.policy.split
            self.value = score(self.problem, split(self.problem, progress.layout, rule).quota)
            self.idle = 0
        else:
            self.idle += 1
        self.last = progress
        return True

    @property
    def hope(self) -> float:
        """The gain that a further step may bring."""
        if self.last is None:
            return float("inf")
        return max(0.0, self.value / max(self.last.bound, 1.0) - 1) / (1 + self.idle)

    def plan(self, parameters: SolveParameters, late: bool) -> Plan:
        """The plan of the last step; `late` where the deadline ended the search."""
        assert self.last is not None, "a policy reports at least once"
        last = replace(self.last, termination=Termination.DEADLINE) if late else self.last
        return plan_of(self.problem, self.policy, last, self.seconds, parameters, STEP)
