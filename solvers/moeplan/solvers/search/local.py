"""Local search over layouts: swaps and replacements, scored by the optimal split of every scenario.

A replica helps a scenario only where it connects that scenario's tight set (see `flow`) to the devices outside it, and
a swap only where it carries load from the one to the other. So each step draws one scenario that is not yet balanced,
one position inside its tight set and one outside, and tries to exchange their experts, or to replace a redundant
replica outside by a copy of an expert inside. Only the experts that changed are poured again; augmenting paths then
restore the optimum of each scenario from the previous one's flow, which costs microseconds.

Most candidates do not get that far. A tight set keeps all tokens of the experts that have no replica outside it, so
what it must hold after an exchange is known without solving anything, and bounds every scenario from below; a candidate
whose bounds are already too much is dropped.

Arrivals (replicas that a device does not hold yet) have a price, so that a limited number of them is spent where it
gains most: a candidate must gain the price of what it adds, and one that gives arrivals back may lose as much.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.objective.score import tail_shares
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.search.random import next_random, seeded
from moeplan.solvers.split.flow import augment, host_table, pour, split_all

__all__ = ["improve"]

STALE = 20
"""Candidates per slot without one to take, after which any is taken: a way out of a local optimum."""


@kernel
def _put(e: int, position: int, flat: Int32, host: Int32, count: Int32) -> None:
    """Replace whatever is at `position` by expert `e`."""
    old = flat[position]
    last = count[old] - 1
    for i in range(last):
        if host[old, i] == position:
            host[old, i] = host[old, last]
            break
    count[old] = last
    host[e, count[e]] = position
    count[e] += 1
    flat[position] = e


@kernel
def _pour_again(
    a: int,
    b: int,
    p: int,
    q: int,
    tokens: Int64,
    host: Int32,
    count: Int32,
    width: int,
    speed: Float64,
    quota: Int64,
    load: Int64,
    order: Int32,
) -> None:
    """Take experts `a` and `b` off their devices, as positions `p` and `q` just changed hands, and pour them anew."""
    for x in (a, b):
        for i in range(count[x]):
            position = host[x, i]
            if position != p and position != q:
                load[position // width] -= quota[position]
    for position in (p, q):
        load[position // width] -= quota[position]
        quota[position] = 0
    for x in (a, b):
        pour(tokens[x], host[x], count[x], width, speed, quota, load, order)


@kernel
def _draw(share: Float64, value: Float64, state: Int64) -> int:
    """A scenario, as likely as its part of the distance from perfect balance."""
    total = 0.0
    for s in range(len(share)):
        total += share[s] * (value[s] - 1)
    rest = total * (next_random(state) / 2147483648.0)
    for s in range(len(share)):
        rest -= share[s] * (value[s] - 1)
        if rest < 0:
            return s
    return len(share) - 1


@kernel
def _cuts(load: Int64, speed: Float64, tight: Bool, cut: Int64, cut_speed: Float64) -> None:
    """Tokens and speed of each scenario's tight set."""
    for s in range(len(load)):
        cut[s] = 0
        cut_speed[s] = 0.0
        for d in range(len(speed)):
            if tight[s, d]:
                cut[s] += load[s, d]
                cut_speed[s] += speed[d]


@kernel
def _add_inside(
    sign: int, a: int, b: int, tokens: Int64, host: Int32, count: Int32, width: int, tight: Bool, cut: Int64
) -> None:
    """Add the tokens of experts `a` and `b` to what each tight set must hold, where it has all their replicas."""
    for s in range(len(cut)):
        for x in (a, b):
            inside = True
            for i in range(count[x]):
                if not tight[s, host[x, i] // width]:
                    inside = False
                    break
            if inside:
                cut[s] += sign * tokens[s, x]


@kernel
def improve(
    slots: Int32,
    tokens: Int64,
    weights: Float64,
    tail: float,
    speed: Float64,
    mean: Float64,
    may: Bool,
    must: Bool,
    most: Int32,
    held: Bool,
    far: Bool,
    node: Int32,
    max_arrivals: int,
    device_arrivals: Int64,
    node_arrivals: Int64,
    price: float,
    steps: int,
    seed: int,
    target: float,
) -> float:
    """Improve `slots` in place.

    Args:
        slots: int32[devices, width], a valid layout whose -1 entries mark slots that must stay empty.
        tokens: int64[scenarios, experts].
        weights: float64[scenarios], importance of each scenario, summing to 1.
        tail: Part of the worst scenarios that counts, see `risk`; 1.0 for the mean.
        speed: float64[devices].
        mean: float64[scenarios], load per speed in perfect balance.
        may, must, most, held, far, node, max_arrivals, device_arrivals, node_arrivals: See `Limits`.
        price: Objective that each of them must gain.
        steps: Candidates to score.
        seed: Seed of the draws.
        target: Stop at this objective.

    Returns:
        The objective: mean, or tail mean, of the imbalance over the scenarios; 1.0 for one without tokens.
    """
    devices, width = slots.shape
    scenarios, experts = tokens.shape
    flat = slots.copy().reshape(-1)
    positions = len(flat)
    host, count = host_table(flat, experts, devices)
    quota = np.empty((scenarios, positions), np.int64)
    load = np.empty((scenarios, devices), np.int64)
    tight = np.empty((scenarios, devices), np.bool_)
    level = split_all(slots, tokens, speed, quota, load, tight)
    trial_quota, trial_load, trial_tight = np.empty_like(quota), np.empty_like(load), np.empty_like(tight)
    order = np.empty(devices, np.int32)
    parent = np.empty((2, devices), np.int32)
    scale = np.zeros(scenarios)
    value = np.ones(scenarios)
    for s in range(scenarios):
        if mean[s] > 0:
            scale[s] = 1.0 / mean[s]
            value[s] = level[s] * scale[s]
    on = np.zeros((devices, experts), np.bool_)
    arrivals = 0
    arriving, distant = np.zeros(devices, np.int64), np.zeros(len(node_arrivals), np.int64)
    for position in range(positions):
        e = flat[position]
        d = position // width
        if e >= 0:
            on[d, e] = True
            arrivals += not held[d, e]
            arriving[d] += not held[d, e]
            distant[node[d]] += far[d, e]
    share, trial_share, estimate = np.empty(scenarios), np.empty(scenarios), np.empty(scenarios)
    objective = tail_shares(value, weights, tail, share)
    ranking = np.argsort(share * (1 - value))
    cut, trial_cut, cut_speed = np.empty(scenarios, np.int64), np.empty(scenarios, np.int64), np.empty(scenarios)
    _cuts(load, speed, tight, cut, cut_speed)
    best, best_priced = objective, objective + price * arrivals
    state = seeded(seed)
    scored = 0
    draws = 0
    stale = 0
    while scored < steps and best > target and draws < 100 * steps:
        draws += 1
        s = _draw(share, value, state)
        p = next_random(state) % positions
        q = next_random(state) % positions
        stuck = stale > STALE * positions
        if flat[p] < 0 or flat[q] < 0 or (not stuck and (not tight[s, p // width] or tight[s, q // width])):
            continue
        a, b = flat[p], flat[q]
        dp, dq = p // width, q // width
        if a == b or dp == dq or on[dq, a] or not may[dq, a] or must[dq, b]:
            continue
        replace = count[b] > 1 and count[a] < most[a] and next_random(state) % 2 == 0
        if not replace and (on[dp, b] or not may[dp, b] or must[dp, a]):
            continue
        change_q = int(not held[dq, a]) - int(not held[dq, b])
        change_p = 0 if replace else int(not held[dp, b]) - int(not held[dp, a])
        change = change_q + change_p
        if change > 0 and arrivals + change > max_arrivals:
            continue
        if change_q > 0 and arriving[dq] + change_q > device_arrivals[dq]:
            continue
        if change_p > 0 and arriving[dp] + change_p > device_arrivals[dp]:
            continue
        far_q = int(far[dq, a]) - int(far[dq, b])
        far_p = 0 if replace else int(far[dp, b]) - int(far[dp, a])
        if node[dp] == node[dq]:
            far_q, far_p = far_q + far_p, 0
        if far_q > 0 and distant[node[dq]] + far_q > node_arrivals[node[dq]]:
            continue
        if far_p > 0 and distant[node[dp]] + far_p > node_arrivals[node[dp]]:
            continue
        stale += 1
        allowed = np.inf if stuck else objective - price * change
        trial_cut[:] = cut
        _add_inside(-1, a, b, tokens, host, count, width, tight, trial_cut)
        _put(a, q, flat, host, count)
        if not replace:
            _put(b, p, flat, host, count)
        _add_inside(1, a, b, tokens, host, count, width, tight, trial_cut)
        for t in range(scenarios):
            estimate[t] = max(1.0, trial_cut[t] / cut_speed[t] * scale[t])
        accepted = stuck or (trial_cut[s] < cut[s] and tail_shares(estimate, weights, tail, trial_share) <= allowed)
        if accepted:
            scored += 1
            for t in ranking:
                trial_quota[t] = quota[t]
                trial_load[t] = load[t]
                _pour_again(a, b, p, q, tokens[t], host, count, width, speed, trial_quota[t], trial_load[t], order)
                highest = augment(
                    flat, host, count, width, speed, trial_quota[t], trial_load[t], parent, trial_tight[t]
                )
                if scale[t] > 0:
                    estimate[t] = highest * scale[t]
                if tail_shares(estimate, weights, tail, trial_share) > allowed:
                    accepted = False
                    break
        if not accepted:
            _put(b, q, flat, host, count)
            if not replace:
                _put(a, p, flat, host, count)
            continue
        stale = 0
        quota, trial_quota = trial_quota, quota
        load, trial_load = trial_load, load
        tight, trial_tight = trial_tight, tight
        value, estimate = estimate, value
        objective = tail_shares(value, weights, tail, share)
        ranking = np.argsort(share * (1 - value))
        _cuts(load, speed, tight, cut, cut_speed)
        arrivals += change
        arriving[dq] += change_q
        arriving[dp] += change_p
        distant[node[dq]] += far_q
        distant[node[dp]] += far_p
        on[dq, a] = True
        on[dq, b] = False
        if not replace:
            on[dp, a] = False
            on[dp, b] = True
        if objective + price * arrivals < best_priced:
            best, best_priced = objective, objective + price * arrivals
            slots[:] = flat.reshape(devices, width)
    return best
