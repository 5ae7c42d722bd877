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
def _remove(e: int, position: int, host: Int32, count: Int32) -> None:
    n = count[e]
    for i in range(n):
        if host[e, i] == position:
            host[e, i] = host[e, n - 1]
            host[e, n - 1] = -1
            count[e] = n - 1
            return


@kernel
def _add(e: int, position: int, host: Int32, count: Int32) -> None:
    host[e, count[e]] = position
    count[e] += 1


@kernel
def _next(state: Int64) -> int:
    """xorshift64*: a pseudo-random number below 2**31, the same on every machine."""
    x = np.uint64(state[0])
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = np.int64(x)
    return np.int64((x * np.uint64(2685821657736338717)) >> np.uint64(33))


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
    temperature: float,
) -> tuple[float, int]:
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
        The objective, sum of ``weights * largest load per speed``, and the number of candidates scored.
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
        # The layout after the change.
        _remove(b, q, host, count)
        flat[q] = a
        if not replace:
            _remove(a, p, host, count)
            _add(b, p, host, count)
            flat[p] = b
        _add(a, q, host, count)
        threshold = (
            objective + temperature * (-np.log((_next(state) + 1.0) / 2147483649.0)) if temperature > 0 else objective
        )
        score = 0.0
        rest = floor.sum()
        for i in range(scenarios):
            t = (s + i) % scenarios
            trial_quota[t] = quota[t]
            trial_load[t] = load[t]
            # Take both experts off the devices that held them, then pour them again.
            ld = trial_load[t]
            qt = trial_quota[t]
            for x in (a, b):
                for j in range(count[x]):
                    position = host[x, j]
                    if position != p and position != q:
                        ld[position // width] -= qt[position]
            ld[dp] -= qt[p]
            ld[dq] -= qt[q]
            qt[p] = 0
            qt[q] = 0
            pour(tokens[t, a], host[a], count[a], width, speed, qt, ld, order)
            pour(tokens[t, b], host[b], count[b], width, speed, qt, ld, order)
            trial_level[t] = augment(flat, host, count, width, speed, qt, ld, parent, trial_tight[t])
            score += weights[t] * trial_level[t]
            rest -= floor[t]
            if score + rest > threshold or (i == 0 and trial_level[t] > level[t]):
                score = np.inf
                break
        if score <= threshold:
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
            _remove(a, q, host, count)
            flat[q] = b
            if not replace:
                _remove(b, p, host, count)
                _add(a, p, host, count)
                flat[p] = a
            _add(b, q, host, count)
    return best, scored
