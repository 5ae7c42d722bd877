"""Local search over layouts: swaps and replacements, scored by the optimal split of every scenario.

A replica helps a scenario only where it connects that scenario's tight set (see `flow`) to the devices outside it, and
a swap only where it carries load from the one to the other. So each step draws one scenario that is not yet balanced,
one position inside its tight set and one outside, and tries to exchange their experts, or to replace a redundant
replica outside by a copy of an expert inside. Only the experts that changed are poured again; augmenting paths then
restore the optimum of each scenario from the previous one's flow, which costs microseconds.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.flow import augment, host_table, pour, split_all
from moeplan.solvers.kernel import kernel

__all__ = ["improve"]


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
def _next(state: Int64) -> int:
    """xorshift64*: a pseudo-random number below 2**31, the same on every machine."""
    x = np.uint64(state[0])
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = np.int64(x)
    return int((x * np.uint64(2685821657736338717)) >> np.uint64(33))


@kernel
def improve(
    slots: Int32,
    tokens: Int64,
    weights: Float64,
    speed: Float64,
    held: Bool,
    max_arrivals: int,
    steps: int,
    seed: int,
    target: float,
) -> float:
    """Improve `slots` in place.

    Args:
        slots: int32[devices, width], a valid layout whose -1 entries mark slots that must stay empty.
        tokens: int64[scenarios, experts].
        weights: float64[scenarios], importance of each scenario, divided by its mean load per speed.
        speed: float64[devices].
        held: bool[devices, experts], replicas of the layout in force.
        max_arrivals: Most replicas that are not in `held`.
        steps: Candidates to score.
        seed: Seed of the draws.
        target: Stop at this objective.

    Returns:
        The objective: sum of ``weights * largest load per speed``.
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
    trial_quota = np.empty_like(quota)
    trial_load = np.empty_like(load)
    trial_tight = np.empty_like(tight)
    trial_level = np.empty_like(level)
    order = np.empty(devices, np.int32)
    parent = np.empty((2, devices), np.int32)
    total_speed = speed.sum()
    floor = np.empty(scenarios)
    for s in range(scenarios):
        floor[s] = weights[s] * (tokens[s].sum() / total_speed)
    on = np.zeros((devices, experts), np.bool_)
    arrivals = 0
    for position in range(positions):
        e = flat[position]
        if e >= 0:
            on[position // width, e] = True
            arrivals += not held[position // width, e]
    objective = (weights * level).sum()
    best = objective
    state = np.array([np.int64(seed) * 2 + 88172645463325252], np.int64)
    scored = 0
    draws = 0
    while scored < steps and best > target and draws < 100 * steps:
        draws += 1
        s = _next(state) % scenarios
        p = _next(state) % positions
        q = _next(state) % positions
        if flat[p] < 0 or flat[q] < 0 or not tight[s, p // width] or tight[s, q // width]:
            continue
        a, b = flat[p], flat[q]
        dp, dq = p // width, q // width
        if a == b or on[dq, a]:
            continue
        replace = count[b] > 1 and _next(state) % 2 == 0
        if not replace and on[dp, b]:
            continue
        change = int(not held[dq, a]) - int(not held[dq, b])
        if not replace:
            change += int(not held[dp, b]) - int(not held[dp, a])
        if change > 0 and arrivals + change > max_arrivals:
            continue
        scored += 1
        _put(a, q, flat, host, count)
        if not replace:
            _put(b, p, flat, host, count)
        score = 0.0
        rest = floor.sum()
        for i in range(scenarios):
            t = (s + i) % scenarios
            trial_quota[t] = quota[t]
            trial_load[t] = load[t]
            _pour_again(a, b, p, q, tokens[t], host, count, width, speed, trial_quota[t], trial_load[t], order)
            trial_level[t] = augment(
                flat, host, count, width, speed, trial_quota[t], trial_load[t], parent, trial_tight[t]
            )
            score += weights[t] * trial_level[t]
            rest -= floor[t]
            # The scenario it was drawn for comes first: a candidate that does not even help there is dropped.
            if score + rest > objective or (i == 0 and trial_level[t] > level[t]):
                score = np.inf
                break
        if score <= objective:
            quota, trial_quota = trial_quota, quota
            load, trial_load = trial_load, load
            tight, trial_tight = trial_tight, tight
            level, trial_level = trial_level, level
            objective = score
            arrivals += change
            on[dq, a] = True
            on[dq, b] = False
            if not replace:
                on[dp, a] = False
                on[dp, b] = True
            if objective < best:
                best = objective
                slots[:] = flat.reshape(devices, width)
        else:
            _put(b, q, flat, host, count)
            if not replace:
                _put(a, p, flat, host, count)
    return best
