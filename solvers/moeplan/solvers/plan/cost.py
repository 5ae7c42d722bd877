"""Seconds that a layer takes under a layout and a split: the slowest device's compute, plus communication.

Communication follows the alpha-beta model per link class: a device that exchanges n bytes with p peers over a class
takes ``p * latency_s + n / bytes_per_s``; its classes add up, and sending and receiving overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from moeplan.solvers.objective.score import levels
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.split.rules import Split, fabric_of, quota_of_replicas
from moeplan.solvers.split.sources import add_up, device_tokens

__all__ = ["LAER", "STEP", "Cost", "CostModel", "Over", "between_nodes", "check_memory", "cost", "memory_use"]


class Over(StrEnum):
    """The way in which communication times of devices combine."""

    MAX = "max"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class CostModel:
    """The work of one layer in a step.

    Attributes:
        compute_passes: Forward times of the experts: 3 for forward and backward, 4 with full recomputation.
        exchanges: All-to-all exchanges of tokens: dispatch and combine, forward and backward.
        over: How devices' communication times combine: the slowest device, or all added up.
    """

    compute_passes: float = 3.0
    exchanges: float = 4.0
    over: Over = Over.MAX


STEP = CostModel()
"""A training step that waits for its slowest device, in compute and in communication."""

LAER = CostModel(compute_passes=3.0, exchanges=4.0, over=Over.SUM)
"""LAER-MoE's objective, 4 * sum_i comm_i + 3 * max_i comp_i (greedy_balancer.cpp of the artefact)."""


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """Modelled time of one layer.

    Attributes:
        compute_s: float64[scenarios], seconds of the slowest device.
        communication_s: float64[scenarios], seconds of token exchange; 0 where ``expert.token_bytes`` is 0.
        mean_s: Both together, averaged over scenarios by their weights.
    """

    compute_s: Float64
    communication_s: Float64
    mean_s: float


def cost(problem: Problem, layout: Layout, split: Split, model: CostModel = STEP) -> Cost:
    """Model the time of a layer.

    Raises:
        ProblemError: tokens have bytes but the demand does not tell sources apart.
    """
    compute = model.compute_passes * problem.expert.seconds_per_token * levels(problem, split.quota)
    if problem.expert.token_bytes and problem.devices > 1:
        communication = model.exchanges * _communication(problem, layout, split, model.over)
    else:
        communication = np.zeros_like(compute)
    return Cost(compute, communication, float(problem.demand.weights @ (compute + communication)))


def _communication(problem: Problem, layout: Layout, split: Split, over: Over) -> Float64:
    """float64[scenarios]: seconds of one exchange."""
    cluster, token_bytes = problem.cluster, problem.expert.token_bytes
    links = cluster.intra_node, cluster.inter_node
    seconds = np.array([token_bytes / link.bytes_per_s for link in links])
    latency = np.array([link.latency_s for link in links])
    per_device = _exchange(traffic(problem, layout, split), cluster.node, seconds, latency)
    combined: Float64 = per_device.max(axis=1) if over is Over.MAX else per_device.sum(axis=1)
    return combined


@kernel
def _exchange(between: Int64, node: Int32, seconds: Float64, latency: Float64) -> Float64:
    """float64[scenarios, devices]: seconds that each device sends or receives, whichever takes longer.

    Args:
        between: int64[scenarios, devices, devices], as of `traffic`.
        node: int32[devices].
        seconds: float64[2], seconds of a token on a link within a node and between nodes.
        latency: float64[2], seconds of a message there.
    """
    scenarios, devices, _ = between.shape
    times = np.zeros((scenarios, devices))
    tokens, peers = np.empty((2, 2, devices), np.int64), np.empty((2, 2, devices), np.int64)
    for s in range(scenarios):
        tokens[:] = 0
        peers[:] = 0
        for i in range(devices):
            for j in range(devices):
                sent = between[s, i, j]
                if sent and i != j:
                    link = int(node[i] != node[j])
                    for way, d in ((0, i), (1, j)):
                        tokens[way, link, d] += sent
                        peers[way, link, d] += 1
        for way in range(2):
            for d in range(devices):
                time = 0.0
                for link in range(2):
                    time += tokens[way, link, d] * seconds[link] + latency[link] * peers[way, link, d]
                times[s, d] = max(times[s, d], time)
    return times


def traffic(problem: Problem, layout: Layout, split: Split) -> Int64:
    """int64[scenarios, devices, devices]: tokens from each device to each, those that stay included.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    source, hosts = problem.source_device, layout.hosts
    if split.routes is None:
        sources, quota = fabric_of(problem).sources, quota_of_replicas(layout, split)
        return device_tokens(sources, problem.demand.tokens, quota, hosts.start, hosts.device, source)
    between = np.zeros((len(split.routes), problem.devices, problem.devices), np.int64)
    for sent, added in zip(split.routes, between, strict=True):
        add_up(sent.T, source, hosts.device, added)
    return between


def between_nodes(problem: Problem, layout: Layout, split: Split) -> Float64:
    """float64[scenarios]: part of the tokens that another node computes than the one they come from.

    Where the split leaves it open which source sends to which replica, as few as its quotas allow.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    node, hosts = problem.cluster.node, layout.hosts
    source = node[problem.source_device]
    asked = np.zeros((problem.demand.scenarios, problem.cluster.nodes, problem.experts), np.int64)
    for i, home in enumerate(source):
        asked[:, home] += problem.demand.tokens[:, i]
    if split.routes is None:
        expert = np.repeat(np.arange(problem.experts), layout.replicas)
        given = np.zeros_like(asked)
        for replica, (device, slot) in enumerate(zip(hosts.device, hosts.slot, strict=True)):
            given[:, node[device], expert[replica]] += split.quota[:, device, slot]
        stay = np.minimum(asked, given).sum(axis=(1, 2))
    else:
        stay = (split.routes * (source[:, None] == node[hosts.device])).sum(axis=(1, 2))
    total = problem.loads.sum(axis=1)
    return 1.0 - np.divide(stay, total, out=np.ones(len(total)), where=total > 0)


def memory_use(problem: Problem, layout: Layout, split: Split) -> Int64:
    """int64[devices]: bytes of weights, state and activations at the largest planned load of any scenario."""
    expert = problem.expert
    replicas = layout.placed.sum(axis=1, dtype=np.int64)
    tokens = split.device_loads().max(axis=0)
    use: Int64 = replicas * (expert.weight_bytes + expert.state_bytes) + tokens * expert.activation_bytes
    return use


def check_memory(problem: Problem, layout: Layout, split: Split) -> None:
    """Refuse a plan that does not fit.

    Raises:
        InfeasibleError: a device needs more memory than it has; names the one that is shortest.
    """
    memory = problem.cluster.memory_bytes
    if memory is None:
        return
    short = memory_use(problem, layout, split) - memory
    device = int(short.argmax())
    if short[device] > 0:
        raise InfeasibleError(
            f"cluster.memory_bytes[{device}]",
            int(memory[device]),
            f"this plan needs {short[device]} bytes more there; "
            "use fewer slots, more devices, or less activation memory per token",
        )
