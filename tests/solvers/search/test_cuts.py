"""Known cuts: what they promise of a candidate holds for its split, and what is kept is what would be found anew."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.instances import problems, random_layout

from moeplan.solvers import Problem
from moeplan.solvers.problem.limit_kernels import limit_arrays
from moeplan.solvers.search.cuts import bounds_after, keep_change, keep_cut, no_cuts, weigh
from moeplan.solvers.search.exchange import apply, draft_of, exchange_of, undo
from moeplan.solvers.search.local import Scenarios, optimal_splits, scale_of
from moeplan.solvers.search.random import next_random, seeded


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**31))
def test_no_split_is_better_than_the_cuts_promise(problem: Problem, seed: int) -> None:
    devices, speed = problem.devices, problem.cluster.speed
    scenarios = Scenarios(problem.loads, problem.demand.weights, 1.0, speed, problem.mean_level)
    scale = scale_of(problem.mean_level)
    draft = draft_of(random_layout(problem, seed).slots.copy(), problem.experts)
    cuts, anew = no_cuts(devices, problem.loads), no_cuts(devices, problem.loads)
    whole, level = np.empty((2, *cuts.level.shape), np.bool_), np.empty(cuts.level.shape)
    bound = np.ones(len(problem.loads))
    weigh(draft, cuts)
    state = seeded(seed)
    for _ in range(60):
        p, q = next_random(state) % len(draft.slots), next_random(state) % len(draft.slots)
        allowed, x = exchange_of(p, q, draft, limit_arrays(problem.limits), state)
        if not allowed:
            continue
        apply(x, draft)
        bounds_after(x, draft, cuts, whole, level, bound)
        splits = optimal_splits(draft.slots.reshape(devices, -1).copy(), scenarios)
        assert (bound <= splits.imbalance + 1e-9).all()
        if next_random(state) % 2:
            keep_change(x, whole, level, cuts)
        else:
            undo(x, draft)
        for s in range(len(bound)):
            keep_cut(s, splits.tight[s], scale[s], draft, speed, cuts)
        anew.inside[:], anew.unit[:] = cuts.inside, cuts.unit
        weigh(draft, anew)
        np.testing.assert_array_equal(cuts.whole, anew.whole)
        np.testing.assert_allclose(cuts.level, anew.level, atol=1e-9)
