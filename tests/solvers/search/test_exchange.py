"""One step of a search: what it allows keeps every limit, and its undoing leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.instances import problems, random_layout

from moeplan.solvers import Constraints, ExpertSpec, Problem
from moeplan.solvers.problem.arrays import Bool, Int32
from moeplan.solvers.problem.limit_kernels import arrivals_of, limit_arrays
from moeplan.solvers.problem.limits import broken
from moeplan.solvers.search.exchange import apply, change_of, draft_of, exchange_of, record, undo, within
from moeplan.solvers.search.random import next_random, seeded


def pairs(where: Bool) -> Int32:
    """int32[n, 2]: the (expert, device) pairs of a table bool[devices, experts]."""
    return np.argwhere(where)[:, ::-1].astype(np.int32)


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**31), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))
def test_a_walk_of_allowed_exchanges_keeps_every_limit(
    problem: Problem, seed: int, moves: int, per_device: int, per_node: int
) -> None:
    current = random_layout(problem, seed)
    assume((current.slots >= 0).sum() > 1)
    limits = Constraints(
        forbidden=pairs(~current.placed)[:2],
        pinned=pairs(current.placed)[:1],
        device_move_bytes=per_device,
        node_move_bytes=per_node,
    )
    problem = replace(problem, expert=ExpertSpec(weight_bytes=1), current=current, max_moves=moves, constraints=limits)
    arrays = limit_arrays(problem.limits)
    draft = draft_of(current.slots.copy(), problem.experts)
    arrivals = arrivals_of(draft.on, arrays)
    state = seeded(seed)
    for _ in range(200):
        p, q = next_random(state) % len(draft.slots), next_random(state) % len(draft.slots)
        allowed, x = exchange_of(p, q, draft, arrays, state)
        if not allowed:
            continue
        change = change_of(x, arrays)
        before = draft.slots.copy(), draft.replicas.copy(), draft.on.copy()
        kept = within(x, change, arrays, arrivals)
        apply(x, draft)
        assert kept == (broken(problem.limits, draft.on) is None)
        if kept:
            record(x, change, arrays, arrivals)
            for counted, anew in zip(arrivals, arrivals_of(draft.on, arrays), strict=True):
                np.testing.assert_array_equal(counted, anew)
        else:
            undo(x, draft)
            for now, then in zip((draft.slots, draft.replicas, draft.on), before, strict=True):
                np.testing.assert_array_equal(now, then)
        for expert in range(problem.experts):
            hosts = draft.host[expert, : draft.replicas[expert]]
            np.testing.assert_array_equal(np.sort(hosts), np.flatnonzero(draft.slots == expert))
        np.testing.assert_array_equal(draft.used, (draft.slots.reshape(problem.devices, -1) >= 0).sum(axis=1))
        assert (draft.used <= problem.capacity).all()
        assert (draft.replicas > 0).all()
