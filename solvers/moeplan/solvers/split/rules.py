"""The rules that divide an expert's tokens among its replicas: `even`, `lite`, `optimal`, `home` and `local`.

A rule decides each replica's integer quota. `lite` also decides which source sends how many tokens to which replica;
for the others `sources` derives it, nearest replica first, which moves the fewest tokens for given quotas. Plans are
costed by these functions, and ranks execute them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.clock import NEVER, time_now
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec, Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.coverage import WHOLE, covered_split, domains, tokens_by, tokens_by_domain
from moeplan.solvers.split.memory import quota_in_memory
from moeplan.solvers.split.sources import Sources, sort_sources, source_tokens

__all__ = [
    "RULES",
    "Fabric",
    "Split",
    "divide",
    "divide_evenly",
    "fabric_of",
    "quota_of_replicas",
    "route",
    "routes",
    "split",
]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The tokens of each scenario, divided.

    Attributes:
        rule: The rule that made it.
        quota: int64[scenarios, devices, width], tokens that each slot of the layout computes.
        routes: int64[scenarios, sources, replicas], tokens from each source to each replica in the order of
            ``layout.hosts``; None where the rule leaves it open.
    """

    rule: SplitRule
    quota: Int64
    routes: Int64 | None = None

    def device_loads(self) -> Int64:
        """int64[scenarios, devices]: tokens that each device computes."""
        loads: Int64 = self.quota.sum(axis=2)
        return loads


@dataclass(frozen=True, eq=False)
class Fabric:
    """Where tokens come from, and where they are computed.

    Attributes:
        cluster: Devices, their speeds, nodes and memory.
        source_device: int32[sources], device of each source; None where the demand does not tell sources apart.
        expert: What replicas and tokens occupy, where memory limits a split.
    """

    cluster: Cluster
    source_device: Int32 | None
    expert: ExpertSpec = field(default=ExpertSpec())

    @cached_property
    def sources(self) -> Sources:
        """The sources by where they are.

        Raises:
            ProblemError: the demand does not tell sources apart.
        """
        return sort_sources(self.known_sources, self.cluster.node)

    @property
    def known_sources(self) -> Int32:
        """`source_device`.

        Raises:
            ProblemError: the demand does not tell sources apart.
        """
        if self.source_device is None:
            raise ProblemError(
                "demand.sources", 1, "traffic needs the demand of each source; give tokens[sources, experts]"
            )
        return self.source_device


def fabric_of(problem: Problem) -> Fabric:
    """The fabric of a problem."""
    known = problem.demand.sources > 1 or problem.devices == 1
    return Fabric(problem.cluster, problem.source_device if known else None, problem.expert)


def even(fabric: Fabric, layout: Layout, tokens: Int64) -> Split:
    """Every replica of an expert computes the same share, to within one token (EPLB's assumption)."""
    quota = np.zeros((len(tokens), *layout.slots.shape), np.int64)
    hosts = layout.hosts
    divide_evenly(tokens.sum(axis=1), hosts.start, hosts.device, hosts.slot, quota)
    return Split(SplitRule.EVEN, quota)


@kernel
def divide_evenly(loads: Int64, start: Int32, device: Int32, slot: Int32, quota: Int64) -> None:
    """Fill ``quota[scenarios, devices, width]`` for ``loads[scenarios, experts]``; `start` and so on as in `Hosts`."""
    for s in range(len(loads)):
        for e in range(len(start) - 1):
            n = start[e + 1] - start[e]
            each, extra = divmod(loads[s, e], n)
            for i in range(n):
                j = start[e] + i
                # Start the odd tokens at another replica for each expert, so that they do not pile up on one device.
                quota[s, device[j], slot[j]] = each + ((i - e) % n < extra)


def optimal(fabric: Fabric, layout: Layout, tokens: Int64) -> Split:
    """The split of least largest load per speed that fits into memory, exact to the token; see `flow` and `memory`."""
    quota, _, _ = quota_in_memory(fabric.cluster, fabric.expert, layout.slots, tokens.sum(axis=1))
    return Split(SplitRule.OPTIMAL, quota)


def lite(fabric: Fabric, layout: Layout, tokens: Int64) -> Split:
    """Evenly over the replicas on the source's own node, or over all replicas if it has none (LAER-MoE lite routing).

    Where the demand does not tell sources apart no node is anyone's own, and the split is even.
    """
    if fabric.source_device is None:
        return Split(SplitRule.LITE, even(fabric, layout, tokens).quota)
    hosts = layout.hosts
    sent = np.zeros((*tokens.shape[:2], len(hosts.device)), np.int64)
    quota = np.zeros((len(tokens), *layout.slots.shape), np.int64)
    quota[:, hosts.device, hosts.slot] = _lite(
        tokens, hosts.start, hosts.device, fabric.cluster.node, fabric.source_device, sent
    )
    return Split(SplitRule.LITE, quota, sent)


@kernel
def _lite(tokens: Int64, start: Int32, device: Int32, node: Int32, source_device: Int32, sent: Int64) -> Int64:
    """Fill ``sent[scenarios, sources, replicas]``, zeros at first; int64[scenarios, replicas], what each gets."""
    first, near = _by_node(start, device, node)
    every, source_node = np.arange(len(device)), node[source_device]
    quota = np.zeros((len(tokens), len(device)), np.int64)
    for s in range(len(tokens)):
        _lite_of(tokens[s], start, every, first, near, source_node, sent[s], quota[s])
    return quota


@inner_kernel
def _lite_of(
    tokens: Int64, start: Int32, every: Int64, first: Int64, near: Int64, source_node: Int32, sent: Int64, quota: Int64
) -> None:
    """`_lite` of one scenario; replicas by expert are `every`, by node and expert `near`."""
    sources, experts = tokens.shape
    for i in range(sources):
        for e in range(experts):
            asked, pair = tokens[i, e], source_node[i] * experts + e
            if asked == 0:
                continue
            order, begin, end = every, start[e], start[e + 1]
            if end - begin > 1 and first[pair] < first[pair + 1]:
                order, begin, end = near, first[pair], first[pair + 1]
            n = end - begin
            if n == 1:
                sent[i, order[begin]] = asked
                quota[order[begin]] += asked
                continue
            # Of whole numbers up to 2^53 these quotients are exact, and quicker than those of integers.
            each = int(asked / n)
            extra = asked - each * n
            turn = e + i - int((e + i) / n) * n
            turn = n - turn if turn else 0  # the odd tokens start at another replica for each
            for k in range(begin, end):
                share = each + (turn < extra)
                sent[i, order[k]] = share
                quota[order[k]] += share
                turn = turn + 1 if turn + 1 < n else 0


@kernel
def _by_node(start: Int32, device: Int32, node: Int32) -> tuple[Int64, Int64]:
    """Replicas by node and expert: those of a node's expert are ``order[first[pair]:first[pair + 1]]``.

    Args:
        start: int32[experts + 1], see `Hosts`.
        device: int32[replicas], see `Hosts`.
        node: int32[devices].

    Returns:
        int64[nodes * experts + 1], by ``node * experts + expert``, and int64[replicas].
    """
    experts = len(start) - 1
    first = np.zeros((node.max() + 1) * experts + 1, np.int64)
    order = np.empty(len(device), np.int64)
    for e in range(experts):
        for j in range(start[e], start[e + 1]):
            first[node[device[j]] * experts + e + 1] += 1
    first[:] = np.cumsum(first)
    filled = first.copy()
    for e in range(experts):
        for j in range(start[e], start[e + 1]):
            pair = node[device[j]] * experts + e
            order[filled[pair]] = j
            filled[pair] += 1
    return first, order


LOCAL_TOLERANCE = 0.01
"""Fraction by which `local` and `home` let the largest load exceed the optimum."""


FLOW_S = 5e-6
"""Seconds that a flow takes for each of its arcs."""


def local(
    fabric: Fabric, layout: Layout, tokens: Int64, tolerance: float = LOCAL_TOLERANCE, *, end: float = NEVER
) -> Split:
    """The least traffic with every load per speed within (1 + `tolerance`) of the optimum: a min-cost flow.

    A token costs nothing on its own device, and the time of its bytes on the link class that it takes otherwise, where
    a link within a node counts as no slower than one between nodes. Which source sends to which replica is left open:
    for the quotas of that flow, nearest first is the least traffic.

    Args:
        fabric: Where tokens come from, and where they are computed.
        layout: The layout.
        tokens: int64[scenarios, sources, experts].
        tolerance: See above.
        end: Time on the clock of kernels after which no flow is begun: what scenarios are left are divided as `home`
            does, as late, which keeps the load as near to the optimum and sends more.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    speed = fabric.cluster.speed
    balanced = optimal(fabric, layout, tokens)
    best = (balanced.device_loads() / speed).max(axis=1, keepdims=True)
    caps = np.floor(best * (1 + tolerance) * speed * (1 + 1e-12)).astype(np.int64)
    network = _network(fabric, layout)
    quota = np.zeros((len(tokens), *layout.slots.shape), np.int64)
    took = FLOW_S * len(network.tail)
    for s, (asked, cap) in enumerate(zip(tokens, caps, strict=True)):
        start = time_now()
        if start + took > end:
            quota[s:] = _at_home(fabric, layout, tokens[s:], balanced.quota[s:], tolerance, end)
            break
        quota[s, layout.hosts.device, layout.hosts.slot] = _least_traffic(fabric, layout, network, asked, cap)
        took = max(took if s else 0.0, time_now() - start)
    return Split(SplitRule.LOCAL, quota)


def home(
    fabric: Fabric, layout: Layout, tokens: Int64, tolerance: float = LOCAL_TOLERANCE, *, end: float = NEVER
) -> Split:
    """Tokens stay on a node that holds their expert; the rest is divided for the least largest load.

    No split of the layout sends less between nodes. Where the load would exceed the optimum by more than `tolerance`,
    only so large a part of every expert's tokens stays that it does not, found by bisection. That ends at `end`, a time
    on the clock of kernels, with the largest part found by then; where there is none, with the optimal split.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    balanced = optimal(fabric, layout, tokens).quota
    return Split(SplitRule.HOME, _at_home(fabric, layout, tokens, balanced, tolerance, end))


def _at_home(fabric: Fabric, layout: Layout, tokens: Int64, balanced: Int64, tolerance: float, end: float) -> Int64:
    """int64[scenarios, devices, width]: the quotas of `home`, where those of `optimal` are `balanced`."""
    if time_now() >= end:
        return balanced
    cluster = fabric.cluster
    speed, domain = cluster.speed, domains(cluster)
    by_domain = tokens_by_domain(cluster, tokens, fabric.known_sources)
    quota = balanced.copy()
    whole, done = covered_split(layout.slots, by_domain, speed, domain, np.full(len(tokens), WHOLE), end)
    quota[:done] = whole[:done]
    best = (balanced.sum(axis=2) / speed).max(axis=1)
    # Whole tokens: what the tolerance allows is rounded up.
    most = np.ceil(best * (1 + tolerance) * speed.max()) / speed.max()
    over = np.flatnonzero((quota.sum(axis=2) / speed).max(axis=1) > most)
    quota[over] = balanced[over]
    low, high = np.zeros(len(over), np.int64), np.full(len(over), WHOLE)
    while (high - low > 1).any() and time_now() < end:  # by powers of two, so in all of these scenarios as often
        middle = (low + high) // 2
        trial, done = covered_split(layout.slots, by_domain[over], speed, domain, middle, end)
        fits = (np.arange(len(over)) < done) & ((trial.sum(axis=2) / speed).max(axis=1) <= most[over])
        quota[over[fits]] = trial[fits]
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    leaving = over[low == 0]
    if len(leaving):
        none = np.zeros(len(leaving), np.int64)
        nearest, done = covered_split(layout.slots, by_domain[leaving], speed, domain, none, end)
        quota[leaving[:done]] = nearest[:done]
    return quota


COST_SCALE = 1_000
"""Integer cost of a token on the slowest link; other links in proportion."""


class _Network(NamedTuple):
    """The flow of a layout. Only experts with several replicas leave a choice, so only these are in it.

    Tokens of one expert and node that do not come from one of its hosts are alike, and so are all of an expert's that
    come from nodes without a replica. So its nodes are the devices and a sink; each replica, with the tokens that its
    own device has; each covered pair of node and expert, with the others of that node; and each expert, with the rest.
    A token goes from its own to its device or on to its pair, from there to a replica of the node, or on to the expert,
    and from there to any replica.

    Attributes:
        replica: int64[choices], index of each replica in the order of `Layout.hosts`.
        expert: int64[choices], its expert.
        device: int64[choices], its device.
        pair: int64[choices], index of its pair.
        pair_node: int64[pairs], the node of each.
        pair_expert: int64[pairs], its expert.
        tail: int64[arcs], where each arc begins: three of each replica, one of each pair, expert, replica, and device.
        head: int64[arcs], where it ends.
        price: int64[arcs], cost of a token on it.
    """

    replica: Int64
    expert: Int64
    device: Int64
    pair: Int64
    pair_node: Int64
    pair_expert: Int64
    tail: Int64
    head: Int64
    price: Int64


def _network(fabric: Fabric, layout: Layout) -> _Network:
    cluster, hosts = fabric.cluster, layout.hosts
    experts, devices = layout.experts, cluster.devices
    expert_of = np.repeat(np.arange(experts), layout.replicas)
    replica = np.flatnonzero(layout.replicas[expert_of] > 1)
    expert, device = expert_of[replica], hosts.device[replica].astype(np.int64)
    pairs, pair = np.unique(cluster.node[device] * experts + expert, return_inverse=True)
    pair_node, pair_expert = np.divmod(pairs, experts)
    seconds = np.array([1 / cluster.intra_node.bytes_per_s, 1 / cluster.inter_node.bytes_per_s])
    far = round(COST_SCALE * seconds[1] / max(seconds.max(), 1e-300))
    near = min(far, round(COST_SCALE * seconds[0] / max(seconds.max(), 1e-300)))
    sink = devices
    own = sink + 1 + np.arange(len(replica))
    of_pair = sink + 1 + len(replica) + np.arange(len(pairs))
    of_expert = sink + 1 + len(replica) + len(pairs) + np.arange(experts)
    arcs = [
        (own, device, 0),
        (of_pair[pair], device, near),
        (of_expert[expert], device, 0),
        (own, of_pair[pair], 0),
        (of_pair, of_expert[pair_expert], far),
        (np.arange(devices), np.full(devices, sink), 0),
    ]
    tail, head = (np.concatenate([arc[i] for arc in arcs]) for i in (0, 1))
    price = np.repeat([price for _, _, price in arcs], [len(begin) for begin, _, _ in arcs])
    return _Network(replica, expert, device, pair, pair_node, pair_expert, tail, head, price)


def _least_traffic(fabric: Fabric, layout: Layout, network: _Network, tokens: Int64, cap: Int64) -> Int64:
    """int64[replicas] as in `Layout.hosts`: quotas of a scenario's ``tokens[sources, experts]`` in ``cap[devices]``."""
    from ortools.graph.python import min_cost_flow  # ranks, which never use this rule, may lack it

    cluster, hosts = fabric.cluster, layout.hosts
    (by_device,) = tokens_by(tokens[np.newaxis], fabric.known_sources, cluster.devices)
    (by_node,) = tokens_by(tokens[np.newaxis], cluster.node[fabric.known_sources], cluster.nodes)
    total = tokens.sum(axis=0)
    quota: Int64 = np.repeat(total, layout.replicas)
    quota[network.replica] = 0
    whole = np.zeros(cluster.devices, np.int64)
    np.add.at(whole, hosts.device, quota)

    own = by_device[network.device, network.expert]
    of_pair = by_node[network.pair_node, network.pair_expert]
    others, rest = of_pair.copy(), total.copy()
    np.add.at(others, network.pair, -own)
    np.add.at(rest, network.pair_expert, -of_pair)
    rest[layout.replicas == 1] = 0
    supply = np.concatenate([np.zeros(cluster.devices + 1, np.int64), own, others, rest])
    supply[cluster.devices] = -supply.sum()
    most = np.concatenate([own, of_pair[network.pair], total[network.expert], own, of_pair, cap - whole])
    flow = min_cost_flow.SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(network.tail, network.head, most, network.price)
    flow.set_nodes_supplies(np.arange(len(supply)), supply)
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise RuntimeError(f"min-cost flow ended with {status}; the optimal split is a feasible flow")
    choices = len(network.replica)
    quota[network.replica] = flow.flows(arcs[: 3 * choices]).reshape(3, choices).sum(axis=0)
    return quota


RULES: dict[SplitRule, Callable[[Fabric, Layout, Int64], Split]] = {
    SplitRule.EVEN: even,
    SplitRule.LITE: lite,
    SplitRule.OPTIMAL: optimal,
    SplitRule.HOME: home,
    SplitRule.LOCAL: local,
}
"""Each takes tokens, int64[scenarios, sources, experts]."""


def divide(fabric: Fabric, layout: Layout, tokens: Int64, rule: SplitRule) -> Split:
    """Divide tokens, int64[scenarios, sources, experts], by a rule.

    Raises:
        ProblemError: the rule needs the demand by source.
    """
    return RULES[rule](fabric, layout, tokens)


def split(problem: Problem, layout: Layout, rule: SplitRule, end: float = NEVER) -> Split:
    """Divide the tokens of each scenario of a problem by a rule.

    Args:
        problem: The problem.
        layout: The layout.
        rule: The rule.
        end: Time on the clock of kernels that `local` and `home`, which may take long, keep; see there.

    Raises:
        ProblemError: the rule needs the demand by source.
    """
    fabric, tokens = fabric_of(problem), problem.demand.tokens
    if rule is SplitRule.LOCAL:
        return local(fabric, layout, tokens, end=end)
    if rule is SplitRule.HOME:
        return home(fabric, layout, tokens, end=end)
    return divide(fabric, layout, tokens, rule)


def route(fabric: Fabric, layout: Layout, tokens: Int64, split: Split) -> Int64:
    """int64[scenarios, sources, replicas]: tokens from each source to each replica, in the order of ``layout.hosts``.

    Where the split leaves it open, each source's tokens go to the nearest replica with quota left.

    Args:
        fabric: Where sources and devices are.
        layout: The layout.
        tokens: int64[scenarios, sources, experts].
        split: Their split.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    if split.routes is not None:
        return split.routes
    hosts, quota = layout.hosts, quota_of_replicas(layout, split)
    return source_tokens(fabric.sources, tokens, quota, hosts.start, hosts.device).swapaxes(1, 2)


def quota_of_replicas(layout: Layout, split: Split) -> Int64:
    """int64[scenarios, replicas]: tokens that each replica computes, in the order of ``layout.hosts``."""
    hosts = layout.hosts
    return np.ascontiguousarray(split.quota[:, hosts.device, hosts.slot])


def routes(problem: Problem, layout: Layout, split: Split) -> Int64:
    """`route` of a problem's demand."""
    return route(fabric_of(problem), layout, problem.demand.tokens, split)
