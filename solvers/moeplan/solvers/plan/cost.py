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
from moeplan.solvers.split.rules import Split, routes

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
    cluster = problem.cluster
    between = traffic(problem, layout, split)
    same_node = cluster.node[:, None] == cluster.node
    times = np.zeros((2, len(between), cluster.devices))
    for link, on_link in (
        (cluster.intra_node, same_node & ~np.eye(cluster.devices, dtype=np.bool_)),
        (cluster.inter_node, ~same_node),
    ):
        tokens = np.where(on_link, between, 0)
        for axis in (1, 2):  # receiving, sending
            seconds = tokens.sum(axis=axis) * (problem.expert.token_bytes / link.bytes_per_s)
            times[axis - 1] += seconds + link.latency_s * (tokens > 0).sum(axis=axis)
    per_device = times.max(axis=0)
    combined: Float64 = per_device.max(axis=1) if over is Over.MAX else per_device.sum(axis=1)
    return combined


def traffic(problem: Problem, layout: Layout, split: Split) -> Int64:
    """int64[scenarios, devices, devices]: tokens from each device to each, those that stay included.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    sent = routes(problem, layout, split)
    between = np.zeros((len(sent), problem.devices, problem.devices), np.int64)
    _add_up(sent, problem.source_device, layout.hosts.device, between)
    return between


@kernel
def _add_up(sent: Int64, source_device: Int32, device: Int32, between: Int64) -> None:
    """Add int64[scenarios, sources, replicas] to int64[scenarios, devices, devices], by the devices of both."""
    scenarios, sources, replicas = sent.shape
    for s in range(scenarios):
        for i in range(sources):
            for j in range(replicas):
                between[s, source_device[i], device[j]] += sent[s, i, j]


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
