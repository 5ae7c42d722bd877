"""Linear assignment finds what SciPy's finds, also which of several optima."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moeplan.solvers.problem.linear_assignment import linear_assignment

sizes = st.integers(1, 12)


@given(rows=sizes, columns=sizes, values=st.sampled_from((1, 2, 5, 10**9)), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("maximize", [False, True])
def test_it_chooses_as_scipy_does(rows: int, columns: int, values: int, seed: int, maximize: bool) -> None:
    cost = np.random.default_rng(seed).integers(-values, values, (rows, columns)) / 7
    for mine, theirs in zip(
        linear_assignment(cost, maximize=maximize), linear_sum_assignment(cost, maximize=maximize), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_ties_are_broken_likewise_in_large_tables() -> None:
    for size in (100, 257):
        cost = np.random.default_rng(size).integers(0, 20, (size, size)).T * 0.1
        np.testing.assert_array_equal(linear_assignment(cost)[1], linear_sum_assignment(cost)[1])


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_assign(shape: tuple[int, int]) -> None:
    rows, columns = linear_assignment(np.empty(shape))
    assert rows.size == columns.size == 0
