"""Rows copied in few copies are the rows of as many copies as there are rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime_client.device import peer_copies
from moeplan.runtime_client.device.peer_copies import Copies, Stretch, stretches


@given(st.lists(st.integers(0, 12), max_size=20))
def test_stretches_are_the_list(numbers: list[int]) -> None:
    found = stretches(numbers)
    assert [each.first + nth * each.step for each in found for nth in range(each.length)] == numbers
    assert [each.place for each in found] == np.cumsum([0, *(each.length for each in found[:-1])]).tolist()[
        : len(found)
    ]
    assert all(each.step > 0 and each.length > 0 for each in found)


def test_numbers_as_far_apart_as_each_other_are_one_stretch() -> None:
    assert stretches([3, 4, 5, 9, 7, 10, 13]) == [Stretch(0, 3, 1, 3), Stretch(3, 9, 1, 1), Stretch(4, 7, 3, 3)]


@pytest.mark.parametrize("largest", [2**31 - 1, 6], ids=["rectangles", "farther apart than a copy may be"])
def test_copies_of_rows(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr(peer_copies, "_LARGEST_PITCH", largest)
    rng = np.random.default_rng(0)
    source, out = rng.integers(0, 256, (40, 4), np.uint8), np.zeros((30, 2, 4), np.uint8)
    numbers = np.array([3, 4, 5, 9, 7, 10, 13])
    place, first, step, length = np.array(stretches(numbers.tolist())).T
    copies = Copies.of(4, length, 8 * place, 8, 4 * first, 4 * step)
    copies.at(out[5:].ctypes.data, source.ctypes.data).start(None)
    expected = np.zeros_like(out)
    expected[5:12, 0] = source[numbers]
    np.testing.assert_array_equal(out, expected)
