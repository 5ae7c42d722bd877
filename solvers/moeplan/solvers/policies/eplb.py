"""EPLB: replicate the hottest experts, pack the heaviest first (DeepSeek, github.com/deepseek-ai/EPLB).

With g expert groups that divide evenly over n nodes the plan is hierarchical: groups to nodes, then replicas inside
each node, then replicas to devices. Otherwise it is global: one node. Replicas take even shares.

Where the original puts two replicas of an expert on one device, this one takes the next lightest device without it;
wherever the original has no such pair and devices are equal, the replicas are the same.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.construct.packing import pack
from moeplan.solvers.construct.replica_counts import adams_replicas
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule


@policy("eplb", source="DeepSeek EPLB", split=SplitRule.EVEN)
def eplb(problem: Problem, parameters: SolveParameters) -> Layout:
    """Adams replicas of the mean load, packed longest first; hierarchical where expert groups divide over nodes."""
    loads = problem.mean_load
    nodes = [np.flatnonzero(problem.cluster.node == n) for n in range(problem.cluster.nodes)]
    hierarchical = problem.groups > 1 and problem.groups % len(nodes) == 0
    if not hierarchical or len(nodes) == 1:
        return Layout(_place(loads, problem.capacity, problem.cluster.speed), problem.experts)

    group_of = np.arange(problem.experts) // (problem.experts // problem.groups)
    group_load = np.bincount(group_of, loads).astype(np.float64)
    share = np.full(len(nodes), problem.groups // len(nodes), np.int32)
    groups_on = pack(group_load, np.ones(problem.groups, np.int32), share, np.ones(len(nodes)), NEVER)
    slots = np.full((problem.devices, problem.cluster.max_slots), EMPTY, np.int32)
    for node, (devices, groups) in enumerate(zip(nodes, groups_on, strict=True)):
        # Groups in the order of packing, as the original numbers a node's experts.
        members = np.concatenate([np.flatnonzero(group_of == group) for group in groups])
        capacity = np.minimum(problem.capacity[devices], len(members)).astype(np.int32)
        if capacity.sum() < len(members):
            raise ProblemError(
                f"cluster.slots of node {node}",
                int(capacity.sum()),
                f"its {len(groups)} expert groups have {len(members)} experts; add slots or set groups to 1",
            )
        placed = _place(loads[members], capacity, problem.cluster.speed[devices])
        slots[devices, : placed.shape[1]] = np.where(placed == EMPTY, EMPTY, members[placed])
    return Layout(slots, problem.experts)


def _place(loads: Float64, capacity: Int32, speed: Float64) -> Int32:
    """int32[devices, width]: replicas of `loads` on devices."""
    return pack(loads, adams_replicas(loads, int(capacity.sum()), len(capacity)), capacity, speed, NEVER)
