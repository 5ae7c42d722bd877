"""How an expert's tokens are divided among its replicas: the rules `even`, `lite`, `optimal`, `local` and `home`.

A rule decides each replica's integer quota. Rules that look at the origin of tokens (`lite`, `local`) also decide which
source sends how many tokens to which replica; for the others `routes` derives it, nearest replica first, which is
optimal for given quotas because distances are nested: same device, same node, other node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import Hosts, Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.split.coverage import covered_split, domains, tokens_by_domain
from moeplan.solvers.split.memory import best_quota

__all__ = ["RULES", "Split", "even", "home", "lite", "local", "optimal", "routes", "split"]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """How the tokens of each scenario are divided.

    Attributes:
        rule: Name of the rule that made it.
        quota: int64[scenarios, devices, width], tokens that each slot of the layout computes.
        routes: int64[scenarios, sources, replicas], tokens from each source to each replica in the order of
            ``layout.hosts``; None where the rule leaves it open.
    """

    rule: str
    quota: Int64
    routes: Int64 | None = None

    def device_loads(self) -> Int64:
        """int64[scenarios, devices]: tokens that each device computes."""
        loads: Int64 = self.quota.sum(axis=2)
        return loads


def even(problem: Problem, layout: Layout) -> Split:
    """Every replica of an expert computes the same share, to within one token (EPLB's assumption)."""
    quota = np.zeros((problem.demand.scenarios, *layout.slots.shape), np.int64)
    hosts = layout.hosts
    _even(problem.loads, hosts.start, hosts.device, hosts.slot, quota)
    return Split("even", quota)


@kernel
def _even(loads: Int64, start: Int32, device: Int32, slot: Int32, quota: Int64) -> None:
    for s in range(len(loads)):
        for e in range(len(start) - 1):
            n = start[e + 1] - start[e]
            each, extra = divmod(loads[s, e], n)
            for i in range(n):
                j = start[e] + i
                # Start the odd tokens at another replica for each expert, so that they do not pile up on one device.
                quota[s, device[j], slot[j]] = each + ((i - e) % n < extra)


def optimal(problem: Problem, layout: Layout) -> Split:
    """The split of least largest load per speed that fits into memory, exact to the token; see `flow` and `room`."""
    quota, _, _ = best_quota(problem, layout.slots)
    return Split("optimal", quota)


def lite(problem: Problem, layout: Layout) -> Split:
    """Evenly over the replicas on the source's own node, or over all replicas if it has none (LAER-MoE lite routing).

    Where the demand does not tell sources apart no node is anyone's own, and the split is even.
    """
    if problem.demand.sources == 1 and problem.devices > 1:
        return Split("lite", even(problem, layout).quota)
    tokens, hosts = problem.demand.tokens, layout.hosts
    sent = np.zeros((*tokens.shape[:2], len(hosts.device)), np.int64)
    _lite(tokens, hosts.start, hosts.device, problem.cluster.node, problem.source_device, sent)
    return _from_routes("lite", layout, sent)


@kernel
def _lite(tokens: Int64, start: Int32, device: Int32, node: Int32, source_device: Int32, sent: Int64) -> None:
    for s in range(tokens.shape[0]):
        for i in range(tokens.shape[1]):
            home = node[source_device[i]]
            for e in range(tokens.shape[2]):
                near = 0
                for j in range(start[e], start[e + 1]):
                    near += node[device[j]] == home
                n = near if near else start[e + 1] - start[e]
                each, extra = divmod(tokens[s, i, e], n)
                rank = 0
                for j in range(start[e], start[e + 1]):
                    if near == 0 or node[device[j]] == home:
                        sent[s, i, j] = each + ((rank - e - i) % n < extra)
                        rank += 1


LOCAL_TOLERANCE = 0.01
"""How much larger than the optimum `local` lets the largest load become, as a fraction."""


def local(problem: Problem, layout: Layout, tolerance: float = LOCAL_TOLERANCE) -> Split:
    """The least traffic with every load per speed within (1 + `tolerance`) of the optimum: a min-cost flow.

    A token costs nothing on its own device, and the time of its bytes on the link class that it takes otherwise.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    best = optimal(problem, layout).device_loads() / problem.cluster.speed
    caps = np.floor(best.max(axis=1, keepdims=True) * (1 + tolerance) * problem.cluster.speed * (1 + 1e-12))
    sent = np.stack(
        [
            _least_traffic(problem, layout.hosts, tokens, cap.astype(np.int64))
            for tokens, cap in zip(problem.demand.tokens, caps, strict=True)
        ]
    )
    return _from_routes("local", layout, sent)


def home(problem: Problem, layout: Layout) -> Split:
    """Tokens stay on a node that holds their expert; the rest is divided for the least largest load.

    No split of the layout sends less between nodes. It takes microseconds, as no flow of costs is solved. Only where
    the load would exceed the optimum by more than `LOCAL_TOLERANCE` does `local` decide, for all scenarios.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    speed = problem.cluster.speed
    quota = covered_split(layout.slots, tokens_by_domain(problem), speed, domains(problem))
    level = (quota.sum(axis=2) / speed).max(axis=1)
    best = (optimal(problem, layout).device_loads() / speed).max(axis=1)
    # Whole tokens: what the tolerance allows is rounded up.
    if (level > np.ceil(best * (1 + LOCAL_TOLERANCE) * speed.max()) / speed.max()).any():
        return replace(local(problem, layout), rule="home")
    return Split("home", quota)


COST_SCALE = 1_000
"""Integer cost of a token on the slowest link; other links in proportion."""


def _least_traffic(problem: Problem, hosts: Hosts, tokens: Int64, cap: Int64) -> Int64:
    """int64[sources, replicas] for one scenario's ``tokens[sources, experts]`` and ``cap[devices]``."""
    from ortools.graph.python import min_cost_flow  # ranks, which never use this rule, may lack it

    cluster, source_device = problem.cluster, problem.source_device
    sources = len(tokens)
    expert = np.repeat(np.arange(problem.experts), np.diff(hosts.start))
    seconds = np.array([0.0, 1 / cluster.intra_node.bytes_per_s, 1 / cluster.inter_node.bytes_per_s])
    price = np.round(seconds / max(seconds.max(), 1e-300) * COST_SCALE).astype(np.int64)
    near = cluster.node[source_device][:, None] == cluster.node[hosts.device]
    same = source_device[:, None] == hosts.device
    cost = np.where(same, price[0], np.where(near, price[1], price[2]))
    # Nodes: one per (source, expert) with tokens, one per replica's device, and a sink.
    source, replica = np.nonzero(tokens[:, expert])
    flow = min_cost_flow.SimpleMinCostFlow()
    supply = source * problem.experts + expert[replica]
    first_device = sources * problem.experts
    sink = first_device + cluster.devices
    amount = tokens[source, expert[replica]]
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        supply, first_device + hosts.device[replica], amount, cost[source, replica]
    )
    devices = np.arange(cluster.devices)
    flow.add_arcs_with_capacity_and_unit_cost(
        first_device + devices, np.full(cluster.devices, sink), cap, np.zeros(cluster.devices, np.int64)
    )
    flow.set_nodes_supplies(np.arange(first_device), tokens.reshape(-1))
    flow.set_nodes_supplies(np.array([sink]), np.array([-tokens.sum()]))
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise RuntimeError(f"min-cost flow ended with {status}; the optimal split is a feasible flow")
    sent = np.zeros((sources, len(hosts.device)), np.int64)
    sent[source, replica] = flow.flows(arcs)
    return sent


def routes(problem: Problem, layout: Layout, split: Split) -> Int64:
    """int64[scenarios, sources, replicas]: tokens from each source to each replica, in the order of ``layout.hosts``.

    Where the split leaves it open, each source's tokens go to the nearest replica with quota left.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    if split.routes is not None:
        return split.routes
    tokens, hosts = problem.demand.tokens, layout.hosts
    sent = np.zeros((*tokens.shape[:2], len(hosts.device)), np.int64)
    quota = np.ascontiguousarray(split.quota[:, hosts.device, hosts.slot])
    _nearest_first(tokens, quota, hosts.start, hosts.device, problem.cluster.node, problem.source_device, sent)
    return sent


@kernel
def _nearest_first(
    tokens: Int64, quota: Int64, start: Int32, device: Int32, node: Int32, source_device: Int32, sent: Int64
) -> None:
    scenarios, sources, experts = tokens.shape
    left = quota.copy()
    for s in range(scenarios):
        for e in range(experts):
            for distance in range(3):
                for i in range(sources):
                    d = source_device[i]
                    unsent = tokens[s, i, e]
                    for j in range(start[e], start[e + 1]):
                        unsent -= sent[s, i, j]
                    for j in range(start[e], start[e + 1]):
                        if unsent == 0:
                            break
                        if (distance == 0 and device[j] != d) or (distance == 1 and node[device[j]] != node[d]):
                            continue
                        amount = min(unsent, left[s, j])
                        sent[s, i, j] += amount
                        left[s, j] -= amount
                        unsent -= amount


def _from_routes(rule: str, layout: Layout, sent: Int64) -> Split:
    hosts = layout.hosts
    quota = np.zeros((len(sent), *layout.slots.shape), np.int64)
    quota[:, hosts.device, hosts.slot] = sent.sum(axis=1)
    return Split(rule, quota, sent)


RULES: dict[str, Callable[[Problem, Layout], Split]] = {
    "even": even,
    "lite": lite,
    "optimal": optimal,
    "local": local,
    "home": home,
}
"""Split rules by name."""


def split(problem: Problem, layout: Layout, rule: str) -> Split:
    """Divide the tokens of each scenario by a rule of `RULES`."""
    return RULES[rule](problem, layout)
