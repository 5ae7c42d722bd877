"""Layouts as linear assignment: replicas to slots, with balance, locality and moves in one cost matrix.

BASE layers (arXiv 2103.16716) assign tokens to experts in equal numbers; this assigns replicas to devices in equal
numbers. Replica counts are Adams'. Replicas come in rounds, one for every device that has a slot left, and each round
is an exact assignment of the heaviest replicas that wait to those devices. Its costs are tokens:

    balance    share * (load + share / 2) / (speed * mean), what the replica adds to the sum of squared loads
    locality   share * LOCALITY * the part of the expert's tokens that comes from elsewhere, by the links they take
    moves      share * MOVE where the device does not hold the expert now
    order      -share: heavy replicas come first, unless a lighter one saves more of the above

A token from a node that already has a replica of the expert is served there and no longer counts.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.construct.fill import fill
from moeplan.solvers.construct.repair import repair
from moeplan.solvers.construct.replica_counts import adams_replicas
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.arrays import Bool, Float64, Int64
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.linear_assignment import linear_assignment
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule

LOCALITY = 0.1
"""Cost of sending a token over the slowest link, beside that of computing it on a device of average load."""
MOVE = 0.05
"""Cost of loading a replica, per token that it will compute."""

CHOICE = 3
"""Replicas considered in a round, per device that takes one."""
FORBIDDEN = 1e15
"""A second replica of an expert on one device, or a pair that is not allowed."""


@policy(
    "base",
    source="BASE layers, arXiv 2103.16716",
    split=SplitRule.OPTIMAL,
    honours=("forbidden", "pinned", "min_tokens"),
)
def base(problem: Problem, parameters: SolveParameters) -> Layout:
    """Replicas to devices in rounds of linear assignment: balance, locality and few moves in one cost matrix."""
    loads, capacity, speed = problem.mean_load, problem.capacity, problem.cluster.speed
    limits = problem.limits
    replicas = np.minimum(adams_replicas(loads, int(capacity.sum()), problem.devices), limits.most)
    share = loads / replicas
    mean = max(float(loads.sum() / speed.sum()), 1e-300)
    waiting = np.repeat(np.arange(problem.experts), replicas)
    waiting = waiting[np.argsort(-share[waiting], kind="stable")]
    slots = np.full((problem.devices, max(1, problem.cluster.max_slots)), EMPTY, np.int32)
    used = np.zeros(problem.devices, np.int64)
    load = np.zeros(problem.devices)
    held = None if problem.current is None else problem.current.placed
    on = np.zeros((problem.devices, problem.experts), np.bool_)
    origin = _origin(problem)
    while len(waiting):
        room = np.flatnonzero(used < capacity)
        experts = waiting[: CHOICE * len(room)]
        heavy = share[experts]
        # The tiny constant spreads experts without any load as well.
        cost = (heavy + 1e-9 * mean) * (load[room, None] + heavy / 2) / (speed[room, None] * mean)
        if origin is not None:
            cost += LOCALITY * heavy * _remote(problem, origin, on, experts)[room]
        if held is not None:
            cost += MOVE * heavy * ~held[np.ix_(room, experts)]
        cost += FORBIDDEN * (on | ~limits.may)[np.ix_(room, experts)]
        rows, columns = linear_assignment(cost - heavy)
        waiting = np.delete(waiting, columns)
        for row, column in zip(rows, columns, strict=True):
            device, expert = room[row], experts[column]
            if not on[device, expert] and limits.may[device, expert]:
                slots[device, used[device]] = expert
                used[device] += 1
                load[device] += share[expert]
                on[device, expert] = True
    if limits.free:
        fill(slots, loads, capacity, NEVER)
        return Layout(slots, problem.experts)
    valid = repair(problem, limits, slots, stay=False)
    return Layout(slots if valid is None else valid, problem.experts)  # None only under limits it does not honour


def _origin(problem: Problem) -> Float64 | None:
    """float64[devices, experts]: tokens that come from each device; None where origins are not known."""
    if problem.demand.sources == 1:
        return None
    tokens = np.tensordot(problem.demand.weights, problem.demand.tokens, axes=1)
    origin = np.zeros((problem.devices, problem.experts))
    np.add.at(origin, problem.source_device, tokens)
    return origin


def _remote(problem: Problem, origin: Float64, on: Bool, experts: Int64) -> Float64:
    """float64[devices, len(experts)]: part of an expert's tokens that a replica on a device draws from afar."""
    cluster = problem.cluster
    member = (np.arange(cluster.nodes)[:, None] == cluster.node).astype(np.float64)
    here = origin[:, experts]
    of_node = member @ here
    unserved = np.where(member @ on[:, experts] > 0, 0.0, of_node)
    near = unserved[cluster.node]
    far = unserved.sum(axis=0) - near
    # A token within the node counts by how much faster its link is; with one node that link is the slowest there is.
    inner = 1.0 if cluster.nodes == 1 else min(1.0, cluster.inter_node.bytes_per_s / cluster.intra_node.bytes_per_s)
    own = np.where(near > 0, here, 0.0)
    return (far + inner * (near - own)) / np.maximum(of_node.sum(axis=0), 1.0)
