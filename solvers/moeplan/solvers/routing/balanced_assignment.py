"""Linear assignment of tokens to experts with equal counts, as BASE layers route: balance by routing, not by placement.

Every token goes to one expert, every expert gets the same number of tokens (to within one), and the sum of the scores
is as large as possible. Lewis et al., *BASE Layers*, ICML 2021, arXiv 2103.16716. Two algorithms:

- `balanced_assignment`, an auction with epsilon scaling (Bertsekas & Castanon, *The auction algorithm for the
  transportation problem*, Annals of OR 20, 1989). An unassigned token bids for the expert of largest score minus price
  and raises its price to where the second best is as good, plus epsilon; an expert that is full drops its lowest bid.
  At the end no token could do better elsewhere by more than epsilon, so the sum is within epsilon per token of optimal.
- `optimal_assignment`, the exact optimum by LAPJV, cubic in the number of tokens: the reference.

Prices prove the gap. For any prices p, no assignment is worth more than

    sum over tokens of max_e (score_e - p_e)  +  the largest sum of prices that the counts allow

because a token's score is at most its best profit plus the price of the expert it gets.

Where tokens do not divide by experts, dummies fill the difference. A dummy scores 0 everywhere and bids like a token,
but an expert holds at most one, which keeps counts within one of each other, and so the auction ends as it always does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.linear_assignment import linear_assignment

__all__ = ["Assignment", "balanced_assignment", "optimal_assignment"]

Scores = npt.NDArray[Any]

COLD_EPSILON = 0.25
"""First epsilon of the scaling, as a fraction of the range of the scores."""

WARM_EPSILON = 0.02
"""The same, from the prices of an earlier assignment."""

SCALING = 0.2
"""Factor from one epsilon to the next."""

MAX_SCORE = 1e30
"""Scores beyond this are refused: sums of smaller ones stay finite in float32 and float64 alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Which expert each token goes to, and the proof of how good that is.

    Attributes:
        expert: int32[tokens], expert of each token.
        prices: float64[experts], what the next assignment may start from; only differences mean anything.
        value: Sum of the scores of the chosen pairs.
        bound: No assignment with such counts has a larger sum; `value` itself where the optimum is known.
    """

    expert: Int32
    prices: Float64
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """The most by which the optimal sum of scores can be larger: ``bound - value``."""
        return max(0.0, self.bound - self.value)


def balanced_assignment(
    scores: npt.ArrayLike, *, prices: npt.ArrayLike | None = None, epsilon: float = 1e-3
) -> Assignment:
    """Assign tokens to experts in equal numbers, near the largest sum of scores.

    The same scores, prices and epsilon give the same assignment on every rank.

    Args:
        scores: float[tokens, experts], affinity of each token to each expert; float32 and float64 are read in place.
        prices: float64[experts] of an earlier assignment with similar scores, which saves most of the bids.
        epsilon: What a token may miss of its best choice, as a fraction of the range of the scores. The sum of scores
            is within ``epsilon * range * (tokens + experts)`` of optimal, and usually far nearer.

    Returns:
        Every expert has ``tokens // experts`` tokens, or one more where they do not divide.

    Raises:
        ProblemError: a score is not a number within +-1e30, a price is not finite, shapes differ, or epsilon is not
            within 1e-9..1.
    """
    table = _checked(scores)
    if not 1e-9 <= epsilon <= 1:
        raise ProblemError("epsilon", epsilon, "must be 1e-9 to 1, a fraction of the range of the scores")
    experts = table.shape[1]
    start = np.zeros(experts) if prices is None else np.array(prices, np.float64)
    if start.shape != (experts,):
        raise ProblemError("prices", f"array of shape {start.shape}", f"must have one per expert ({experts})")
    if not np.isfinite(start).all():
        raise ProblemError("prices", start.tolist(), "must be finite")
    spread = float(table.max()) - float(table.min()) if table.size else 0.0
    if spread == 0.0 or experts == 1:
        return _judged(table, _even_counts(len(table), experts), np.zeros(experts))
    # No price that an auction ends with is further from the lowest: stale prices must not cost bids, or precision.
    start = np.clip(start - start.min(), 0.0, 2 * spread)
    first = WARM_EPSILON if prices is not None else COLD_EPSILON
    expert, final = _auction(table, start, max(first, epsilon) * spread, epsilon * spread)
    return _judged(table, expert, final - final.min())


def optimal_assignment(scores: npt.ArrayLike) -> Assignment:
    """Assign tokens to experts in equal numbers with the largest sum of scores, exactly.

    By linear assignment over one column per seat: seconds for a few thousand tokens.

    Args:
        scores: float[tokens, experts].

    Returns:
        As `balanced_assignment`, with zero prices and ``bound == value``.

    Raises:
        ProblemError: a score is not a number within +-1e30.
    """
    table = _checked(scores).astype(np.float64)
    tokens, experts = table.shape
    each, extra = divmod(tokens, experts)
    seats = np.tile(np.arange(experts), each + (extra > 0))
    gain = np.zeros((len(seats), len(seats)))
    gain[:tokens] = table[:, seats]
    # Dummies may only sit on the last seat of an expert.
    gain[tokens:, : each * experts] = -1e3 * (1 + np.abs(table).max(initial=0.0)) * len(seats)
    _, column = linear_assignment(gain, maximize=True)
    expert = seats[column[:tokens]].astype(np.int32)
    value = float(table[np.arange(tokens), expert].sum())
    return Assignment(expert, np.zeros(experts), value, value)


def _checked(scores: npt.ArrayLike) -> Scores:
    table = np.asarray(scores)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ProblemError("scores", f"array of shape {table.shape}", "must be [tokens, experts], with experts")
    if table.dtype.kind not in "fiu":
        raise ProblemError("scores", f"array of {table.dtype}", "must hold numbers")
    table = np.ascontiguousarray(table, np.float32 if table.dtype == np.float32 else np.float64)
    bad = ~(np.abs(table) <= MAX_SCORE)
    if bad.any():
        token, expert = (int(i) for i in np.argwhere(bad)[0])
        raise ProblemError(
            f"scores[{token}, {expert}]", float(table[token, expert]), f"must be a number within +-{MAX_SCORE:g}"
        )
    return table


def _even_counts(tokens: int, experts: int) -> Int32:
    """int32[tokens]: tokens in order over experts, for scores that do not tell them apart."""
    return (np.arange(tokens, dtype=np.int64) * experts // max(1, tokens)).astype(np.int32)


def _judged(table: Scores, expert: Int32, prices: Float64) -> Assignment:
    value, profit = _value_and_profit(table, expert, prices)
    each, extra = divmod(len(table), len(prices))
    dearest = np.sort(prices)[len(prices) - extra :].sum()
    return Assignment(expert, prices, value, max(value, profit + each * float(prices.sum()) + float(dearest)))


@kernel
def _value_and_profit(scores: Scores, expert: Int32, prices: Float64) -> tuple[float, float]:
    """Sum of the chosen scores, and sum over tokens of the best score minus price."""
    value = 0.0
    profit = 0.0
    for t in range(len(scores)):
        value += scores[t, expert[t]]
        best = -np.inf
        for e in range(len(prices)):
            best = max(best, scores[t, e] - prices[e])
        profit += best
    return value, profit


@kernel
def _auction(scores: Scores, prices: Float64, epsilon: float, last: float) -> tuple[Int32, Float64]:
    """Auctions of falling epsilon, each from the prices of the one before.

    Args:
        scores: float[tokens, experts], at least two experts.
        prices: float64[experts] to start from.
        epsilon: Epsilon of the first auction.
        last: Epsilon of the last one, at most `epsilon`.

    Returns:
        int32[tokens] expert of each token, and float64[experts] final prices.
    """
    tokens, experts = scores.shape
    each = tokens // experts
    seats = each + (tokens % experts > 0)
    bid = np.empty((experts, seats))
    holder = np.empty((experts, seats), np.int32)
    size = np.empty(experts, np.int64)
    dummy = np.empty(experts, np.bool_)
    dummy_bid = np.empty(experts)
    price = prices.copy()
    while True:
        _one_auction(scores, price, epsilon, each, bid, holder, size, dummy, dummy_bid)
        if epsilon <= last:
            break
        epsilon = max(last, epsilon * SCALING)
    expert = np.empty(tokens, np.int32)
    for e in range(experts):
        for i in range(size[e]):
            expert[holder[e, i]] = e
    return expert, price


@kernel
def _one_auction(
    scores: Scores,
    price: Float64,
    epsilon: float,
    each: int,
    bid: Float64,
    holder: Int32,
    size: Int64,
    dummy: Bool,
    dummy_bid: Float64,
) -> None:
    """Seat every token and dummy. `price` holds what a token must pay at least, and is updated with every bid.

    The bids of an expert are a heap with the lowest on top: ``bid[expert, :size]`` of ``holder[expert, :size]``.
    """
    tokens, experts = scores.shape
    seats = bid.shape[1]
    base = price.copy()
    size[:] = 0
    dummy[:] = False
    waiting = np.empty(tokens, np.int32)
    for t in range(tokens):
        waiting[t] = tokens - 1 - t
    left = tokens
    dummies = experts * seats - tokens
    while left or dummies:
        if left:
            left -= 1
            t = int(waiting[left])
            best, profit, second = 0, -np.inf, -np.inf
            for e in range(experts):
                value = scores[t, e] - price[e]
                if value > profit:
                    best, profit, second = e, value, profit
                elif value > second:
                    second = value
            offer = price[best] + (profit - second) + epsilon
            if size[best] + dummy[best] < seats:
                _push(bid[best], holder[best], size[best], offer, t)
                size[best] += 1
            elif dummy[best] and (size[best] == 0 or dummy_bid[best] <= bid[best, 0]):
                dummy[best] = False
                dummies += 1
                _push(bid[best], holder[best], size[best], offer, t)
                size[best] += 1
            else:
                waiting[left] = holder[best, 0]
                left += 1
                _replace(bid[best], holder[best], size[best], offer, t)
        else:
            dummies -= 1
            best, lowest, second = 0, np.inf, np.inf
            for e in range(experts):
                value = dummy_bid[e] if dummy[e] else price[e]
                if value < lowest:
                    best, lowest, second = e, value, lowest
                elif value < second:
                    second = value
            if dummy[best]:
                dummies += 1
            elif size[best] == seats:
                waiting[left] = holder[best, 0]
                left += 1
                size[best] -= 1
                _replace(bid[best], holder[best], size[best], bid[best, size[best]], holder[best, size[best]])
            dummy[best] = True
            dummy_bid[best] = second + epsilon
        if size[best] + dummy[best] < seats:
            price[best] = base[best]
        else:
            price[best] = bid[best, 0] if size[best] else np.inf
            if dummy[best]:
                price[best] = min(price[best], dummy_bid[best])


@kernel
def _push(bid: Float64, holder: Int32, size: int, offer: float, token: int) -> None:
    """Add an offer to a heap of `size`."""
    i = size
    while i > 0 and bid[(i - 1) // 2] > offer:
        bid[i] = bid[(i - 1) // 2]
        holder[i] = holder[(i - 1) // 2]
        i = (i - 1) // 2
    bid[i] = offer
    holder[i] = token


@kernel
def _replace(bid: Float64, holder: Int32, size: int, offer: float, token: int) -> None:
    """Take the lowest of `size` offers out of a heap and put another one in."""
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and bid[child + 1] < bid[child]:
            child += 1
        if bid[child] >= offer:
            break
        bid[i] = bid[child]
        holder[i] = holder[child]
        i = child
    bid[i] = offer
    holder[i] = token
