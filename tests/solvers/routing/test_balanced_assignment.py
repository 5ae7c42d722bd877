"""BASE routing: equal counts always, near the optimum, with a gap that is never understated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeplan.solvers import Assignment, ProblemError, balanced_assignment, optimal_assignment

VALUES = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 1.0]))
SCORES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=VALUES)
)


def check(scores: npt.NDArray[Any], answer: Assignment) -> None:
    tokens, experts = scores.shape
    counts = np.bincount(answer.expert, minlength=experts)
    assert answer.expert.shape == (tokens,)
    assert counts.sum() == tokens
    assert counts.max() - counts.min() <= 1
    assert answer.value == pytest.approx(scores[np.arange(tokens), answer.expert].sum())
    assert answer.prices.shape == (experts,)


def by_enumeration(scores: npt.NDArray[np.float64]) -> float:
    """The best sum over all assignments whose counts differ by at most one."""
    tokens, experts = scores.shape
    best = -np.inf
    for choice in itertools.product(range(experts), repeat=tokens):
        counts = np.bincount(choice, minlength=experts)
        if counts.max() - counts.min() <= 1:
            best = max(best, scores[np.arange(tokens), choice].sum())
    return float(best)


@settings(max_examples=40)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=VALUES),
)
def test_the_reference_is_optimal(scores: npt.NDArray[np.float64]) -> None:
    answer = optimal_assignment(scores)
    check(scores, answer)
    assert answer.value == pytest.approx(by_enumeration(scores), abs=1e-6)
    assert answer.gap == 0


@settings(max_examples=150)
@given(SCORES, st.sampled_from([1e-1, 1e-3, 1e-6]), st.data())
def test_the_auction_is_as_near_as_it_says(
    scores: npt.NDArray[np.float64], epsilon: float, data: st.DataObject
) -> None:
    tokens, experts = scores.shape
    prices = data.draw(st.none() | hnp.arrays(np.float64, experts, elements=st.floats(-1e6, 1e6)))
    answer = balanced_assignment(scores, prices=prices, epsilon=epsilon)
    check(scores, answer)
    best = optimal_assignment(scores).value
    assert answer.value <= best + 1e-6
    assert answer.bound >= best - 1e-6
    assert answer.gap <= epsilon * np.ptp(scores) * (tokens + experts) + 1e-6


@pytest.mark.parametrize(("tokens", "experts"), [(1022, 8), (1024, 8), (300, 64), (5, 64), (0, 4), (513, 512)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_tokens_ends(tokens: int, experts: int, dtype: type) -> None:
    # 1022 tokens on 8 experts: where the published auction needs padding by its caller, or never ends.
    rng = np.random.default_rng(tokens)
    scores: npt.NDArray[Any] = (rng.standard_normal((tokens, experts)) + np.linspace(0, 3, experts)).astype(dtype)
    answer = balanced_assignment(scores, epsilon=1e-4)
    check(scores, answer)
    spread = float(scores.max() - scores.min()) if tokens else 0.0
    assert answer.gap <= 1e-4 * spread * (tokens + experts)
    if tokens <= 600:
        assert optimal_assignment(scores).value <= answer.bound + 1e-3


def test_whole_scores_are_solved_exactly() -> None:
    # Bertsekas: with whole scores and epsilon below 1 / bidders the auction is exact.
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 10, (60, 7)).astype(np.float64)
    answer = balanced_assignment(scores, epsilon=1e-4)
    assert answer.value == optimal_assignment(scores).value
    assert answer.gap < 1


def test_by_hand() -> None:
    # Both tokens prefer expert 0; the second loses less by giving way.
    answer = balanced_assignment([[5.0, 1.0], [4.0, 3.0]])
    assert answer.expert.tolist() == [0, 1]
    assert answer.value == 8
    # Three tokens on two experts: one expert gets two, and it is the one that is worth more.
    assert balanced_assignment([[5.0, 1.0], [4.0, 3.0], [9.0, 0.0]]).expert.tolist() == [0, 1, 0]


def test_equal_scores_and_hostile_ones() -> None:
    for scores in (np.zeros((10, 3)), np.full((7, 4), -2.5), np.tile([0.0, 1e30], (50, 1)), np.ones((4, 1))):
        check(scores, balanced_assignment(scores))
    steep = np.tile(np.linspace(0, 1, 16), (256, 1))  # every token wants the same experts in the same order
    answer = balanced_assignment(steep)
    check(steep, answer)
    assert answer.gap <= 1e-3 * (256 + 16)


def test_prices_carry_over() -> None:
    rng = np.random.default_rng(9)
    scores = rng.standard_normal((512, 16)) + np.linspace(0, 2, 16)
    first = balanced_assignment(scores, epsilon=1e-5)
    # From its own prices the same answer is found again, as good.
    again = balanced_assignment(scores, prices=first.prices, epsilon=1e-5)
    assert again.gap <= 1e-5 * np.ptp(scores) * 528
    # A shift of all prices means nothing.
    moved = balanced_assignment(scores, prices=first.prices + 64.0, epsilon=1e-5)
    assert moved.value == pytest.approx(again.value, abs=1e-3)
    assert (balanced_assignment(scores).expert == balanced_assignment(scores).expert).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    scores = np.zeros((4, 3))
    scores[2, 1] = bad
    for assign in (balanced_assignment, optimal_assignment):
        with pytest.raises(ProblemError, match=r"scores\[2, 1\]"):
            assign(scores)


def test_other_mistakes_are_explained() -> None:
    scores = np.ones((4, 3))
    mistakes: list[tuple[Callable[[], Assignment], str]] = [
        (lambda: balanced_assignment(scores[0]), "scores"),
        (lambda: balanced_assignment(scores[:, :0]), "scores"),
        (lambda: balanced_assignment([["a"]]), "scores"),
        (lambda: balanced_assignment(scores, prices=np.zeros(4)), "prices"),
        (lambda: balanced_assignment(scores, prices=[0.0, np.nan, 0.0]), "prices"),
        (lambda: balanced_assignment(scores, epsilon=0), "epsilon"),
    ]
    for mistake, field in mistakes:
        with pytest.raises(ProblemError) as error:
            mistake()
        assert error.value.field == field
