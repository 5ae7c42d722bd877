"""Layouts that keep tokens on their own node at bounded load: the split that does, and the search for more of it.

An expert is **covered** on a node that holds a replica of it: the tokens that this node's sources route to it need not
leave. Where covered tokens do stay, the rest of the split is a plain one (see `flow`) of finer items: the covered
tokens of an expert and a node may go to its replicas there, the uncovered tokens of an expert to all its replicas. So
every slot gets two positions, and pouring and augmenting paths work unchanged:

    2 * slot      item ``experts * (1 + node) + expert``, covered tokens
    2 * slot + 1  item ``expert``, uncovered tokens

The search maximises covered tokens under a cap of load. It draws two positions, and exchanges their experts or replaces
one that has other replicas. What that does to coverage is known at once; only exchanges that are not worse for it, or
not by more than the load that exceeds the cap weighs, are split anew. Where a cluster has one node, its devices take
the part of nodes.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.flow import augment, pour, waterfill
from moeplan.solvers.kernel import kernel
from moeplan.solvers.problem import Problem
from moeplan.solvers.search import _next

__all__ = ["coverable", "covered_split", "domains", "keep_home", "tokens_by_domain"]

LOAD_PRICE = 20.0
"""What exceeding the cap by a fraction costs, beside the same fraction of tokens leaving their node."""

DRAWS = 200
"""Pairs of positions drawn at most, per candidate that is scored."""


def domains(problem: Problem) -> Int32:
    """int32[devices]: what each device's tokens should not leave: its node, or itself where there is one node."""
    return problem.cluster.node if problem.cluster.nodes > 1 else np.arange(problem.devices, dtype=np.int32)


def tokens_by_domain(problem: Problem) -> Int64:
    """int64[scenarios, domains, experts]: the demand by the domain that it comes from.

    Raises:
        ProblemError: the demand does not tell sources apart.
    """
    domain = domains(problem)[problem.source_device]
    tokens = np.zeros((problem.demand.scenarios, int(domains(problem).max()) + 1, problem.experts), np.int64)
    for source, home in enumerate(domain):
        tokens[:, home] += problem.demand.tokens[:, source]
    return tokens


@kernel
def _items_of(
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
def _demand_of(e: int, tokens: Int64, count: Int32, demand: Int64) -> int:
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


@kernel
def _place(e: int, position: int, layout: Int32, replicas: Int32, held: Int32) -> None:
    """Replace the replica at `position` by one of expert `e`; `held` counts the replicas of each expert."""
    old = layout[position]
    last = held[old] - 1
    for i in range(last):
        if replicas[old, i] == position:
            replicas[old, i] = replicas[old, last]
            break
    held[old] = last
    replicas[e, held[e]] = position
    held[e] += 1
    layout[position] = e


@kernel
def _unpour(e: int, nodes: int, experts: int, host: Int32, count: Int32, width: int, quota: Int64, load: Int64) -> None:
    """Take all items of expert `e` off the devices."""
    for k in range(nodes + 1):
        item = experts * k + e
        for i in range(count[item]):
            position = host[item, i]
            load[position // width] -= quota[position]
            quota[position] = 0


@kernel
def keep_home(
    slots: Int32,
    tokens: Int64,
    weights: Float64,
    caps: Float64,
    speed: Float64,
    node: Int32,
    may: Bool,
    must: Bool,
    most: Int32,
    placed: Bool,
    max_arrivals: int,
    steps: int,
    seed: int,
    heat: float,
) -> tuple[float, float]:
    """Improve `slots` in place.

    Args:
        slots: int32[devices, width], a valid layout whose -1 entries mark slots that must stay empty.
        tokens: int64[scenarios, nodes, experts], tokens by the node that they come from.
        weights: float64[scenarios], importance of each scenario, divided by its tokens.
        caps: float64[scenarios], largest load per speed to stay within.
        speed: float64[devices].
        node: int32[devices].
        may, must, most: See `Rules`, narrowed to one region per unit.
        placed: bool[devices, experts], replicas of the layout in force.
        max_arrivals: Most replicas that are not in `placed`.
        steps: Candidates to score.
        seed: Seed of the draws.
        heat: How much worse than the layout before it a candidate may be and still be taken: at first; falls to 0.
            The best layout is the one returned.

    Returns:
        Weighted part of the tokens that leave their node, and by what fraction the caps are exceeded on average, where
        all covered tokens stay at home.
    """
    devices, width = slots.shape
    scenarios, nodes, experts = tokens.shape
    items = experts * (1 + nodes)
    wide = 2 * width
    layout = slots.copy().reshape(-1)
    positions = len(layout)
    replicas = np.full((experts, devices), -1, np.int32)
    held = np.zeros(experts, np.int32)
    on = np.zeros((devices, experts), np.bool_)
    arrivals = 0
    for position in range(positions):
        e = layout[position]
        if e >= 0:
            replicas[e, held[e]] = position
            held[e] += 1
            on[position // width, e] = True
            arrivals += not placed[position // width, e]
    host = np.full((items, devices), -1, np.int32)
    count = np.zeros(items, np.int32)
    flat = np.full(2 * positions, -1, np.int32)
    for e in range(experts):
        _items_of(e, replicas, held[e], node, width, host, count, flat)
    demand = np.zeros((scenarios, items), np.int64)
    quota = np.zeros((scenarios, 2 * positions), np.int64)
    load = np.zeros((scenarios, devices), np.int64)
    tight = np.zeros((scenarios, devices), np.bool_)
    level = np.zeros(scenarios)
    order = np.empty(devices, np.int32)
    parent = np.empty((2, devices), np.int32)
    remote = 0.0
    excess = 0.0
    worth = np.zeros((nodes, experts))
    for s in range(scenarios):
        for n in range(nodes):
            for e in range(experts):
                worth[n, e] += weights[s] * tokens[s, n, e]
        for e in range(experts):
            covered = _demand_of(e, tokens[s], count, demand[s])
            remote += weights[s] * (tokens[s, :, e].sum() - covered)
        waterfill(demand[s], host, count, wide, speed, quota[s], load[s], order)
        level[s] = augment(flat, host, count, wide, speed, quota[s], load[s], parent, tight[s])
        excess += max(0.0, level[s] / caps[s] - 1.0) / scenarios
    trial_demand, trial_quota, trial_load = demand.copy(), quota.copy(), load.copy()
    trial_tight, trial_level = tight.copy(), level.copy()
    best = (remote, excess)
    score = remote + LOAD_PRICE * excess
    best_score = score
    state = np.array([np.int64(seed) * 2 + 88172645463325252], np.int64)
    scored = 0
    draws = 0
    while scored < steps and draws < DRAWS * steps:
        draws += 1
        p = _next(state) % positions
        q = _next(state) % positions
        a, b = layout[p], layout[q]
        dp, dq = p // width, q // width
        if a < 0 or b < 0 or a == b or dp == dq or on[dq, a] or not may[dq, a] or must[dq, b]:
            continue
        replace = held[b] > 1 and held[a] < most[a] and _next(state) % 2 == 0
        if not replace and (on[dp, b] or not may[dp, b] or must[dp, a]):
            continue
        change = int(not placed[dq, a]) - int(not placed[dq, b])
        if not replace:
            change += int(not placed[dp, b]) - int(not placed[dp, a])
        if change > 0 and arrivals + change > max_arrivals:
            continue
        # What the exchange does to coverage costs nothing to know.
        gain = 0.0
        here, there = node[dp], node[dq]
        if here != there or replace:
            if count[experts * (1 + there) + a] == 0:
                gain += worth[there, a]
            if count[experts * (1 + there) + b] == 1:
                gain -= worth[there, b]
            if not replace:
                if count[experts * (1 + here) + b] == 0:
                    gain += worth[here, b]
                if count[experts * (1 + here) + a] == 1:
                    gain -= worth[here, a]
        slack = heat * (1 - scored / steps)
        if -gain > LOAD_PRICE * excess + slack:
            continue
        scored += 1
        for s in range(scenarios):
            trial_demand[s], trial_quota[s], trial_load[s] = demand[s], quota[s], load[s]
            for e in (a, b):
                _unpour(e, nodes, experts, host, count, wide, trial_quota[s], trial_load[s])
        _place(a, q, layout, replicas, held)
        if not replace:
            _place(b, p, layout, replicas, held)
        for e in (a, b):
            _items_of(e, replicas, held[e], node, width, host, count, flat)
        excess_after = 0.0
        accepted = True
        for s in range(scenarios):
            for e in (a, b):
                _demand_of(e, tokens[s], count, trial_demand[s])
                for k in range(nodes, -1, -1):
                    item = experts * k + e
                    if count[item]:
                        pour(
                            trial_demand[s, item], host[item], count[item], wide, speed,
                            trial_quota[s], trial_load[s], order,
                        )  # fmt: skip
            trial_level[s] = augment(
                flat, host, count, wide, speed, trial_quota[s], trial_load[s], parent, trial_tight[s]
            )
            excess_after += max(0.0, trial_level[s] / caps[s] - 1.0) / scenarios
            if remote - gain + LOAD_PRICE * excess_after > score + slack + 1e-12:
                accepted = False
                break
        if accepted:
            demand, trial_demand = trial_demand, demand
            quota, trial_quota = trial_quota, quota
            load, trial_load = trial_load, load
            tight, trial_tight = trial_tight, tight
            level, trial_level = trial_level, level
            remote -= gain
            excess = excess_after
            score = remote + LOAD_PRICE * excess
            arrivals += change
            on[dq, a] = True
            on[dq, b] = False
            if not replace:
                on[dp, a] = False
                on[dp, b] = True
            if score <= best_score:  # equals count: wandering along a plateau is how the search gets off it
                best_score = score
                best = (remote, excess)
                slots[:] = layout.reshape(devices, width)
        else:
            _place(b, q, layout, replicas, held)
            if not replace:
                _place(a, p, layout, replicas, held)
            for e in (a, b):
                _items_of(e, replicas, held[e], node, width, host, count, flat)
    return best


@kernel
def covered_split(slots: Int32, tokens: Int64, speed: Float64, node: Int32) -> Int64:
    """The split of least largest load per speed in which every covered token stays on its node.

    Args:
        slots: int32[devices, width], a valid layout.
        tokens: int64[scenarios, nodes, experts], tokens by the node that they come from.
        speed: float64[devices].
        node: int32[devices].

    Returns:
        int64[scenarios, devices, width], tokens that each slot computes.
    """
    devices, width = slots.shape
    scenarios, nodes, experts = tokens.shape
    items = experts * (1 + nodes)
    layout = slots.copy().reshape(-1)
    replicas = np.full((experts, devices), -1, np.int32)
    held = np.zeros(experts, np.int32)
    for position in range(len(layout)):
        e = layout[position]
        if e >= 0:
            replicas[e, held[e]] = position
            held[e] += 1
    host = np.full((items, devices), -1, np.int32)
    count = np.zeros(items, np.int32)
    flat = np.full(2 * len(layout), -1, np.int32)
    for e in range(experts):
        _items_of(e, replicas, held[e], node, width, host, count, flat)
    demand = np.zeros(items, np.int64)
    quota = np.empty(2 * len(layout), np.int64)
    load = np.empty(devices, np.int64)
    tight = np.empty(devices, np.bool_)
    order = np.empty(devices, np.int32)
    parent = np.empty((2, devices), np.int32)
    split = np.empty((scenarios, devices, width), np.int64)
    for s in range(scenarios):
        for e in range(experts):
            _demand_of(e, tokens[s], count, demand)
        waterfill(demand, host, count, 2 * width, speed, quota, load, order)
        augment(flat, host, count, 2 * width, speed, quota, load, parent, tight)
        split[s] = (quota[::2] + quota[1::2]).reshape(devices, width)
    return split


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
