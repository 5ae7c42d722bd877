"""Arrays, counts, layouts and times come back as they were sent; what is no such thing is refused by its name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.equality import same
from tests.support.instances import problems, random_layout

from moeplan.api import wire
from moeplan.solvers import Layout, Problem, ProblemError
from moeplan.v1 import tensor_pb2

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(SHAPES, st.sampled_from(["<i4", "<i8", "<f4", "<f8"]), st.integers(0, 2**32 - 1))
def test_arrays(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    array = (np.random.default_rng(seed).normal(size=shape) * 1000).astype(dtype)
    assert same(wire.read_array("array", wire.write_array(array)), array)
    assert same(wire.read_array("array", wire.write_array(array.astype(array.dtype.newbyteorder(">")))), array)


def test_other_types_travel_as_wider_ones() -> None:
    assert wire.read_array("array", wire.write_array(np.array([1, 2], np.uint8))).dtype == np.int64
    assert wire.read_array("array", wire.write_array(np.array([0.5], np.float16))).dtype == np.float64


@given(st.lists(st.integers(0, 2**53), max_size=6))
def test_counts(values: list[int]) -> None:
    counts = np.array(values, np.int64)
    assert same(wire.read_counts("counts", wire.write_counts(counts)), counts)
    assert same(wire.read_counts("counts", wire.write_array(counts.astype(np.float64))), counts)


@given(problems(), st.integers(0, 1000))
def test_layouts(problem: Problem, seed: int) -> None:
    layouts = tuple(random_layout(problem, seed + layer) for layer in range(3))
    for layout in layouts:
        message = wire.write_layout(layout)
        assert wire.read_layout("layout", message, problem.experts) == layout
        assert wire.read_layout("layout", message) == layout  # the largest expert says how many there are
    assert wire.read_layouts("layouts", wire.write_layouts(layouts), 3, problem.experts) == layouts


def test_layouts_of_several_widths_travel_as_wide_as_the_widest() -> None:
    narrow, wide = Layout(np.array([[0], [1]]), 2), Layout(np.array([[0, 1], [1, -1]]), 2)
    first, second = wire.read_layouts("layouts", wire.write_layouts([narrow, wide]), 2, 2)
    assert first.slots.tolist() == [[0, -1], [1, -1]]
    assert second == wide


def test_a_layout_in_force_may_lack_experts() -> None:
    """Experts are lost with their devices; no other layout may lack one."""
    message = wire.write_array(np.array([[0, -1], [2, 3]]))
    partial = wire.read_layout("current", message, 5, partial=True)
    assert partial == Layout.partial([[0, -1], [2, 3]], 5)
    assert partial.replicas.tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(ProblemError, match="no slot with expert 1"):
        wire.read_layout("layout", message, 4)


@pytest.mark.parametrize(
    ("slots", "experts", "message"),
    [
        ([[0, 0], [1, 2]], 3, r"layout\[0\] = \[0, 0\]: holds expert 0 twice"),
        ([[0, 7], [1, 2]], 3, r"layout\[0, 1\] = 7"),
        ([[0, -2], [1, 2]], 3, r"layout\[0, 1\] = -2"),
        ([[0, 1], [1, 0]], 3, "no slot with expert 2"),
        ([[0, 1], [2, 3]], 2**31 - 1, "layout.experts = 2147483647: must be at most the number of slots"),
        ([0, 1, 2], 3, "must be int32"),
        ([[0.0, 1.0], [2.0, 0.0]], 3, "must be int32"),
    ],
)
def test_what_is_no_layout_is_refused(slots: Any, experts: int, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        wire.read_layout("layout", wire.write_array(np.array(slots)), experts)


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"x\.type = 0"):
        wire.read_array("x", tensor_pb2.Tensor())
    with pytest.raises(ProblemError, match=r"x\.data = 4 bytes: shape \[2\] of int32 has 8"):
        wire.read_array("x", tensor_pb2.Tensor(shape=[2], type=tensor_pb2.DATA_TYPE_INT32, data=b"\0" * 4))
    with pytest.raises(ProblemError, match=r"problems\[3\]\.x\.type"), wire.field("problems[3]"):
        wire.read_array("x", tensor_pb2.Tensor(type=9))  # type: ignore[arg-type]


@given(st.integers(1, 10**17))
def test_durations_are_exact_to_the_nanosecond(nanos: int) -> None:
    seconds = nanos / 10**9
    assert wire.read_duration("deadline", wire.write_duration(seconds)) == pytest.approx(seconds, rel=1e-15, abs=1e-9)
    if nanos < 2**53:
        assert wire.read_duration("deadline", wire.write_duration(seconds)) == seconds


@given(st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1)))
def test_times_are_exact_to_the_microsecond(time: datetime) -> None:
    for zone in (UTC, None):
        moment = time.replace(tzinfo=UTC).astimezone(zone)
        assert wire.read_time(wire.write_time(moment)) == moment
    assert wire.read_time(wire.write_time(time.replace(tzinfo=UTC))).utcoffset() == timedelta(0)
