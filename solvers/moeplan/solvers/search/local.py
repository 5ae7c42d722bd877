"""Local search over layouts: swaps and replacements, scored by the optimal split of every scenario.

A replica helps a scenario only where it connects that scenario's tight set (see `flow`) to the devices outside it, and
a swap only where it carries load from the one to the other. So each step draws one scenario that is not yet balanced,
one position inside its tight set and one outside, and tries to exchange their experts, or to replace a redundant
replica outside by a copy of an expert inside. Only the experts that changed are poured again; augmenting paths then
restore the optimum of each scenario from the previous one's flow, which costs microseconds.

Most candidates do not get that far. A tight set keeps all tokens of the experts that have no replica outside it, so
what it must hold after an exchange is known without solving anything. A candidate that does not relieve the drawn
scenario's is dropped, and so is one for which the sets known of all scenarios (see `cuts`) promise too much. As long as
better ones are found easily, the first of many scenarios are a sample of all: a candidate that gains too little there,
of what the sets leave to hope for, is dropped before the others are split.

Arrivals (replicas that a device does not hold yet) have a price, so that a limited number of them is spent where it
gains most: a candidate that adds arrivals must improve by their price, and one that removes some may worsen by it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.objective.score import tail_shares
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64, read_only
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.problem.limit_kernels import LimitArrays, arrivals_of
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.search.cuts import Cuts, bounds_after, keep_change, keep_cut, weigh
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
from moeplan.solvers.split.flow import augment, pour, split_all

__all__ = [
    "Burst",
    "Scenarios",
    "Splits",
    "draw_scenario",
    "find_odds",
    "improve",
    "late",
    "optimal_splits",
    "scale_of",
]

STALE = 20
"""Candidates per slot without one to take, after which any is taken: a way out of a local optimum."""

ROUNDING = 1e-9
"""More than a mean that is kept by additions can be wrong by."""

SAMPLE, PART = 8, 0.25
"""Scenarios that are a sample of eight times as many, once they have this part of what a candidate may gain."""

DRAWS = 50
"""Pairs of positions drawn at most, per candidate that is scored."""

LOOK = 8
"""Candidates between two looks at the clock."""


class Scenarios(NamedTuple):
    """The measure of a layout.

    Attributes:
        tokens: int64[scenarios, experts].
        weights: float64[scenarios], importance of each scenario, summing to 1.
        tail: Part of the worst scenarios that counts, see `risk`; 1.0 for the mean.
        speed: float64[devices].
        mean: float64[scenarios], load per speed in perfect balance.
    """

    tokens: Int64
    weights: Float64
    tail: float
    speed: Float64
    mean: Float64

    @classmethod
    def of(cls, problem: Problem, *, speed: Float64) -> Scenarios:
        """Those of a problem, on devices of this speed."""
        weights, tail = problem.demand.weights, float(problem.tail)
        return cls(problem.loads, weights, tail, read_only(speed), problem.mean_level)


class Burst(NamedTuple):
    """Limits of a search.

    Attributes:
        steps: Candidates to score.
        seed: Seed of the draws.
        price: Objective that each arrival must gain.
        target: Stop at this objective.
        end: Stop at this time on the clock of kernels.
    """

    steps: int
    seed: int
    price: float
    target: float
    end: float


class Splits(NamedTuple):
    """The optimal split of every scenario.

    Attributes:
        quota: int64[scenarios, positions].
        load: int64[scenarios, devices].
        tight: bool[scenarios, devices], see `flow`.
        imbalance: float64[scenarios], largest load per speed over its mean; 1.0 without tokens. A lower bound of it in
            a candidate that is not split yet.
    """

    quota: Int64
    load: Int64
    tight: Bool
    imbalance: Float64


class _Draw(NamedTuple):
    """Whence candidates are drawn.

    Attributes:
        reached: float64[scenarios], a scenario is as likely as what it adds to the one before: see `draw_scenario`.
        positions: int32[scenarios, positions], those inside the tight set first.
        inside: int64[scenarios], their number.
    """

    reached: Float64
    positions: Int32
    inside: Int64


class _Scratch(NamedTuple):
    """Workspace: `order`, `parent` and `seen` as in `flow`; float64[scenarios] `share` as in `tail_shares`."""

    order: Int32
    parent: Int32
    seen: Int64
    share: Float64


@kernel
def optimal_splits(slots: Int32, scenarios: Scenarios) -> Splits:
    """The optimal split of every scenario, of a valid layout int32[devices, width], -1 for empty slots."""
    count = len(scenarios.tokens)
    splits = _no_splits(count, len(slots), slots.size)
    level = split_all(slots, scenarios.tokens, scenarios.speed, splits.quota, splits.load, splits.tight)
    scale = scale_of(scenarios.mean)
    for s in range(count):
        if scale[s] > 0:
            splits.imbalance[s] = level[s] * scale[s]
    return splits


@kernel
def late(draws: int, burst: Burst) -> bool:
    """Whether a burst is over by the clock, at which it looks only now and then."""
    return draws % LOOK == 0 and time_now() >= burst.end


@kernel
def improve(slots: Int32, splits: Splits, cuts: Cuts, scenarios: Scenarios, limits: LimitArrays, burst: Burst) -> float:
    """Improve `slots` in place.

    Args:
        slots: int32[devices, width], a valid layout, -1 for empty slots.
        splits: Its optimal splits, which go with it: splitting anew would take as long as scoring many candidates.
        cuts: Sets of devices known from this search or `no_cuts`, of whatever layout; overwritten.
        scenarios: What the layout is judged by.
        limits: What it must respect.
        burst: How far to search.

    Returns:
        The objective: mean, or tail mean, of the imbalance over the scenarios; 1.0 for one without tokens.
    """
    devices, width = slots.shape
    count, experts = scenarios.tokens.shape
    speed, weights, tail = scenarios.speed, scenarios.weights, scenarios.tail
    draft = draft_of(slots, experts)
    positions = len(draft.slots)
    arrivals = arrivals_of(draft.on, limits)
    scale = scale_of(scenarios.mean)
    now, trial = _no_splits(count, devices, positions), _no_splits(count, devices, positions)
    _copy(splits, now)
    tight, imbalance = now.tight, now.imbalance
    weigh(draft, cuts)
    whole, level, bound = np.empty((2, *cuts.level.shape), np.bool_), np.empty(cuts.level.shape), np.ones(count)
    draw = _Draw(np.empty(count), np.empty((count, positions), np.int32), np.empty(count, np.int64))
    scratch = _Scratch(
        np.empty(devices, np.int32), np.empty((3, devices), np.int32), np.zeros(experts + 1, np.int64), np.empty(count)
    )
    share = np.empty(count)
    objective = tail_shares(now.imbalance, weights, tail, share)
    ranking = np.argsort(share * (1 - now.imbalance))
    _prepare(share, now, draw)
    best, best_priced = objective, objective + burst.price * arrivals.total[0]
    state = seeded(burst.seed)
    scored = 0
    draws = 0
    stale = 0
    while scored < burst.steps and best > burst.target and draws < DRAWS * burst.steps and not late(draws, burst):
        draws += 1
        stuck = stale > STALE * positions
        s, p, q = _candidate(draw, stuck, state)
        if s < 0:
            continue
        allowed, x = exchange_of(p, q, draft, limits, state)
        if not allowed:
            continue
        change = change_of(x, limits)
        if not within(x, change, limits, arrivals):
            continue
        stale += 1
        most = np.inf if stuck else objective - burst.price * change.arrivals
        held = _held(x, draft, scenarios.tokens[s], tight[s])
        apply(x, draft)
        accepted = stuck or x.a < 0 or _held(x, draft, scenarios.tokens[s], tight[s]) < held
        if accepted:
            bounds_after(x, draft, cuts, whole, level, bound)
            accepted = tail_shares(bound, weights, tail, scratch.share) <= most + ROUNDING
        if not accepted:
            undo(x, draft)
            continue
        scored += 1
        trial.imbalance[:] = bound
        # A tail may be of scenarios that the sample lacks; of few scenarios it spares less time than it costs balance.
        hasty = tail == 1 and count >= 8 * SAMPLE and stale <= positions
        accepted = _split_within(most, hasty, x, draft, scenarios, scale, ranking, now, trial, scratch)
        if accepted:
            keep_change(x, whole, level, cuts)
        else:
            undo(x, draft)
        for t in range(count):
            if trial.imbalance[t] > bound[t] + ROUNDING:
                keep_cut(t, trial.tight[t], scale[t], draft, speed, cuts)
        if not accepted:
            continue
        stale = 0
        _copy(trial, now)
        objective = tail_shares(imbalance, weights, tail, share)
        ranking = np.argsort(share * (1 - imbalance))
        _prepare(share, now, draw)
        record(x, change, limits, arrivals)
        priced = objective + burst.price * arrivals.total[0]
        if priced < best_priced:
            best, best_priced = objective, priced
            slots[:] = draft.slots.reshape(devices, width)
            _copy(now, splits)
    return best


@kernel
def _no_splits(scenarios: int, devices: int, positions: int) -> Splits:
    return Splits(
        np.empty((scenarios, positions), np.int64),
        np.empty((scenarios, devices), np.int64),
        np.empty((scenarios, devices), np.bool_),
        np.ones(scenarios),
    )


@kernel
def _copy(splits: Splits, to: Splits) -> None:
    to.quota[:] = splits.quota
    to.load[:] = splits.load
    to.tight[:] = splits.tight
    to.imbalance[:] = splits.imbalance


@kernel
def scale_of(mean: Float64) -> Float64:
    """float64[scenarios]: imbalance per load per speed; 0 for a scenario without tokens."""
    scale = np.zeros(len(mean))
    for s in range(len(mean)):
        if mean[s] > 0:
            scale[s] = 1.0 / mean[s]
    return scale


@inner_kernel
def find_odds(share: Float64, imbalance: Float64, reached: Float64) -> None:
    """Sum up the parts of the scenarios in the distance from perfect balance into `reached`, float64[scenarios]."""
    total = 0.0
    for s in range(len(share)):
        total += share[s] * (imbalance[s] - 1)
        reached[s] = total


@inner_kernel
def draw_scenario(reached: Float64, state: Int64) -> int:
    """A scenario, as likely as its part of the distance from perfect balance; see `find_odds`."""
    point = reached[-1] * (next_random(state) / 2147483648.0)
    for s in range(len(reached)):
        if point < reached[s]:
            return s
    return len(reached) - 1


@inner_kernel
def _candidate(draw: _Draw, stuck: bool, state: Int64) -> tuple[int, int, int]:
    """Draw a scenario and two positions, one inside its tight set and one outside; any two where the search is stuck.

    The scenario is -1 where nothing is outside.
    """
    s = draw_scenario(draw.reached, state)
    positions, inside = draw.positions.shape[1], draw.inside[s]
    if stuck:
        return s, next_random(state) % positions, next_random(state) % positions
    if inside == positions:
        return -1, 0, 0
    p = draw.positions[s, next_random(state) % inside]
    return s, p, draw.positions[s, inside + next_random(state) % (positions - inside)]


@inner_kernel
def _prepare(share: Float64, splits: Splits, draw: _Draw) -> None:
    """Odds and tight sets of a layout."""
    find_odds(share, splits.imbalance, draw.reached)
    tight = splits.tight
    width = draw.positions.shape[1] // tight.shape[1]
    for s in range(len(tight)):
        inside, outside = 0, draw.positions.shape[1]
        for d in range(tight.shape[1]):
            for position in range(d * width, (d + 1) * width):
                if tight[s, d]:
                    draw.positions[s, inside] = position
                    inside += 1
                else:
                    outside -= 1
                    draw.positions[s, outside] = position
        draw.inside[s] = inside


@inner_kernel
def _held(x: Exchange, draft: Draft, tokens: Int64, tight: Bool) -> int:
    """Tokens of both experts that a set of devices must compute: one scenario."""
    held = 0
    for e in (x.a, x.b):
        if e < 0:
            continue
        inside = True
        for i in range(draft.replicas[e]):
            inside &= tight[draft.host[e, i] // draft.width]
        held += tokens[e] * inside
    return held


@inner_kernel
def _split_within(
    most: float,
    hasty: bool,
    x: Exchange,
    draft: Draft,
    scenarios: Scenarios,
    scale: Float64,
    ranking: Int64,
    now: Splits,
    trial: Splits,
    scratch: _Scratch,
) -> bool:
    """Split every scenario anew, in the order of `ranking`; False as soon as the objective must exceed `most`.

    If `hasty`, also as soon as it would if the rest lost as much of what bounds let them gain as the sample did.
    `trial.imbalance` starts with lower bounds, and each split replaces one.
    """
    tokens, speed, weights, tail = scenarios.tokens, scenarios.speed, scenarios.weights, scenarios.tail
    slots, host, count, width = draft.slots, draft.host, draft.replicas, draft.width
    quota, load, tight, imbalance = trial.quota, trial.load, trial.tight, trial.imbalance
    quota_before, load_before = now.quota, now.load
    order, parent, seen, share = scratch.order, scratch.parent, scratch.seen, scratch.share
    mean, hoped, sampled = 0.0, 0.0, 0.0
    for s in range(len(imbalance)):
        mean += weights[s] * imbalance[s]
        hoped += weights[s] * max(0.0, now.imbalance[s] - imbalance[s])
    least = mean
    for n, s in enumerate(ranking):
        sampled += weights[s] * max(0.0, now.imbalance[s] - imbalance[s])
        for position in range(quota.shape[1]):
            quota[s, position] = quota_before[s, position]
        for d in range(load.shape[1]):
            load[s, d] = load_before[s, d]
        _pour_again(x, host, count, width, tokens[s], speed, quota[s], load[s], order)
        level = augment(slots, host, count, width, speed, quota[s], load[s], parent, seen, tight[s])
        if scale[s] > 0:
            mean += weights[s] * (level * scale[s] - imbalance[s])
            imbalance[s] = level * scale[s]
        likely = mean
        if hasty and n >= SAMPLE - 1 and sampled > PART * hoped:
            likely = least + (mean - least) * hoped / sampled
        # No tail has less than the mean, which additions keep up to rounding; a tail takes a look at all scenarios.
        if likely > most + ROUNDING or (tail < 1 and tail_shares(imbalance, weights, tail, share) > most):
            return False
    return tail_shares(imbalance, weights, tail, share) <= most


@inner_kernel
def _pour_again(
    x: Exchange,
    host: Int32,
    count: Int32,
    width: int,
    tokens: Int64,
    speed: Float64,
    quota: Int64,
    load: Int64,
    order: Int32,
) -> None:
    """Take both experts off their devices, after their exchange, and pour them anew: one scenario."""
    for e in (x.a, x.b):
        if e < 0:
            continue
        for i in range(count[e]):
            position = host[e, i]
            if position != x.p and position != x.q:
                load[position // width] -= quota[position]
    for position in (x.p, x.q):
        load[position // width] -= quota[position]
        quota[position] = 0
    for e in (x.a, x.b):
        if e >= 0:
            pour(tokens[e], host[e], count[e], width, speed, quota, load, order)
