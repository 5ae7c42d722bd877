"""Whatever is given in place of an array or a number is taken exactly or refused by the name of its field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.solvers import (
    Cluster,
    Constraints,
    Demand,
    ExpertSpec,
    Layout,
    Problem,
    ProblemError,
    SolveParameters,
    evaluate,
    solve,
)

LAYOUT = Layout(np.array([[0, 1], [1, 0]], np.int32), 2)

ARRAYS: dict[str, Callable[[Any], object]] = {
    "cluster.slots": lambda v: Cluster(v, np.zeros(2, int), np.ones(2)),
    "cluster.node": lambda v: Cluster(np.ones(2, int), v, np.ones(2)),
    "cluster.speed": lambda v: Cluster.uniform(2, 2, speed=v),
    "cluster.memory_bytes": lambda v: Cluster.uniform(2, 2, memory_bytes=v),
    "demand.tokens": lambda v: Demand.of(v),
    "demand.weights": lambda v: Demand.of([[[1]], [[2]]], weights=v),
    "layout.slots": lambda v: Layout(v, 2),
    "constraints.pinned": lambda v: Constraints(pinned=v),
    "constraints.domain": lambda v: Constraints(domain=v),
}
WRONG_ARRAYS = [
    [[1, 2], [3]],
    ["a", "b"],
    [None, 1],
    [{}, 1],
    "text",
    object(),
    np.ma.masked_array([1, 2], mask=[True, False]),
]

NUMBERS: dict[str, Callable[[Any], object]] = {
    "cluster.devices": lambda v: Cluster.uniform(v, 2),
    "cluster.slots": lambda v: Cluster.uniform(2, v),
    "cluster.nodes": lambda v: Cluster.uniform(2, 2, nodes=v),
    "layout.experts": lambda v: Layout(np.zeros((1, 1), np.int32), v),
    "expert.weight_bytes": lambda v: ExpertSpec(weight_bytes=v),
    "max_moves": lambda v: Problem(Cluster.uniform(2, 2), Demand.of([1, 2]), current=LAYOUT, max_moves=v),
    "groups": lambda v: Problem(Cluster.uniform(2, 2), Demand.of([1, 2]), groups=v),
    "constraints.min_tokens": lambda v: Constraints(min_tokens=v),
    "constraints.device_move_bytes": lambda v: Constraints(device_move_bytes=v),
    "failed[0]": lambda v: Problem(Cluster.uniform(2, 2), Demand.of([1, 2])).without([v]),
    "parameters.seed": lambda v: SolveParameters(seed=v),
    "parameters.work_limit": lambda v: SolveParameters(work_limit=v),
    "parameters.threads": lambda v: SolveParameters(threads=v),
}
WRONG_NUMBERS = [1.5, 2.7, "3", [1], {}, True, float("nan"), -3, np.float64(1.0)]


@pytest.mark.parametrize("field", ARRAYS)
@pytest.mark.parametrize("value", WRONG_ARRAYS, ids=lambda value: type(value).__name__)
def test_what_is_no_array_of_numbers_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ProblemError) as refused:
        ARRAYS[field](value)
    assert refused.value.field.startswith(field)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=repr)
def test_what_is_no_integer_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ProblemError) as refused:
        NUMBERS[field](value)
    assert refused.value.field.startswith(field)


def test_what_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(ProblemError, match=r"^tail = 'a': must be a number"):
        Problem(Cluster.uniform(2, 2), Demand.of([1, 2]), tail="a")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"^parameters.deadline_s = \[1\]: must be a number"):
        SolveParameters(deadline_s=[1])  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"^constraints.groups_on_node = 'false': must be True or False"):
        Constraints(groups_on_node="false")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"^rule = 'foo': must be one of even"):
        evaluate(Problem(Cluster.uniform(2, 2), Demand.of([1, 2])), LAYOUT, "foo")


def test_an_unknown_solver_is_refused_even_where_none_is_needed() -> None:
    easy = Problem(Cluster.uniform(4, 4), Demand.of([5, 4, 3, 2]))
    for policy in ("hybrid", "static"):
        with pytest.raises(ProblemError, match="solver"):
            solve(easy, policy=policy, parameters=SolveParameters(solver="foo"))


@given(st.lists(st.floats(0, 1.7e308), min_size=1, max_size=4).filter(any))
def test_weights_of_any_size_sum_to_one(weights: list[float]) -> None:
    demand = Demand.of(np.ones((len(weights), 1, 2), int), weights=weights)
    assert demand.weights.sum() == pytest.approx(1)
    assert (demand.weights == demand.weights.max())[int(np.argmax(weights))]


def test_an_array_without_masked_entries_is_an_array() -> None:
    assert Demand.of(np.ma.masked_array([4, 5], mask=[False, False])).tokens.tolist() == [[[4, 5]]]
    devices, slots = np.array([2, 3])
    assert Cluster.uniform(devices, slots).slots.tolist() == [3, 3]
