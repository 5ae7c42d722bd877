"""Sharded or resident: what a step of a layer takes with either kind of experts, and whether it fits.

Both kinds compute and exchange tokens, by the cost model of layouts. Beside that, fully sharded experts gather the
replicas of their slots in every pass, whatever the load, and return their gradients; resident experts send what is
lent, which is nothing while loads are even, and only within a node. Nothing is taken to be hidden behind compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moeplan.solvers.plan.cost import STEP
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec, Problem
from moeplan.solvers.solving.solver import evaluate, solve
from moeplan.solvers.spill.options import NO_CAP, SpillOptions, contiguous_home
from moeplan.solvers.spill.quota import QuotaPlanner

__all__ = ["ExpertKind", "KindChoice", "KindCost", "choose_kind"]

ExpertKind = Literal["sharded", "resident"]

SEARCH = SolveParameters(work_limit=500)
"""Limits of the search for the layout of sharded experts."""

GATHERS, LOANS = 2, 3
"""Times that a replica's weights or gradients travel in a step: gathered and returned; lent, lent again, returned."""


@dataclass(frozen=True, slots=True)
class KindCost:
    """One kind of experts in one layer, on average over the scenarios; seconds of a step.

    Attributes:
        compute_s: Of the slowest rank.
        tokens_s: Exchanges of tokens; of resident experts as if none were lent.
        weights_s: Replicas and their gradients on their way, of the busiest rank.
        memory_bytes: Weights, gradients, optimizer state, replicas and activations of the fullest rank.
        missing_bytes: By how much a rank's memory is too small; 0 where it suffices or is no limit.
    """

    compute_s: float
    tokens_s: float
    weights_s: float
    memory_bytes: int
    missing_bytes: int

    @property
    def total_s(self) -> float:
        """All of it, one after the other."""
        return self.compute_s + self.tokens_s + self.weights_s


@dataclass(frozen=True, slots=True)
class KindChoice:
    """Which kind a layer should have.

    Attributes:
        kind: The faster of those that fit.
        sharded: What fully sharded experts take.
        resident: What resident experts take.
        reason: Why, for people.
    """

    kind: ExpertKind
    sharded: KindCost
    resident: KindCost
    reason: str


def choose_kind(
    demand: Demand,
    cluster: Cluster,
    expert: ExpertSpec,
    *,
    slots: int,
    spill_slots: int,
) -> KindChoice:
    """Decide for one layer.

    Args:
        demand: The forecast.
        cluster: The ranks: nodes, links, speeds and memory. Its slots are not read.
        expert: Bytes and seconds; `state_bytes` are the gradients and the optimizer state of a whole expert.
        slots: Replicas that a rank gathers where experts are sharded.
        spill_slots: Replicas that it can borrow within its node where they are resident, at homes in order.

    Raises:
        ProblemError: a value is out of range.
        InfeasibleError: neither kind fits into the memory of every rank.
    """
    sharded = _sharded(demand, cluster, expert, slots)
    resident = _resident(demand, cluster, expert, spill_slots)
    if sharded.missing_bytes and resident.missing_bytes:
        least = min(sharded.missing_bytes, resident.missing_bytes)
        raise InfeasibleError(
            "cluster.memory_bytes",
            f"{least} bytes too few",
            f"sharded experts need {sharded.memory_bytes} bytes on a rank and resident ones {resident.memory_bytes}; "
            "use more ranks, fewer slots, or less activation memory per token",
        )
    if sharded.missing_bytes or resident.missing_bytes:
        kind: ExpertKind = "resident" if sharded.missing_bytes else "sharded"
        other, lacking = ("sharded", sharded) if sharded.missing_bytes else ("resident", resident)
        return KindChoice(kind, sharded, resident, f"{kind}: {other} experts need {lacking.missing_bytes:,} bytes more")
    kind = "sharded" if sharded.total_s < resident.total_s else "resident"
    costs = {"sharded": sharded, "resident": resident}
    other = "resident" if kind == "sharded" else "sharded"
    reason = f"{kind}: {_milliseconds(costs[kind])}; {other}: {_milliseconds(costs[other])}"
    return KindChoice(kind, sharded, resident, reason)


def _milliseconds(cost: KindCost) -> str:
    parts = (("compute", cost.compute_s), ("tokens", cost.tokens_s), ("weights", cost.weights_s))
    return f"{1e3 * cost.total_s:.3g} ms = " + " + ".join(f"{1e3 * seconds:.3g} {name}" for name, seconds in parts)


def _sharded(demand: Demand, cluster: Cluster, expert: ExpertSpec, slots: int) -> KindCost:
    """The layout is planned from the demand; every rank sends and receives parts of all its slots to and from all."""
    ranks = cluster.devices
    free = ExpertSpec(
        weight_bytes=expert.weight_bytes, token_bytes=expert.token_bytes, seconds_per_token=expert.seconds_per_token
    )
    problem = Problem(_with_slots(cluster, slots), demand, free)
    plan = solve(problem, policy="hybrid", parameters=SEARCH)
    peers = [int(count) for count in np.bincount(cluster.node)]
    within = max(peers) - 1
    seconds = 0.0
    for link, count in ((cluster.intra_node, within), (cluster.inter_node, ranks - min(peers))):
        if count:
            seconds += count * link.latency_s + slots * expert.weight_bytes * count / ranks / link.bytes_per_s
    owned = -(-demand.experts * expert.replica_bytes // ranks)
    load = int(plan.split.device_loads().max())
    memory = owned + 2 * slots * expert.weight_bytes + load * expert.activation_bytes
    compute = float(demand.weights @ plan.cost.compute_s)
    tokens = float(demand.weights @ plan.cost.communication_s)
    return KindCost(compute, tokens, GATHERS * seconds, memory, _missing(cluster, memory))


def _resident(demand: Demand, cluster: Cluster, expert: ExpertSpec, spill_slots: int) -> KindCost:
    """Spilled as ranks do; a rank that lends or borrows sends and receives over the link within its node."""
    ranks = cluster.devices
    options = SpillOptions(
        home=contiguous_home(demand.experts, ranks),
        spare=np.full(ranks, spill_slots, np.int32),
        domain=cluster.node,
        node=cluster.node,
        speed=cluster.speed,
        token_cap=np.full(ranks, NO_CAP, np.int64),
    )
    planner = QuotaPlanner(options, demand.sources)
    compute = weights = 0.0
    load = 0
    for importance, tokens in zip(demand.weights, demand.tokens, strict=True):
        plan = planner.plan(tokens)
        borrowed = np.bincount(plan.device, minlength=ranks)
        lent = np.bincount(options.home[plan.expert], minlength=ranks)
        busiest = int(np.maximum(borrowed, lent).max())
        link = cluster.intra_node
        compute += float(importance) * plan.makespan
        weights += float(importance) * busiest * (link.latency_s + expert.weight_bytes / link.bytes_per_s)
        load = max(load, int(plan.load.max()))
    owned = int(np.bincount(options.home, minlength=ranks).max())
    free = ExpertSpec(token_bytes=expert.token_bytes, seconds_per_token=expert.seconds_per_token)
    at_home = evaluate(Problem(_with_slots(cluster, owned), demand, free), _layout(options.home, owned))
    memory = owned * expert.replica_bytes + 2 * spill_slots * expert.weight_bytes + load * expert.activation_bytes
    return KindCost(
        STEP.compute_passes * expert.seconds_per_token * compute,
        float(demand.weights @ at_home.cost.communication_s),
        LOANS * weights,
        memory,
        _missing(cluster, memory),
    )


def _layout(home: Int32, width: int) -> Layout:
    """One replica of each expert, at home; homes are in order."""
    slots = np.full((int(home.max()) + 1, width), -1, np.int32)
    place = np.arange(len(home)) - np.searchsorted(home, home)
    slots[home, place] = np.arange(len(home))
    return Layout(slots, len(home))


def _with_slots(cluster: Cluster, slots: int) -> Cluster:
    """The same ranks with so many slots each; memory is counted here."""
    return replace(cluster, slots=np.full(cluster.devices, slots, np.int32), memory_bytes=None)


def _missing(cluster: Cluster, needed: int) -> int:
    return 0 if cluster.memory_bytes is None else max(0, needed - int(cluster.memory_bytes.min()))
