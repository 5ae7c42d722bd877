"""Least traffic between nodes, at bounded loss of balance.

1. The plan for load alone, by `hybrid`, says what load is possible: every scenario's cap is (1 + tolerance) times that.
2. Interchangeable devices and nodes are renamed so that experts live where their tokens come from (linear assignment).
3. Local search (see `locality`) covers more experts on more nodes while every scenario fits within its cap although
   covered tokens stay at home, which is how the split `home` then divides them. After some bursts of candidates
   without anything better comes a hot one, which takes worse layouts at first.

It stops where no layout with these slots keeps more tokens at home, whatever its load (`locality.coverable`).
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from moeplan.solvers.construct.regions import narrowings
from moeplan.solvers.objective.score import levels
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.hybrid import hybrid
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.limit_kernels import limit_arrays
from moeplan.solvers.problem.moves import keep_slots, rename
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.search.keep_home import SourcedScenarios, keep_home
from moeplan.solvers.split.coverage import coverable, domains, tokens_by_domain
from moeplan.solvers.split.flow import optimal_quota

CANDIDATES_PER_BURST = 250
"""Layouts scored between two looks at the clock: some tens of milliseconds at 256 experts and ten scenarios."""
HEAT = 0.05
"""Part of the tokens that a candidate may send away more, at the start of a hot burst."""
PATIENCE = 4
"""Bursts without a better layout before a hot one."""


@policy(
    "traffic",
    source="moeplan",
    split=SplitRule.HOME,
    rules=frozenset({SplitRule.HOME}),
    honours=("max_moves", "forbidden", "pinned", "domain", "groups_on_node", "min_tokens"),
)
def traffic(problem: Problem, parameters: SolveParameters) -> Layout:
    """Fewest tokens between nodes with the load within `traffic_tolerance` of hybrid's; needs demand by source."""
    start = time.perf_counter()
    tokens = tokens_by_domain(problem.cluster, problem.demand.tokens, problem.source_device)
    half = None if parameters.deadline_s is None else parameters.deadline_s / 2
    for_load = replace(problem, split_rule=SplitRule.OPTIMAL)
    *_, last = hybrid(for_load, replace(parameters, deadline_s=half))
    balanced = last.layout
    speed = problem.cluster.speed
    level = levels(problem, optimal_quota(balanced.slots, problem.loads, speed)[0])
    caps = np.where(level > 0, level * (1 + parameters.traffic_tolerance), 1.0)
    totals = problem.loads.sum(axis=1)
    weights = np.divide(problem.demand.weights, totals, out=np.zeros(len(totals)), where=totals > 0)
    mean: Float64 = np.tensordot(weights, tokens, axes=1)
    limits = next(narrowings(problem, balanced.placed))
    slots = balanced.slots.copy()
    if problem.current is None and limits.free:
        slots = _nearer(problem, slots, mean)
    least = float(mean.sum()) - coverable(mean, int((slots >= 0).sum()))
    scenarios = SourcedScenarios(tokens, weights, caps, speed, domains(problem.cluster))
    remote, excess, stuck = np.inf, np.inf, 0
    for first in range(0, parameters.candidates, CANDIDATES_PER_BURST):
        if parameters.deadline_s is not None and time.perf_counter() - start >= parameters.deadline_s:
            break
        steps = min(CANDIDATES_PER_BURST, parameters.candidates - first)
        seed = parameters.seed * 1_000_003 + first
        before = (excess, remote)
        heat = HEAT if stuck % PATIENCE == PATIENCE - 1 else 0.0
        remote, excess = keep_home(slots, scenarios, limit_arrays(limits), steps, seed, heat)
        stuck = 0 if (excess, remote) < before else stuck + 1
        if excess == 0 and remote <= least + 1e-12:
            break
    if excess > 0:
        return balanced
    if problem.current is not None:
        keep_slots(problem.current.slots, slots)
    return Layout(slots, problem.experts)


def _nearer(problem: Problem, slots: Int32, tokens: Float64) -> Int32:
    """Rename interchangeable devices so that most tokens find their expert in their own domain."""
    wanted = tokens[domains(problem.cluster)]  # float64[devices, experts]
    padded = np.concatenate([wanted, np.zeros((len(wanted), 1))], axis=1)  # column -1 collects the empty slots
    gain: Float64 = padded[:, slots].sum(axis=2).T
    renamed: Int32 = rename(slots, gain, problem.capacity, problem.cluster)
    return renamed
