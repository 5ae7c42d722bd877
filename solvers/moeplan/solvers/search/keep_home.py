"""Search for layouts that keep tokens on their own node at bounded load; see `coverage` for what that means.

The search maximises covered tokens under a cap of load. It draws two positions, and exchanges their experts or replaces
one that has other replicas. What that does to coverage is known at once; only exchanges that are not worse for it, or
not by more than the load that exceeds the cap weighs, are split anew.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.search.random import next_random, seeded
from moeplan.solvers.split.coverage import demand_of, items_of
from moeplan.solvers.split.flow import augment, pour, waterfill

__all__ = ["keep_home"]

LOAD_PRICE = 20.0
"""What exceeding the cap by a fraction costs, beside the same fraction of tokens leaving their node."""

DRAWS = 200
"""Pairs of positions drawn at most, per candidate that is scored."""


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
        may, must, most: See `Limits`, narrowed to one region per unit.
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
        items_of(e, replicas, held[e], node, width, host, count, flat)
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
            covered = demand_of(e, tokens[s], count, demand[s])
            remote += weights[s] * (tokens[s, :, e].sum() - covered)
        waterfill(demand[s], host, count, wide, speed, quota[s], load[s], order)
        level[s] = augment(flat, host, count, wide, speed, quota[s], load[s], parent, tight[s])
        excess += max(0.0, level[s] / caps[s] - 1.0) / scenarios
    trial_demand, trial_quota, trial_load = demand.copy(), quota.copy(), load.copy()
    trial_tight, trial_level = tight.copy(), level.copy()
    best = (remote, excess)
    score = remote + LOAD_PRICE * excess
    best_score = score
    state = seeded(seed)
    scored = 0
    draws = 0
    while scored < steps and draws < DRAWS * steps:
        draws += 1
        p = next_random(state) % positions
        q = next_random(state) % positions
        a, b = layout[p], layout[q]
        dp, dq = p // width, q // width
        if a < 0 or b < 0 or a == b or dp == dq or on[dq, a] or not may[dq, a] or must[dq, b]:
            continue
        replace = held[b] > 1 and held[a] < most[a] and next_random(state) % 2 == 0
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
            items_of(e, replicas, held[e], node, width, host, count, flat)
        excess_after = 0.0
        accepted = True
        for s in range(scenarios):
            for e in (a, b):
                demand_of(e, tokens[s], count, trial_demand[s])
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
                items_of(e, replicas, held[e], node, width, host, count, flat)
    return best
