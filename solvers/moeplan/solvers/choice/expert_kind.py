"""Sharded or resident, or both: what a step of a layer takes with each kind of experts, and whether it fits.

All kinds compute and exchange tokens, by the cost model of layouts. Beside that, fully sharded experts gather the
replicas of their slots in every pass, whatever the load, and return their gradients; resident experts send what is
lent, which is nothing while loads are even, and only within a node. Both at once are sharded experts that lend beyond
their layout: they gather more where it did not foresee a load. Only what earns its transfer is lent. Nothing is taken
to be hidden behind compute.

A layout is judged on what it was not planned from: each half of the scenarios by the layout planned from the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moeplan.solvers.plan.cost import STEP
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec, Problem
from moeplan.solvers.solving.solver import evaluate, solve
from moeplan.solvers.spill.options import NO_CAP, SpillOptions, contiguous_home
from moeplan.solvers.spill.quota import QuotaPlanner
from moeplan.solvers.spill.spill_plan import SpillPlan

__all__ = ["ExpertKind", "KindChoice", "KindCost", "choose_kind"]

ExpertKind = Literal["resident", "sharded", "both"]

SEARCH = SolveParameters(work_limit=500)
"""Limits of the search for the layout of sharded experts."""

GATHERS, LOANS = 2, 3
"""Times that a replica's weights or gradients travel in a step: gathered and returned; lent, lent again, returned."""


@dataclass(frozen=True, slots=True)
class KindCost:
    """One kind of experts in one layer, on average over the scenarios; seconds of a step.

    Attributes:
        compute_s: Of the slowest rank.
        tokens_s: Exchanges of tokens, as if none were lent.
        weights_s: Replicas and their gradients on their way, of the busiest rank.
        memory_bytes: Weights, gradients, optimizer state, replicas and activations of the fullest rank.
        missing_bytes: By how much a rank's memory is too small; 0 where it suffices or is no limit.
        min_tokens: Fewest tokens that a replica was lent for, as they take as long as its transfer; give the planner of
            the layer the same. 1 where none is lent.
    """

    compute_s: float
    tokens_s: float
    weights_s: float
    memory_bytes: int
    missing_bytes: int
    min_tokens: int = 1

    @property
    def total_s(self) -> float:
        """All of it, one after the other."""
        return self.compute_s + self.tokens_s + self.weights_s


@dataclass(frozen=True, slots=True)
class KindChoice:
    """Which kind a layer should have.

    Attributes:
        kind: The fastest of those that fit; where they are equally fast, the first of `ExpertKind`.
        sharded: What fully sharded experts take.
        resident: What resident experts take.
        both: What fully sharded experts take that lend beyond their layout, as with ``planner=``.
        reason: Why, for people.
    """

    kind: ExpertKind
    sharded: KindCost
    resident: KindCost
    both: KindCost
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
        demand: The forecast; several scenarios say how far loads are from what a layout was planned from.
        cluster: The ranks: nodes, links, speeds and memory. Its slots are not read.
        expert: Bytes and seconds; `state_bytes` are the gradients and the optimizer state of a whole expert.
        slots: Replicas that a rank gathers where experts are sharded.
        spill_slots: Replicas that it can borrow: where experts are resident, within its node, at homes in order; where
            they are both, from all ranks.

    Raises:
        ProblemError: a value is out of range.
        InfeasibleError: no kind fits into the memory of every rank.
    """
    sharded, both = _sharded(demand, cluster, expert, slots, spill_slots)
    resident = _resident(demand, cluster, expert, spill_slots)
    costs: dict[ExpertKind, KindCost] = {"resident": resident, "sharded": sharded, "both": both}
    fitting = [kind for kind, cost in costs.items() if not cost.missing_bytes]
    if not fitting:
        least = min(cost.missing_bytes for cost in costs.values())
        raise InfeasibleError(
            "cluster.memory_bytes",
            f"{least} bytes too few",
            f"sharded experts need {sharded.memory_bytes} bytes on a rank and resident ones {resident.memory_bytes}; "
            "use more ranks, fewer slots, or less activation memory per token",
        )
    kind = min(fitting, key=lambda kind: costs[kind].total_s)
    told = sorted(costs, key=lambda other: (other != kind, costs[other].total_s))
    reason = "; ".join(f"{each}: {_in_words(costs[each])}" for each in told)
    return KindChoice(kind, sharded, resident, both, reason)


def _in_words(cost: KindCost) -> str:
    if cost.missing_bytes:
        return f"needs {cost.missing_bytes:,} bytes more"
    parts = (("compute", cost.compute_s), ("tokens", cost.tokens_s), ("weights", cost.weights_s))
    return f"{1e3 * cost.total_s:.3g} ms = " + " + ".join(f"{1e3 * seconds:.3g} {name}" for name, seconds in parts)


def _sharded(
    demand: Demand, cluster: Cluster, expert: ExpertSpec, slots: int, spill_slots: int
) -> tuple[KindCost, KindCost]:
    """Alone, and lending; every rank sends and receives parts of its replicas to and from all others."""
    on, free = _with_slots(cluster, slots), _without_memory(expert)
    anywhere = replace(cluster, node=np.zeros_like(cluster.node))
    gather_s = GATHERS * _gather_s(cluster, expert, slots)
    least = _worth(GATHERS * _gather_s(cluster, expert, 1), expert)
    alone_s = lent_s = tokens_s = loans_s = 0.0
    load = load_lent = 0
    for seen, judged, share in _halves(demand):
        layout = solve(Problem(on, seen, free), policy="hybrid", parameters=SEARCH).layout
        plan = evaluate(Problem(on, judged, free), layout)
        tokens_s += share * float(judged.weights @ plan.cost.communication_s)
        # As ranks do: each replica counts as an expert at home, with the tokens that the layout gives it.
        hosts = layout.hosts
        planner = QuotaPlanner(_options(hosts.device, anywhere, spill_slots, least), 1)
        for importance, quota in zip(share * judged.weights, plan.split.quota, strict=True):
            spilled = planner.plan(quota[hosts.device, hosts.slot][np.newaxis])
            most = int(_new_replicas(layout, spilled).max())
            at_home = quota.sum(axis=1)
            alone_s += importance * _compute_s(at_home, cluster, expert)
            lent_s += importance * _compute_s(spilled.load, cluster, expert)
            loans_s += importance * GATHERS * _gather_s(cluster, expert, most) if most else 0.0
            load, load_lent = max(load, int(at_home.max())), max(load_lent, int(spilled.load.max()))
    owned = -(-demand.experts * expert.replica_bytes // cluster.devices)
    memory = owned + 2 * slots * expert.weight_bytes + load * expert.activation_bytes
    more = owned + 2 * (slots + spill_slots) * expert.weight_bytes + load_lent * expert.activation_bytes
    return (
        KindCost(alone_s, tokens_s, gather_s, memory, _missing(cluster, memory)),
        KindCost(lent_s, tokens_s, gather_s + loans_s, more, _missing(cluster, more), least),
    )


def _resident(demand: Demand, cluster: Cluster, expert: ExpertSpec, spill_slots: int) -> KindCost:
    """Spilled as ranks do; a rank that lends or borrows sends and receives over the link within its node."""
    ranks = cluster.devices
    home = contiguous_home(demand.experts, ranks)
    loan_s = LOANS * (cluster.intra_node.latency_s + expert.weight_bytes / cluster.intra_node.bytes_per_s)
    least = _worth(loan_s, expert)
    planner = QuotaPlanner(_options(home, cluster, spill_slots, least), demand.sources)
    compute_s = weights_s = 0.0
    load = 0
    for importance, tokens in zip(demand.weights, demand.tokens, strict=True):
        plan = planner.plan(tokens)
        borrowed = np.bincount(plan.device, minlength=ranks)
        lent = np.bincount(home[plan.expert], minlength=ranks)
        compute_s += float(importance) * _compute_s(plan.load, cluster, expert)
        weights_s += float(importance) * int(np.maximum(borrowed, lent).max()) * loan_s
        load = max(load, int(plan.load.max()))
    owned = int(np.bincount(home, minlength=ranks).max())
    problem = Problem(_with_slots(cluster, owned), demand, _without_memory(expert))
    tokens_s = float(demand.weights @ evaluate(problem, _layout(home, owned)).cost.communication_s)
    memory = owned * expert.replica_bytes + 2 * spill_slots * expert.weight_bytes + load * expert.activation_bytes
    return KindCost(compute_s, tokens_s, weights_s, memory, _missing(cluster, memory), least)


def _halves(demand: Demand) -> Iterator[tuple[Demand, Demand, float]]:
    """(what a layout is planned from, what it is judged on, the weight of that); a single scenario is both."""
    counted = np.flatnonzero(demand.weights)
    if len(counted) < 2:
        yield demand, demand, 1.0
        return
    halves = np.array_split(counted, 2)
    first, second = (Demand(demand.tokens[half], demand.weights[half], demand.spread) for half in halves)
    of_first = float(demand.weights[halves[0]].sum())
    yield second, first, of_first
    yield first, second, 1 - of_first


def _options(home: Int32, cluster: Cluster, spill_slots: int, least: int) -> SpillOptions:
    """Loans of `least` tokens or more, within the nodes of the cluster."""
    return SpillOptions(
        home=home,
        spare=np.full(cluster.devices, spill_slots, np.int32),
        domain=cluster.node,
        node=cluster.node,
        speed=cluster.speed,
        token_cap=np.full(cluster.devices, NO_CAP, np.int64),
        min_tokens=least,
    )


def _new_replicas(layout: Layout, plan: SpillPlan) -> Int64:
    """int64[devices]: experts that a plan for replicas as experts lends to devices which do not hold them."""
    held = np.zeros((layout.devices, layout.experts), np.bool_)
    expert = np.repeat(np.arange(layout.experts), np.diff(layout.hosts.start))
    lent = held.copy()
    lent[plan.device, expert[plan.expert]] = True
    held[layout.hosts.device, expert] = True
    new: Int64 = (lent & ~held).sum(axis=1)
    return new


def _compute_s(load: Int64, cluster: Cluster, expert: ExpertSpec) -> float:
    """Seconds of the slowest rank with a load, int64[ranks]."""
    return STEP.compute_passes * expert.seconds_per_token * float((load / cluster.speed).max())


def _gather_s(cluster: Cluster, expert: ExpertSpec, replicas: int) -> float:
    """Seconds in which every rank gathers so many replicas, of which all ranks have equal parts."""
    peers = [int(count) for count in np.bincount(cluster.node)]
    seconds = 0.0
    for link, count in ((cluster.intra_node, max(peers) - 1), (cluster.inter_node, cluster.devices - min(peers))):
        if count:
            part = replicas * expert.weight_bytes * count / cluster.devices
            seconds += count * link.latency_s + part / link.bytes_per_s
    return seconds


def _worth(seconds: float, expert: ExpertSpec) -> int:
    """Tokens that a device of speed 1 computes in a step while a loan takes so long, which all ranks wait for."""
    return math.ceil(min(max(1, seconds / (STEP.compute_passes * expert.seconds_per_token)), NO_CAP))


def _without_memory(expert: ExpertSpec) -> ExpertSpec:
    """The same times; memory is counted here."""
    return ExpertSpec(
        weight_bytes=expert.weight_bytes, token_bytes=expert.token_bytes, seconds_per_token=expert.seconds_per_token
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
