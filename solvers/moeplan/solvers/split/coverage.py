"""Splits that keep tokens on their own node.

An expert is **covered** on a node that holds a replica of it: the tokens that this node's sources route to it need not
leave. Where covered tokens do stay, the rest of the split is a plain one (see `flow`) of finer items: the covered
tokens of an expert and a node may go to its replicas there, the uncovered tokens of an expert to all its replicas. So
every slot gets two positions, and pouring and augmenting paths work unchanged:

    2 * slot      item ``experts * (1 + node) + expert``, covered tokens
    2 * slot + 1  item ``expert``, uncovered tokens

(`covered_split`, whose layout stays, numbers only the covered items that there are.)

Where a cluster has one node, its devices take the part of nodes.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64, read_only
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.split.flow import augment, host_table, waterfill

__all__ = ["WHOLE", "coverable", "covered_split", "demand_of", "domains", "items_of", "tokens_by", "tokens_by_domain"]


def domains(cluster: Cluster) -> Int32:
    """int32[devices]: what each device's tokens should not leave: its node, or itself where there is one node."""
    return cluster.node if cluster.nodes > 1 else read_only(np.arange(cluster.devices, dtype=np.int32))


def tokens_by_domain(cluster: Cluster, tokens: Int64, source_device: Int32) -> Int64:
    """int64[scenarios, domains, experts]: tokens by the domain that they come from.

    Args:
        cluster: Devices and nodes.
        tokens: int64[scenarios, sources, experts].
        source_device: int32[sources], device of each source.
    """
    domain = domains(cluster)
    return tokens_by(tokens, domain[source_device], int(domain.max()) + 1)


@kernel
def tokens_by(tokens: Int64, place: Int32, places: int) -> Int64:
    """int64[scenarios, places, experts]: int64[scenarios, sources, experts] by the place, int32[sources], of each."""
    summed = np.zeros((tokens.shape[0], places, tokens.shape[2]), np.int64)
    for s in range(tokens.shape[0]):
        for i in range(tokens.shape[1]):
            for e in range(tokens.shape[2]):
                summed[s, place[i], e] += tokens[s, i, e]
    return summed


@kernel
def items_of(
    e: int, replicas: Int32, replica_count: int, node: Int32, width: int, host: Int32, count: Int32, flat: Int32
) -> None:
    """Rebuild the hosts of all items of expert `e` from its replicas' positions in the layout."""
    experts = replicas.shape[0]
    count[e] = 0
    for n in range(count.shape[0] // experts - 1):
        count[experts * (1 + n) + e] = 0
    for i in range(replica_count):
        position = replicas[e, i]
        home = experts * (1 + node[position // width]) + e
        host[home, count[home]] = 2 * position
        count[home] += 1
        host[e, count[e]] = 2 * position + 1
        count[e] += 1
        flat[2 * position] = home
        flat[2 * position + 1] = e


@kernel
def demand_of(e: int, tokens: Int64, count: Int32, demand: Int64) -> int:
    """Divide the tokens of expert `e` into items, and return how many are covered.

    `tokens` is int64[nodes, experts], `count` int32[items] and `demand` int64[items], overwritten for the expert.
    """
    nodes, experts = tokens.shape
    covered = 0
    total = 0
    for n in range(nodes):
        item = experts * (1 + n) + e
        total += tokens[n, e]
        demand[item] = tokens[n, e] if count[item] else 0
        covered += demand[item]
    demand[e] = total - covered
    return covered


WHOLE = 64
"""Covered tokens stay in parts of this."""


@kernel
def covered_split(
    slots: Int32, tokens: Int64, speed: Float64, node: Int32, stay: Int64, end: float
) -> tuple[Int64, int]:
    """The split of least largest load per speed in which covered tokens stay on their node, or a part of them does.

    Args:
        slots: int32[devices, width], a valid layout.
        tokens: int64[scenarios, nodes, experts], tokens by the node that they come from.
        speed: float64[devices].
        node: int32[devices].
        stay: int64[scenarios], how many of `WHOLE` parts of its covered tokens stay; at 0 the split is the optimal one.
        end: Time on the clock of kernels after which no further scenario is divided.

    Returns:
        int64[scenarios, devices, width], tokens that each slot computes, and the number of scenarios that are divided:
        the first ones.
    """
    devices, width = slots.shape
    scenarios, nodes, experts = tokens.shape
    layout = slots.copy().reshape(-1)
    item, pairs = _covered_items(layout, width, node, experts, nodes)
    flat = np.full(2 * len(layout), -1, np.int32)
    for position in range(len(layout)):
        if layout[position] >= 0:
            flat[2 * position] = item[position]
            flat[2 * position + 1] = layout[position]
    items = experts + len(pairs)
    most = np.zeros(items, np.int32)
    for position in range(len(flat)):
        if flat[position] >= 0:
            most[flat[position]] += 1
    host, count = host_table(flat, items, most.max())
    demand = np.empty(items, np.int64)
    quota = np.empty(2 * len(layout), np.int64)
    load = np.empty(devices, np.int64)
    tight = np.empty(devices, np.bool_)
    order = np.empty(devices, np.int32)
    parent, seen = np.empty((3, devices), np.int32), np.zeros(items + 1, np.int64)
    split = np.empty((scenarios, devices, width), np.int64)
    for s in range(scenarios):
        if time_now() >= end:
            return split, s
        demand[:experts] = 0
        for n in range(nodes):
            for e in range(experts):
                demand[e] += tokens[s, n, e]
        for i in range(len(pairs)):
            n, e = divmod(pairs[i], experts)
            demand[experts + i] = tokens[s, n, e] * stay[s] // WHOLE
            demand[e] -= demand[experts + i]
        waterfill(demand, host, count, 2 * width, speed, quota, load, order)
        augment(flat, host, count, 2 * width, speed, quota, load, parent, seen, tight)
        split[s] = (quota[::2] + quota[1::2]).reshape(devices, width)
    return split, scenarios


@kernel
def _covered_items(layout: Int32, width: int, node: Int32, experts: int, nodes: int) -> tuple[Int32, Int64]:
    """Number the items of covered tokens that there are, from `experts` on, by node and expert.

    A split is made of them many times, and most pairs of node and expert are not covered.

    Returns:
        int32[positions], the item of each slot's covered tokens, and int64[pairs], ``node * experts + expert`` of each.
    """
    number = np.full(nodes * experts, -1, np.int32)
    for position in range(len(layout)):
        if layout[position] >= 0:
            number[node[position // width] * experts + layout[position]] = 0
    pairs = np.flatnonzero(number == 0)
    for i in range(len(pairs)):
        number[pairs[i]] = experts + i
    item = np.full(len(layout), -1, np.int32)
    for position in range(len(layout)):
        if layout[position] >= 0:
            item[position] = number[node[position // width] * experts + layout[position]]
    return item, pairs


def coverable(tokens: Float64, slots: int) -> float:
    """The most tokens that any layout can keep on their node, whatever its loads.

    Every expert is covered on at least one node; each further replica covers at most one more pair of node and expert.

    Args:
        tokens: float64[nodes, experts], tokens by the node that they come from.
        slots: Replicas in all, at least one per expert.
    """
    ranked = np.sort(tokens, axis=0)
    further = np.sort(ranked[:-1], axis=None)[::-1]
    return float(ranked[-1].sum() + further[: slots - tokens.shape[1]].sum())
