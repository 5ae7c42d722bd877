"""Local search where every replica of an expert takes the same share of its tokens.

Nothing is split anew: the loads of the devices follow from the numbers of replicas. Each step draws a scenario, as
likely as its part of the distance from perfect balance, and a replica on its hottest device; it exchanges that with one
elsewhere, or gives its expert a further replica, or lets it go or another expert take its place where it has others.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.objective.score import tail_shares
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.problem.limit_kernels import LimitArrays, arrivals_of
from moeplan.solvers.search.exchange import (
    Draft,
    Exchange,
    apply,
    change_of,
    draft_of,
    exchange_of,
    record,
    removal_of,
    undo,
    within,
)
from moeplan.solvers.search.local import Burst, Scenarios, draw_scenario, find_odds, late, scale_of
from moeplan.solvers.search.random import next_random, seeded

__all__ = ["improve_even"]

DRAWS = 20
"""Pairs of positions drawn at most, per candidate that is scored: limits may allow hardly any."""

STALE = 5
"""Candidates per slot without one to take, after which any is taken: a way out of a local optimum."""

EVENNESS = 1e-3
"""Worth of the mean square of the loads beside the largest one, so that plateaus have a slope."""


@kernel
def improve_even(slots: Int32, scenarios: Scenarios, limits: LimitArrays, burst: Burst) -> float:
    """Improve `slots` in place; see `local.improve` for the arguments, and for what it returns."""
    devices, width = slots.shape
    tokens, speed, weights, tail = scenarios.tokens, scenarios.speed, scenarios.weights, scenarios.tail
    draft = draft_of(slots, tokens.shape[1])
    positions = len(draft.slots)
    arrivals = arrivals_of(draft.on, limits)
    scale = scale_of(scenarios.mean)
    load = np.zeros((len(tokens), devices))
    for e in range(tokens.shape[1]):
        _add(1.0, e, draft, tokens, load)
    trial = load.copy()
    imbalance, after, share = np.ones(len(tokens)), np.ones(len(tokens)), np.empty(len(tokens))
    hottest = np.empty(len(tokens), np.int64)
    _find_hottest(load, speed, hottest)
    _largest(load, speed, scale, imbalance)
    objective = tail_shares(imbalance, weights, tail, share)
    now = objective + _unevenness(load, speed, scale, share)
    odds = np.empty(len(tokens))
    find_odds(share, imbalance, odds)
    best, best_priced = objective, now + burst.price * arrivals.total[0]
    state = seeded(burst.seed)
    scored, draws, stale = 0, 0, 0
    while scored < burst.steps and best > burst.target and draws < DRAWS * burst.steps and not late(draws, burst):
        draws += 1
        s = draw_scenario(odds, state)
        p, q = hottest[s] * width + next_random(state) % width, next_random(state) % positions
        stuck = stale > STALE * positions
        kind = next_random(state) % 4
        if kind == 0:
            allowed, x = removal_of(q if stuck else p, draft, limits)
        elif kind == 1:
            allowed, x = exchange_of(q, p, draft, limits, state)
        else:
            allowed, x = exchange_of(p, q, draft, limits, state)
        if not allowed:
            continue
        change = change_of(x, limits)
        if not within(x, change, limits, arrivals):
            continue
        scored += 1
        stale += 1
        trial[:] = load
        _add_both(-1.0, x, draft, tokens, trial)
        apply(x, draft)
        _add_both(1.0, x, draft, tokens, trial)
        _largest(trial, speed, scale, after)
        reached = tail_shares(after, weights, tail, share)
        value = reached + _unevenness(trial, speed, scale, share)
        if value + burst.price * change.arrivals >= now and not stuck:
            undo(x, draft)
            continue
        stale = 0
        load[:], imbalance[:] = trial, after
        find_odds(share, imbalance, odds)
        _find_hottest(load, speed, hottest)
        objective, now = reached, value
        record(x, change, limits, arrivals)
        if now + burst.price * arrivals.total[0] < best_priced:
            best, best_priced = objective, now + burst.price * arrivals.total[0]
            slots[:] = draft.slots.reshape(devices, width)
    return best


@inner_kernel
def _add_both(sign: float, x: Exchange, draft: Draft, tokens: Int64, load: Float64) -> None:
    """Add what both experts of an exchange put on their devices, or with a `sign` of -1 take it off."""
    for e in (x.a, x.b):
        if e >= 0:
            _add(sign, e, draft, tokens, load)


@inner_kernel
def _add(sign: float, e: int, draft: Draft, tokens: Int64, load: Float64) -> None:
    """Add what an expert puts on its devices, or with a `sign` of -1 take it off."""
    part = sign / draft.replicas[e]
    for i in range(draft.replicas[e]):
        d = draft.host[e, i] // draft.width
        for s in range(len(tokens)):
            load[s, d] += part * tokens[s, e]


@inner_kernel
def _find_hottest(load: Float64, speed: Float64, hottest: Int64) -> None:
    """The device with the largest load per speed in each scenario."""
    for s in range(len(load)):
        hottest[s] = 0
        for d in range(len(speed)):
            if load[s, d] / speed[d] > load[s, hottest[s]] / speed[hottest[s]]:
                hottest[s] = d


@inner_kernel
def _largest(load: Float64, speed: Float64, scale: Float64, imbalance: Float64) -> None:
    """The imbalance of each scenario, which stays as it is without tokens."""
    for s in range(len(load)):
        if scale[s] > 0:
            largest = 0.0
            for d in range(len(speed)):
                largest = max(largest, load[s, d] / speed[d])
            imbalance[s] = max(1.0, largest * scale[s])


@inner_kernel
def _unevenness(load: Float64, speed: Float64, scale: Float64, share: Float64) -> float:
    """`EVENNESS` times the mean square of the loads per speed, in the scenarios that count."""
    total = 0.0
    for s in range(len(load)):
        squares = 0.0
        for d in range(len(speed)):
            level = load[s, d] / speed[d] * scale[s]
            squares += level * level
        total += share[s] * (squares / len(speed))
    return EVENNESS * total
