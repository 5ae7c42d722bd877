"""What is known to limit scenarios: for each a few sets of devices, which bound a candidate before it is split.

A set must compute all tokens of the experts that have no replica outside it, so their number over the set's speed is
the least that the largest load per speed can be. The tight sets of the layout and of those tried before it (see
`flow`) are the ones worth keeping: what a candidate does to them follows from its two experts, long before a split.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int64
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.search.exchange import Draft, Exchange

__all__ = ["Cuts", "bounds_after", "keep_change", "keep_cut", "no_cuts", "weigh"]

KEPT = 8
"""Sets of each scenario, the ones found last."""


class Cuts(NamedTuple):
    """Sets of devices, and what a layout makes each compute.

    Attributes:
        inside: bool[devices, kept, scenarios], which devices are in a set.
        unit: float64[kept, scenarios], imbalance of a token on the set; 0 where there is no set, or nothing to compute.
        tokens: float64[experts, scenarios].
        oldest: int64[scenarios], the set to be replaced next.
        whole: bool[experts, kept, scenarios], whether a set has all replicas of an expert.
        level: float64[kept, scenarios], imbalance that the tokens of those experts alone make.
    """

    inside: Bool
    unit: Float64
    tokens: Float64
    oldest: Int64
    whole: Bool
    level: Float64


@kernel
def no_cuts(devices: int, tokens: Int64) -> Cuts:
    """Cuts of the scenarios in `tokens`, int64[scenarios, experts], of which none is known yet."""
    scenarios, experts = tokens.shape
    return Cuts(
        np.zeros((devices, KEPT, scenarios), np.bool_),
        np.zeros((KEPT, scenarios)),
        np.ascontiguousarray(tokens.T).astype(np.float64),
        np.zeros(scenarios, np.int64),
        np.zeros((experts, KEPT, scenarios), np.bool_),
        np.zeros((KEPT, scenarios)),
    )


@kernel
def weigh(draft: Draft, cuts: Cuts) -> None:
    """Make the cuts those of a draft, whatever layout they were of before."""
    cuts.level[:] = 0.0
    nowhere = np.zeros_like(cuts.whole[0])
    for e in range(len(cuts.whole)):
        _find_whole(e, draft, cuts.inside, cuts.whole[e])
        _add_change(e, nowhere, cuts.whole[e], cuts, cuts.level)


@inner_kernel
def bounds_after(x: Exchange, draft: Draft, cuts: Cuts, whole: Bool, level: Float64, bound: Float64) -> None:
    """Bounds on a draft in which an exchange has just been made, from the cuts of the one before.

    Args:
        x: The exchange.
        draft: The draft with it.
        cuts: Those of the draft without it.
        whole: bool[2, kept, scenarios], overwritten with `Cuts.whole` of both experts.
        level: float64[kept, scenarios], overwritten with `Cuts.level`.
        bound: float64[scenarios], overwritten: no split has a smaller imbalance.
    """
    for k in range(KEPT):
        for s in range(len(bound)):
            level[k, s] = cuts.level[k, s]
    for i, e in enumerate((x.a, x.b)):
        if e >= 0:
            _find_whole(e, draft, cuts.inside, whole[i])
            _add_change(e, cuts.whole[e], whole[i], cuts, level)
    bound[:] = 1.0
    for k in range(KEPT):
        for s in range(len(bound)):
            if level[k, s] > bound[s]:
                bound[s] = level[k, s]


@kernel
def keep_change(x: Exchange, whole: Bool, level: Float64, cuts: Cuts) -> None:
    """Keep an exchange, with what `bounds_after` found."""
    for i, e in enumerate((x.a, x.b)):
        if e >= 0:
            cuts.whole[e] = whole[i]
    cuts.level[:] = level


@inner_kernel
def keep_cut(s: int, tight: Bool, scale: float, draft: Draft, speed: Float64, cuts: Cuts) -> None:
    """Add a set, bool[devices], to those of a scenario, whose imbalance per load per speed is `scale`."""
    k = cuts.oldest[s]
    cuts.oldest[s] = (k + 1) % KEPT
    total = 0.0
    for d in range(len(tight)):
        cuts.inside[d, k, s] = tight[d]
        if tight[d]:
            total += speed[d]
    cuts.unit[k, s] = scale / total
    cuts.level[k, s] = 0.0
    for e in range(len(cuts.whole)):
        whole = True
        for i in range(draft.replicas[e]):
            whole &= tight[draft.host[e, i] // draft.width]
        cuts.whole[e, k, s] = whole
        if whole:
            cuts.level[k, s] += cuts.tokens[e, s] * cuts.unit[k, s]


@inner_kernel
def _find_whole(e: int, draft: Draft, inside: Bool, whole: Bool) -> None:
    """Overwrite `whole`, bool[kept, scenarios]: whether each set has all replicas of an expert."""
    flat = whole.reshape(-1)
    flat[:] = True
    for i in range(draft.replicas[e]):
        row = inside[draft.host[e, i] // draft.width].reshape(-1)
        for j in range(len(flat)):
            flat[j] &= row[j]


@inner_kernel
def _add_change(e: int, before: Bool, after: Bool, cuts: Cuts, level: Float64) -> None:
    """Add an expert's tokens to the sets that now must compute them, and take them off those that did."""
    kept, scenarios = level.shape
    for k in range(kept):
        for s in range(scenarios):
            level[k, s] += (int(after[k, s]) - int(before[k, s])) * (cuts.tokens[e, s] * cuts.unit[k, s])
