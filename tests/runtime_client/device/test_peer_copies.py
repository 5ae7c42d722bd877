"""Rows copied in few copies are the rows of as many copies as there are rows."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime_client.device import peer_copies
from moeplan.runtime_client.device.peer_copies import Copies, Stretch, stretches


class Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D as cuda.h declares it."""

    _fields_: ClassVar = [
        (f"{side}{name}", kind)
        for side in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t),
            ("Y", ctypes.c_size_t),
            ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_uint64),
            ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


class HostDriver:
    """Copies on the host what a GPU's driver would, within the same limit."""

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def cuMemcpy2DAsync_v2(self, place: int, stream: int) -> int:  # noqa: N802
        asked = Memcpy2D.from_address(place)
        if max(asked.srcPitch, asked.dstPitch) > self.largest or (asked.srcMemoryType, asked.dstMemoryType) != (4, 4):
            return 1
        for row in range(asked.Height):
            to, origin = asked.dstDevice + row * asked.dstPitch, asked.srcDevice + row * asked.srcPitch
            ctypes.memmove(to, origin, asked.WidthInBytes)
        return 0


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
@pytest.mark.parametrize("gpu", [False, True], ids=["host", "driver"])
def test_copies_of_rows(monkeypatch: pytest.MonkeyPatch, largest: int, gpu: bool) -> None:
    """From two memories; a driver that copies on the host takes the place of that of a GPU."""
    monkeypatch.setattr(peer_copies, "_LARGEST_PITCH", largest)
    monkeypatch.setattr(peer_copies, "_driver", lambda: HostDriver(largest))
    rng = np.random.default_rng(0)
    source, out = rng.integers(0, 256, (2, 40, 4), np.uint8), np.zeros((30, 2, 4), np.uint8)
    numbers = np.array([3, 4, 5, 9, 7, 10, 13])
    parts = np.array(stretches(numbers.tolist()))
    place, first, step, length = np.tile(parts, (2, 1)).T
    owner = np.arange(2).repeat(len(parts))
    copies = Copies(4, length, 8 * place + 4 * owner, 8, 4 * first, 4 * step)
    stream: Any = SimpleNamespace(cuda_stream=0) if gpu else None
    copies.at(out[5:].ctypes.data, source.ctypes.data + 160 * owner).start(stream)
    expected = np.zeros_like(out)
    expected[5:12] = source[:, numbers].swapaxes(0, 1)
    np.testing.assert_array_equal(out, expected)
