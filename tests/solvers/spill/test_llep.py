"""The LLEP baseline: its rules, and the defects that it leaves out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.spill_cases import check, skewed

from moeplan.solvers import LlepPlanner, SpillOptions
from moeplan.solvers.problem.errors import ProblemError


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    devices=st.integers(1, 9),
    experts=st.integers(1, 30),
    alpha=st.sampled_from([1.0, 1.1, 1.5]),
    minimum=st.sampled_from([1, 16, 1024]),
)
def test_tokens_are_conserved_and_no_pair_is_listed_twice(
    seed: int, devices: int, experts: int, alpha: float, minimum: int
) -> None:
    options = SpillOptions.uniform(experts, devices, 0)
    counts = skewed(seed, devices, experts, 500)
    check(LlepPlanner(options, devices, alpha=alpha, min_tokens=minimum).plan(counts), counts, options, slots=False)


def test_a_worked_example() -> None:
    # Capacity 100. The home of expert 0 still expects 30 tokens of expert 1, so 70 of 250 stay. The least loaded device
    # is 2, which expects nothing and takes 100; device 1 expects 20 and takes the last 80.
    counts = np.array([[250, 30, 15, 5, 0, 0]])
    options = SpillOptions.uniform(6, 3, 0)
    plan = LlepPlanner(options, 1, min_tokens=1).plan(counts)
    assert list(zip(plan.expert.tolist(), plan.device.tolist(), plan.quota.tolist(), strict=True)) == [
        (0, 1, 80),
        (0, 2, 100),
    ]
    assert plan.home_quota.tolist() == [70, 30, 15, 5, 0, 0]
    assert plan.load.tolist() == [100, 100, 100]


def test_alpha_leaves_more_at_home_and_small_chunks_are_avoided() -> None:
    counts = np.array([[250, 30, 15, 5, 0, 0]])
    options = SpillOptions.uniform(6, 3, 0)
    loose = LlepPlanner(options, 1, alpha=1.5, min_tokens=1).plan(counts)
    assert loose.home_quota[0] == 120
    assert loose.load.max() <= 150
    # No device has room for 100 tokens at once except the idle one; the last 80 are all that remains, so they may go.
    coarse = LlepPlanner(options, 1, min_tokens=90).plan(counts)
    assert coarse.quota.tolist() == [80, 100]


def test_nothing_is_spilled_below_the_threshold() -> None:
    counts = np.array([[12, 10, 10, 8]])
    options = SpillOptions.uniform(4, 4, 0)
    assert LlepPlanner(options, 1, min_tokens=1, threshold=1.3).plan(counts).replicas == 0
    assert LlepPlanner(options, 1, min_tokens=1, threshold=1.1).plan(counts).replicas == 1


def test_the_gate_looks_at_experts_as_in_the_paper_or_at_devices_as_in_its_program() -> None:
    counts = np.array([[24, 5, 20, 5]])  # experts reach 24 / 13.5 of their mean, devices 29 / 27
    options = SpillOptions.uniform(4, 2, 0)
    assert LlepPlanner(options, 1, min_tokens=1).plan(counts).quota.sum() == 2
    assert LlepPlanner(options, 1, min_tokens=1, gate="devices").plan(counts).replicas == 0
    uneven = np.array([[24, 20, 5, 5]])
    assert LlepPlanner(options, 1, min_tokens=1, gate="devices").plan(uneven).replicas > 0


def test_invalid_arguments_are_refused() -> None:
    options = SpillOptions.uniform(4, 4, 0)
    with pytest.raises(ProblemError, match=r"llep\.alpha"):
        LlepPlanner(options, 1, alpha=0.9)
    with pytest.raises(ProblemError, match=r"llep\.gate"):
        LlepPlanner(options, 1, gate="tokens")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"llep\.counts"):
        LlepPlanner(options, 1).plan(np.zeros((2, 4), np.int64))
    with pytest.raises(ProblemError, match=r"llep\.counts"):
        LlepPlanner(options, 1).plan(np.full((1, 4), -1))
