"""The default policy: exact on small problems, whatever they limit, and better with every move that it may make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.instances import optimum, random_layout, small_problems

from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, Termination, evaluate, solve

TRACE = Path(__file__).parents[3] / "examples" / "traces" / "moe-e64-cut.npz"


@settings(max_examples=60, deadline=None)
@given(small_problems(scenarios=3), st.integers(0, 2**32 - 1), st.integers(0, 4), st.booleans())
def test_small_problems_are_solved_exactly_with_any_limit_of_moves(
    problem: Problem, seed: int, moves: int, full: bool
) -> None:
    current = random_layout(problem, seed)
    if not full:  # one replica each: every other slot is empty
        current = Layout.contiguous(problem.experts, problem.capacity)
    limited = replace(problem, current=current, max_moves=moves)
    plan = solve(limited)
    assert plan.moves is not None
    assert len(plan.moves) <= moves
    assert plan.objective <= optimum(limited) * (1 + 2e-4)


def test_moves_into_empty_slots_are_made_one_by_one() -> None:
    current = Layout.contiguous(2, np.full(5, 3))
    problem = Problem(Cluster.uniform(5, 3), Demand.of([[8, 40]]), current=current, max_moves=3)
    assert solve(problem).objective == pytest.approx(solve(problem, policy="ilp").objective)
    assert solve(problem).objective == pytest.approx(1.0417, abs=1e-3)


def test_the_smallest_problems_reach_the_exact_model() -> None:
    current = Layout.partial([[0], [0], [-1], [-1]], 1)
    tiny = Problem(Cluster.uniform(4, 1), Demand.of([[[60]]] * 3), current=current, max_moves=1)
    assert solve(tiny).objective == pytest.approx(4 / 3)
    cluster = Cluster(np.array([1, 1, 3, 1]), np.zeros(4, int), np.array([1, 3.7, 2, 1]))
    unequal = Problem(cluster, Demand.of([66, 124, 111, 137, 196]))
    for seed in range(3):
        assert solve(unequal, parameters=SolveParameters(seed=seed)).objective < 1.349


def test_few_moves_from_a_static_layout_are_worth_it() -> None:
    counts = np.load(TRACE)["counts"][-10:, 0]
    current = Layout.contiguous(64, np.full(16, 5))
    problem = Problem(Cluster.uniform(16, 5), Demand.of(counts), current=current)
    reached = [solve(replace(problem, max_moves=moves)).objective for moves in (0, 2, 4, 8, 15)]
    assert reached[0] == pytest.approx(evaluate(problem, current).objective)
    assert reached == sorted(reached, reverse=True)
    assert reached[2] <= 1.19
    assert reached[3] <= 1.09
    assert reached[4] <= 1.01


def test_time_alone_ends_a_search_with_a_deadline_and_no_work_limit() -> None:
    loads = (np.arange(1, 49) ** -0.6 * 1e5).astype(np.int64)
    hard = Problem(Cluster.uniform(27, 2), Demand.of(loads))
    assert solve(hard, parameters=SolveParameters(deadline_s=0.5)).termination is Termination.DEADLINE
    both = SolveParameters(deadline_s=60, work_limit=500)
    assert solve(hard, parameters=both).termination is Termination.WORK_LIMIT
    guarded = SolveParameters().within(60)
    assert solve(hard, parameters=guarded).layout == solve(hard).layout
