"""LAER-MoE: two sets of replica counts, placed node by node, judged by modelled time (arXiv 2602.11686).

1. Replica counts: the same for every expert; and a priority queue that starts with one replica per node and keeps
   giving one per node to the expert with the largest load per replica.
2. Placement: heaviest share first, onto the nodes that hold the fewest replicas of the expert, there onto the device
   with the least load.
3. Keep the candidate with the least ``4 * sum_i comm_i + 3 * max_i comp_i`` under lite routing.

The artefact assumes nodes of 8 devices and loops for ever below that; here nodes are those of the cluster. It also puts
replicas of an expert twice on one device, which here never happens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.solvers.plan.cost import LAER, cost
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.policies.registry import policy
from moeplan.solvers.problem.arrays import Float64, Int32
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.rules import split


@policy("laer", source="LAER-MoE, arXiv 2602.11686", split=SplitRule.LITE)
def laer(problem: Problem, parameters: SolveParameters) -> Layout:
    """Even and priority-queue replica counts, spread over nodes, the better by LAER's cost under lite routing."""
    history = replace(problem, demand=Demand.of(problem.demand.tokens.sum(axis=0)))
    rule = problem.split_rule or SplitRule.LITE
    candidates = []
    for replicas in _replica_counts(history):
        slots = _place(history.mean_load, replicas, problem.capacity, problem.cluster.node, problem.cluster.nodes)
        layout = Layout(slots, problem.experts)
        candidates.append((cost(history, layout, split(history, layout, rule), LAER).mean_s, layout))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _replica_counts(problem: Problem) -> list[Int32]:
    slots, experts, nodes = int(problem.capacity.sum()), problem.experts, problem.cluster.nodes
    counts = [_queue(problem.mean_load, slots, nodes, problem.devices)]
    if slots % experts == 0:
        counts.append(np.full(experts, slots // experts, np.int32))
    return counts


@kernel
def _queue(loads: Float64, slots: int, nodes: int, most: int) -> Int32:
    """Replica counts by priority queue, in steps of one per node where that fits."""
    experts = len(loads)
    step = nodes if experts * nodes <= slots else 1
    replicas = np.full(experts, step, np.int32)
    left = slots - experts * step
    while left > 0:
        best = -1
        for e in range(experts):
            if replicas[e] < most and (best < 0 or loads[e] * replicas[best] > loads[best] * replicas[e]):
                best = e
        if best < 0:
            break
        grant = min(step, left, most - replicas[best])
        replicas[best] += grant
        left -= grant
    return replicas


@kernel
def _place(loads: Float64, replicas: Int32, capacity: Int32, node: Int32, nodes: int) -> Int32:
    devices, experts = len(capacity), len(loads)
    slots = np.full((devices, max(1, capacity.max())), -1, np.int32)
    used = np.zeros(devices, np.int32)
    load = np.zeros(devices)
    on = np.zeros((devices, experts), np.bool_)
    on_node = np.zeros((nodes, experts), np.int32)
    for e in np.argsort(-loads / replicas, kind="mergesort"):
        share = loads[e] / replicas[e]
        for _ in range(replicas[e]):
            best = -1
            for d in range(devices):
                if used[d] == capacity[d] or on[d, e]:
                    continue
                if best < 0:
                    best = d
                    continue
                here, there = on_node[node[d], e], on_node[node[best], e]
                if here < there or (here == there and load[d] < load[best]):
                    best = d
            if best < 0:  # every device with room holds it already
                break
            slots[best, used[best]] = e
            used[best] += 1
            on[best, e] = True
            on_node[node[best], e] += 1
            load[best] += share
    return slots
