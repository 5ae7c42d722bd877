"""Routes of a whole step: counted from recorded choices, and dealt to micro-batches and ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moeplan.solvers import KnownRoutes, ProblemError, count_choices

RNG = np.random.default_rng(7)


def test_choices_are_counted() -> None:
    samples = [RNG.random((tokens, 3, 6)).argsort(axis=2)[..., :2] for tokens in (4, 0, 11)]
    counts = count_choices(samples, 6)
    for sample, found in zip(samples, counts, strict=True):
        for layer in range(3):
            assert Counter(sample[:, layer].ravel().tolist()) == {e: n for e, n in enumerate(found[layer]) if n}


def test_tokens_without_a_route_are_left_out() -> None:
    choices = [[[[0, 1], [2, 1]], [[-1, -1], [0, 0]], [[3, 0], [-1, 2]]]]
    assert count_choices(choices, 4).tolist() == [[[2, 1, 0, 1], [0, 1, 1, 0]]]
    assert count_choices([[[[0]], [[-1]], [[2]]]], 4).tolist() == [[[1, 0, 1, 0]]]


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ([], "choices = no samples"),
        ([[[[0, 4]]]], r"choices\[0\]\[0, 0, 1\] = 4: must be at most 3"),
        ([[[[0, 1]]], [[[0]]]], r"choices\[1\] = array of shape \(1, 1, 1\): must be \[tokens, 1, 2\]"),
        ([[[0, 1]]], "must have 3 dimension"),
    ],
)
def test_what_cannot_be_counted_is_refused(choices: list[object], line: str) -> None:
    with pytest.raises(ProblemError, match=line):
        count_choices(choices, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [None, 5, "counts"])
def test_counts_that_are_none_are_refused(counts: object) -> None:
    for dealt in (KnownRoutes.by_rank, KnownRoutes.in_turn):
        with pytest.raises(ProblemError, match=r"routes\.counts = .*: must"):
            dealt(counts, ranks=2, size=1)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="choices = None: must be a list"):
        count_choices(None, 4)  # type: ignore[arg-type]


def test_frameworks_deal_by_position() -> None:
    counts = np.ones((12, 1, 4), np.int32)
    by_rank = KnownRoutes.by_rank(counts, ranks=2, size=3)
    assert by_rank.source.tolist() == [0] * 6 + [1] * 6
    assert by_rank.micro_batch.tolist() == [0, 0, 0, 1, 1, 1] * 2
    in_turn = KnownRoutes.in_turn(counts, ranks=2, size=3)
    assert in_turn.source.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert in_turn.micro_batch.tolist() == [0] * 6 + [1] * 6
    with pytest.raises(ProblemError, match="12 samples: must be a multiple of ranks"):
        KnownRoutes.by_rank(counts, ranks=2, size=4)


def test_loads_and_demand_follow_an_order() -> None:
    counts = RNG.integers(0, 9, (6, 2, 4), dtype=np.int32)
    routes = KnownRoutes(counts, np.array([0, 1] * 3, np.int32), np.array([0, 0, 1, 1, 2, 2], np.int32), 3)
    order = np.array([5, 0, 1, 2, 3, 4])
    loads = routes.loads(order)
    assert np.array_equal(loads[0], counts[[5, 1, 3]].sum(axis=0))
    assert np.array_equal(loads.sum(axis=0), counts.sum(axis=0))
    demand = routes.demand(order, 1)
    assert demand.shape == (2, 3, 4)
    assert np.array_equal(demand.swapaxes(0, 1), counts[[0, 2, 4]])


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"counts": np.zeros((0, 1, 4), int)}, "must not be empty"),
        ({"counts": -np.ones((2, 1, 4), int)}, r"routes.counts\[0, 0, 0\] = -1"),
        ({"micro_batch": [0]}, "routes.micro_batch = 1 values: must have one per sample"),
        ({"source": [0, 2]}, r"routes.source\[1\] = 2: must be at most 1"),
        ({"sources": 0}, "routes.sources = 0"),
    ],
)
def test_wrong_routes_are_refused(changed: dict[str, object], line: str) -> None:
    given: dict[str, object] = {
        "counts": np.ones((2, 1, 4), int),
        "micro_batch": [0, 1],
        "source": [0, 1],
        "sources": 2,
    }
    with pytest.raises(ProblemError, match=line):
        KnownRoutes(**given | changed)  # type: ignore[arg-type]
