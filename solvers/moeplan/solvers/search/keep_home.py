"""Search for layouts that keep tokens on their own node at bounded load; see `coverage` for what that means.

The search maximises covered tokens under a cap of load. It draws two positions, and exchanges their experts or replaces
one that has other replicas. What that does to coverage is known at once; only exchanges that are not worse for it, or
not by more than the load that exceeds the cap weighs, are split anew.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.limit_kernels import LimitArrays, arrivals_of
from moeplan.solvers.search.exchange import (
    Draft,
    Exchange,
    apply,
    change_of,
    draft_of,
    exchange_of,
    record,
    undo,
    within,
)
from moeplan.solvers.search.random import next_random, seeded
from moeplan.solvers.split.coverage import demand_of, items_of
from moeplan.solvers.split.flow import augment, pour, waterfill

__all__ = ["SourcedScenarios", "keep_home"]

LOAD_PRICE = 20.0
"""Cost of exceeding the cap by a fraction, beside the same fraction of tokens leaving their node."""

DRAWS = 200
"""Pairs of positions drawn at most, per candidate that is scored."""


class SourcedScenarios(NamedTuple):
    """The measure of a layout, where it counts which domain tokens come from.

    Attributes:
        tokens: int64[scenarios, domains, experts], tokens by the domain that they come from.
        weights: float64[scenarios], importance of each scenario, divided by its tokens.
        caps: float64[scenarios], largest load per speed to stay within.
        speed: float64[devices].
        domain: int32[devices], see `domains`.
    """

    tokens: Int64
    weights: Float64
    caps: Float64
    speed: Float64
    domain: Int32


class _Items(NamedTuple):
    """The items of `coverage` that a layout divides tokens into, as `flow` reads them.

    Attributes:
        host: int32[items, devices], positions of each item.
        replicas: int32[items], their number.
        slots: int32[positions], item at each position; there are two positions for a slot.
    """

    host: Int32
    replicas: Int32
    slots: Int32


class _Splits(NamedTuple):
    """The split of every scenario in which covered tokens stay at home.

    Attributes:
        demand: int64[scenarios, items].
        quota: int64[scenarios, positions].
        load: int64[scenarios, devices].
    """

    demand: Int64
    quota: Int64
    load: Int64


class _Scratch(NamedTuple):
    """Workspace: `order`, `parent`, `seen` and `tight` as in `flow`."""

    order: Int32
    parent: Int32
    seen: Int64
    tight: Bool


@kernel
def keep_home(
    slots: Int32, scenarios: SourcedScenarios, limits: LimitArrays, steps: int, seed: int, heat: float
) -> tuple[float, float]:
    """Improve `slots` in place.

    Args:
        slots: int32[devices, width], a valid layout whose -1 entries mark slots that must stay empty.
        scenarios: What the layout is judged by.
        limits: What it must respect.
        steps: Candidates to score.
        seed: Seed of the draws.
        heat: How much worse than the layout before it a candidate may be and still be taken: at first; falls to 0.
            The best layout is the one returned.

    Returns:
        Weighted part of the tokens that leave their domain, and by what fraction the caps are exceeded on average,
        where all covered tokens stay at home.
    """
    devices, width = slots.shape
    draft = draft_of(slots, scenarios.tokens.shape[2])
    positions = len(draft.slots)
    arrivals = arrivals_of(draft.on, limits)
    items = _items_of_all(draft, scenarios.domain, scenarios.tokens.shape[1])
    scratch = _Scratch(
        np.empty(devices, np.int32),
        np.empty((3, devices), np.int32),
        np.zeros(len(items.replicas) + 1, np.int64),
        np.empty(devices, np.bool_),
    )
    now, trial = _no_splits(scenarios, items), _no_splits(scenarios, items)
    remote, excess = _split_all(scenarios, items, now, scratch)
    worth = _worth(scenarios)
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
        allowed, x = exchange_of(p, q, draft, limits, state)
        if not allowed or x.a < 0 or x.b < 0:
            continue
        change = change_of(x, limits)
        if not within(x, change, limits, arrivals):
            continue
        gain = _gain(x, scenarios.domain, items.replicas, worth)
        slack = heat * (1 - scored / steps)
        if -gain > LOAD_PRICE * excess + slack:
            continue
        scored += 1
        _without(x, scenarios, items, now, trial)
        apply(x, draft)
        _rebuild_items(x, draft, scenarios.domain, items)
        most = score + slack + 1e-12
        excess_after = _split_within(most, remote - gain, x, scenarios, items, trial, scratch)
        if remote - gain + LOAD_PRICE * excess_after > most:
            undo(x, draft)
            _rebuild_items(x, draft, scenarios.domain, items)
            continue
        _copy(trial, now)
        remote -= gain
        excess = excess_after
        score = remote + LOAD_PRICE * excess
        record(x, change, limits, arrivals)
        if score <= best_score:  # equals count: wandering along a plateau is how the search gets off it
            best_score = score
            best = (remote, excess)
            slots[:] = draft.slots.reshape(devices, width)
    return best


@kernel
def _items_of_all(draft: Draft, domain: Int32, domains: int) -> _Items:
    """The items of all experts."""
    devices, experts = draft.on.shape
    number = experts * (1 + domains)
    items = _Items(
        np.full((number, devices), -1, np.int32),
        np.zeros(number, np.int32),
        np.full(2 * len(draft.slots), -1, np.int32),
    )
    for e in range(experts):
        _rebuild(e, draft, domain, items)
    return items


@kernel
def _rebuild_items(x: Exchange, draft: Draft, domain: Int32, items: _Items) -> None:
    """The items of both experts after their exchange, or after its undoing."""
    for e in (x.a, x.b):
        _rebuild(e, draft, domain, items)


@kernel
def _rebuild(e: int, draft: Draft, domain: Int32, items: _Items) -> None:
    width = draft.width
    items_of(e, draft.host, draft.replicas[e], domain, width, items.host, items.replicas, items.slots)


@kernel
def _no_splits(scenarios: SourcedScenarios, items: _Items) -> _Splits:
    count, devices = len(scenarios.tokens), len(scenarios.speed)
    return _Splits(
        np.zeros((count, len(items.replicas)), np.int64),
        np.zeros((count, len(items.slots)), np.int64),
        np.zeros((count, devices), np.int64),
    )


@kernel
def _copy(splits: _Splits, to: _Splits) -> None:
    to.demand[:] = splits.demand
    to.quota[:] = splits.quota
    to.load[:] = splits.load


@kernel
def _worth(scenarios: SourcedScenarios) -> Float64:
    """float64[domains, experts]: weighted tokens that stay at home where a domain holds the expert."""
    count, domains, experts = scenarios.tokens.shape
    worth = np.zeros((domains, experts))
    for s in range(count):
        for n in range(domains):
            for e in range(experts):
                worth[n, e] += scenarios.weights[s] * scenarios.tokens[s, n, e]
    return worth


@kernel
def _split_all(scenarios: SourcedScenarios, items: _Items, splits: _Splits, scratch: _Scratch) -> tuple[float, float]:
    """Fill `splits`; the part of tokens that leave their domain, and by what fraction the caps are exceeded."""
    tokens, weights, speed = scenarios.tokens, scenarios.weights, scenarios.speed
    host, count, slots = items.host, items.replicas, items.slots
    demand, quota, load = splits.demand, splits.quota, splits.load
    scenario_count, _, experts = tokens.shape
    wide = len(slots) // len(speed)
    order, parent, seen, tight = scratch.order, scratch.parent, scratch.seen, scratch.tight
    remote, excess = 0.0, 0.0
    for s in range(scenario_count):
        for e in range(experts):
            covered = demand_of(e, tokens[s], count, demand[s])
            remote += weights[s] * (tokens[s, :, e].sum() - covered)
        waterfill(demand[s], host, count, wide, speed, quota[s], load[s], order)
        level = augment(slots, host, count, wide, speed, quota[s], load[s], parent, seen, tight)
        excess += max(0.0, level / scenarios.caps[s] - 1.0) / scenario_count
    return remote, excess


@kernel
def _gain(x: Exchange, domain: Int32, count: Int32, worth: Float64) -> float:
    """Weighted tokens that an exchange brings home; known without splitting anything."""
    experts = worth.shape[1]
    here, there = domain[x.dp], domain[x.dq]
    gain = 0.0
    if here != there or x.replace:
        if count[experts * (1 + there) + x.a] == 0:
            gain += worth[there, x.a]
        if count[experts * (1 + there) + x.b] == 1:
            gain -= worth[there, x.b]
        if not x.replace:
            if count[experts * (1 + here) + x.b] == 0:
                gain += worth[here, x.b]
            if count[experts * (1 + here) + x.a] == 1:
                gain -= worth[here, x.a]
    return gain


@kernel
def _without(x: Exchange, scenarios: SourcedScenarios, items: _Items, now: _Splits, trial: _Splits) -> None:
    """Copy `now` to `trial` without the tokens of both experts, before their exchange."""
    host, count = items.host, items.replicas
    quota, load = trial.quota, trial.load
    scenario_count, domains, experts = scenarios.tokens.shape
    wide = len(items.slots) // len(scenarios.speed)
    trial.demand[:], quota[:], load[:] = now.demand, now.quota, now.load
    for s in range(scenario_count):
        for e in (x.a, x.b):
            for k in range(domains + 1):
                item = experts * k + e
                for i in range(count[item]):
                    position = host[item, i]
                    load[s, position // wide] -= quota[s, position]
                    quota[s, position] = 0


@kernel
def _split_within(
    most: float,
    remote: float,
    x: Exchange,
    scenarios: SourcedScenarios,
    items: _Items,
    trial: _Splits,
    scratch: _Scratch,
) -> float:
    """Pour both experts again in every scenario, and return by what fraction the caps are exceeded.

    Ends early, with the excess so far, once that makes the score exceed `most`.
    """
    tokens, speed, caps = scenarios.tokens, scenarios.speed, scenarios.caps
    host, count, slots = items.host, items.replicas, items.slots
    demand, quota, load = trial.demand, trial.quota, trial.load
    order, parent, seen, tight = scratch.order, scratch.parent, scratch.seen, scratch.tight
    scenario_count, domains, experts = tokens.shape
    wide = len(slots) // len(speed)
    excess = 0.0
    for s in range(scenario_count):
        for e in (x.a, x.b):
            demand_of(e, tokens[s], count, demand[s])
            for k in range(domains, -1, -1):
                item = experts * k + e
                if count[item]:
                    pour(demand[s, item], host[item], count[item], wide, speed, quota[s], load[s], order)
        level = augment(slots, host, count, wide, speed, quota[s], load[s], parent, seen, tight)
        excess += max(0.0, level / caps[s] - 1.0) / scenario_count
        if remote + LOAD_PRICE * excess > most:
            break
    return excess
