"""Constraints: every kind against brute force, as a random property, and infeasible with an explanation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.instances import optimum

from moeplan.solvers import (
    Cluster,
    Constraints,
    Demand,
    ExpertSpec,
    InfeasibleError,
    Layout,
    Problem,
    ProblemError,
    SolveParameters,
    available_policies,
    evaluate,
    share_slots,
    solve,
)
from moeplan.solvers.plan.cost import memory_use
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.limits import broken
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.rules import split

EXACT = SolveParameters(work_limit=60_000, target_gap=0.0)
KINDS = ("forbidden", "pinned", "domain", "groups", "min_tokens", "device_bytes", "node_bytes", "memory", "failed")


@st.composite
def constrained(draw: st.DrawFn, kind: str) -> Problem:
    """Small problems under one kind of constraint, together with unequal devices."""
    devices, experts = draw(
        st.sampled_from([(3, 4), (4, 4)] if kind in ("domain", "groups", "node_bytes") else [(3, 4)])
    )
    slots = draw(st.lists(st.integers(1, 2), min_size=devices, max_size=devices))
    while sum(slots) < experts + 1:
        slots[slots.index(min(slots))] += 1
    speed = [1.0] * devices if draw(st.booleans()) else [1.0, 2.0, 1.5, 1.0][:devices]
    tokens = draw(st.lists(st.sampled_from([0, 2, 30, 100, 101, 499]), min_size=2 * experts, max_size=2 * experts))
    loads = np.array(tokens).reshape(2, 1, experts)[: draw(st.integers(1, 2))]
    loads[:, 0, 0] += 7
    cluster = Cluster(np.array(slots), np.arange(devices, dtype=np.int32) // 2, np.array(speed))
    current = Layout.contiguous(experts, np.array(slots))
    settings_: dict[str, Any] = {}
    expert = ExpertSpec(weight_bytes=10)
    limits: dict[str, Any] = {}
    pair = (draw(st.integers(0, experts - 1)), draw(st.integers(0, devices - 1)))
    if kind == "forbidden":
        limits["forbidden"] = np.array([pair, ((pair[0] + 1) % experts, pair[1])])
    elif kind == "pinned":
        limits["pinned"] = np.array([pair])
    elif kind == "domain":
        limits["domain"] = np.array([0, 0, 1, 1][:devices])
    elif kind == "groups":
        settings_["groups"], limits["groups_on_node"] = 2, True
    elif kind == "min_tokens":
        limits["min_tokens"] = draw(st.sampled_from([1, 60, 400]))
    elif kind == "device_bytes":
        settings_["current"], limits["device_move_bytes"] = current, draw(st.sampled_from([0, 10, 25]))
    elif kind == "node_bytes":
        settings_["current"], limits["node_move_bytes"] = current, draw(st.sampled_from([0, 10, 25]))
    elif kind == "memory":
        expert = ExpertSpec(weight_bytes=40, state_bytes=10, activation_bytes=2)
        total = int(loads.sum(axis=(1, 2)).max())
        memory = [50 * s + total * draw(st.sampled_from([1, 2, 3])) for s in slots]
        cluster = replace(cluster, memory_bytes=np.array(memory))
    else:
        settings_["current"] = current
    problem = Problem(cluster, Demand.of(loads), expert, constraints=Constraints(**limits), **settings_)
    if kind == "failed":
        problem = problem.without([pair[1]])
    return problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["hybrid", "ilp"])
@settings(max_examples=8, derandomize=True)
@given(data=st.data())
def test_small_problems_are_solved_to_the_optimum(kind: str, policy: str, data: st.DataObject) -> None:
    try:
        problem = data.draw(constrained(kind))
    except InfeasibleError:  # refused at the edge: see the tests of explanations
        return
    best = optimum(problem)
    if best == np.inf:
        with pytest.raises(InfeasibleError):
            solve(problem, policy=policy, parameters=EXACT)
        return
    plan = solve(problem, policy=policy, parameters=EXACT)
    assert broken(problem.limits, plan.layout.placed) is None
    assert plan.mean_imbalance == pytest.approx(best, rel=1e-3)
    assert plan.bound <= best * (1 + 1e-9)


@settings(max_examples=25, derandomize=True)
@given(st.integers(0, 10**6), st.data())
def test_large_problems_respect_every_limit(seed: int, data: st.DataObject) -> None:
    """E 32 on 8 devices in 2 nodes, with any mix of limits: the plan holds all, and a search only improves it."""
    rng = np.random.default_rng(seed)
    experts, devices, slots = 32, 8, 6
    loads = rng.integers(0, 2000, (2, devices, experts)) * (rng.random(experts) < 0.4) + 5
    limits: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if data.draw(st.booleans()):
        limits["forbidden"] = np.stack([rng.integers(0, experts, 12), rng.integers(0, devices, 12)], axis=1)
    if data.draw(st.booleans()):
        limits["domain"] = np.arange(devices) // 4
    if data.draw(st.booleans()):
        limits["min_tokens"] = 2000
    cluster = Cluster.uniform(devices, slots, nodes=2)
    if data.draw(st.booleans()):
        more["current"] = Layout.contiguous(experts, cluster.slots)
        limits["device_move_bytes"] = 30
    if data.draw(st.booleans()):
        more["groups"], limits["groups_on_node"] = 8, True
    problem = Problem(cluster, Demand.of(loads), ExpertSpec(weight_bytes=10), constraints=Constraints(**limits), **more)
    plan = solve(problem, parameters=SolveParameters(work_limit=1500))
    again = solve(problem, parameters=SolveParameters(work_limit=1500))
    unsearched = solve(problem, parameters=SolveParameters(work_limit=0))
    assert broken(problem.limits, plan.layout.placed) is None
    assert np.array_equal(plan.layout.slots, again.layout.slots)
    assert plan.mean_imbalance <= unsearched.mean_imbalance * (1 + 1e-12)
    assert (plan.split.quota.sum(axis=(1, 2)) == loads.sum(axis=(1, 2))).all()


def test_failed_devices_are_replaced_with_the_fewest_moves() -> None:
    experts, devices = 64, 16
    rng = np.random.default_rng(3)
    cluster = Cluster.uniform(devices, 6, nodes=2)
    first = solve(Problem(cluster, Demand.of(rng.integers(1, 1000, (1, devices, experts)))))
    demand = Demand.of(rng.integers(1, 1000, (1, devices, experts)))
    failed = Problem(cluster, demand, current=first.layout).without([2, 9])
    lost = int((~failed.limits.held.any(axis=0)).sum())
    plan = solve(replace(failed, max_moves=lost))
    assert (plan.layout.slots[[2, 9]] == -1).all()
    assert plan.moves is not None
    assert len(plan.moves) <= lost
    assert (plan.moves.source == -1).sum() == lost  # these come from a checkpoint
    if lost:
        with pytest.raises(InfeasibleError, match=r"max_moves = .* must be loaded anew"):
            replace(failed, max_moves=lost - 1)


def test_groups_stay_on_a_node_and_balance_over_nodes() -> None:
    loads = np.array([[900, 1, 1, 1, 1, 1, 1, 1, 800, 1, 1, 1, 1, 1, 1, 1]])
    problem = Problem(
        Cluster.uniform(4, 5, nodes=2),
        Demand.of(loads),
        groups=4,
        constraints=Constraints(groups_on_node=True),
    )
    plan = solve(problem, parameters=EXACT)
    first, second = plan.layout.placed[:2], plan.layout.placed[2:]
    node = np.stack([first[0] | first[1], second[0] | second[1]])
    assert (node.reshape(2, 4, 4).any(axis=2).sum(axis=0) == 1).all()
    assert node[0, 0] != node[0, 8]  # the two hot groups
    assert plan.mean_imbalance == pytest.approx(904 / 2 / (loads.sum() / 4), rel=0.02)


def test_memory_decides_between_replicas_and_tokens() -> None:
    """A device with little memory holds one replica rather than two, and so has room for ten tokens more."""
    cluster = Cluster(np.array([2, 2]), np.zeros(2, int), np.ones(2), memory_bytes=np.array([20 + 30, 20 + 200]))
    spec = ExpertSpec(weight_bytes=10, activation_bytes=1)
    problem = Problem(cluster, Demand.of(np.array([[60, 60]])), spec)
    plan = solve(problem, parameters=EXACT)
    assert plan.split.device_loads().tolist() == [[40, 80]]
    assert (memory_use(problem, plan.layout, plan.split) <= [50, 220]).all()
    tight = replace(problem, cluster=replace(cluster, memory_bytes=np.array([50, 99])))
    with pytest.raises(InfeasibleError, match="memory"):
        solve(tight, parameters=EXACT)


def problem_with(loads: Int64 | None = None, **limits: Any) -> Problem:
    more = {k: limits.pop(k) for k in ("groups", "current", "expert", "max_moves") if k in limits}
    cluster = limits.pop("cluster", Cluster.uniform(4, 2, nodes=2))
    return Problem(
        cluster,
        Demand.of(np.arange(1, 7)[None] if loads is None else loads),
        constraints=Constraints(**limits),
        **more,
    )


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"forbidden": [[9, 0]]}, r"forbidden\[0\] = expert 9, device 0: must be 0..5 and 0..3"),
        ({"forbidden": [0, 1]}, "forbidden = array of shape"),
        ({"pinned": [[0, 1]], "forbidden": [[0, 1]]}, "expert 0 to device 1: is forbidden there"),
        ({"pinned": [[0, 1], [1, 1], [2, 1]]}, "3 experts to device 1: has room for 2"),
        ({"forbidden": [[0, d] for d in range(4)]}, r"experts \[0\] only on devices \[\].*allow more pairs"),
        (
            {"forbidden": [[e, d] for e in range(3) for d in (1, 2, 3)]},
            r"experts \[0, 1, 2\] only on devices \[0\]: 3 experts, but 2 slots",
        ),
        ({"domain": [0, 1]}, "domain = 2 values: must have one per device"),
        ({"groups_on_node": True}, "needs `groups`"),
        ({"groups_on_node": True, "groups": 2, "domain": [0, 1, 0, 1]}, "a node must lie within one domain"),
        ({"groups_on_node": True, "groups": 3, "cluster": Cluster.uniform(6, 1, nodes=6)}, "room for 0"),
        ({"device_move_bytes": 5}, "needs `current`"),
        ({"min_tokens": -1}, "must be 0 to"),
        ({"min_tokens": 10**6, "pinned": [[0, 0], [0, 1]]}, "allows 1 replicas; unpin"),
        ({"domain": [0, 0, 1, 1], "pinned": [[0, 0], [0, 2]]}, "must be on one domain"),
    ],
)
def test_mistakes_and_contradictions_are_explained(limits: dict[str, Any], says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        problem_with(**limits)


def test_limits_that_only_contradict_together_are_proven_infeasible() -> None:
    """Six experts fill four devices of two slots less two; each region has room, pairs have room, both do not."""
    layout = Layout(np.array([[0, 1], [2, 3], [4, 5], [0, 1]]), 6)
    problem = problem_with(
        current=layout,
        expert=ExpertSpec(weight_bytes=1),
        device_move_bytes=0,
        forbidden=[[2, 1]],
    )
    with pytest.raises(InfeasibleError, match="no layout satisfies them together"):
        solve(problem)


@pytest.mark.parametrize("tokens", [0, 10**12])
def test_a_layout_that_few_satisfy_is_found_whatever_the_demand(tokens: int) -> None:
    problem = Problem(
        Cluster(np.array([3, 2, 2]), np.array([0, 0, 1]), np.ones(3)),
        Demand.of(tokens * np.array([3, 1, 2, 1])),
        current=Layout(np.array([[1, 3, 0], [2, -1, -1], [-1, -1, -1]]), 4),
        max_moves=2,
        tail=0.5,
        constraints=Constraints(domain=np.array([0, 0, 1]), pinned=np.array([[1, 1]]), forbidden=np.array([[0, 0]])),
    )
    assert solve(problem).moves is not None
    with pytest.raises(InfeasibleError, match="no layout satisfies them together"):
        solve(replace(problem, max_moves=1))


def test_policies_that_cannot_honour_a_limit_refuse_it() -> None:
    problem = problem_with(np.arange(1, 25).reshape(1, 4, 6), forbidden=[[0, 0]])
    for name, policy in available_policies().items():
        if "forbidden" in policy.honours:
            assert not solve(problem, policy=name).layout.placed[0, 0]
        else:
            with pytest.raises(ProblemError, match=rf"policy {name} cannot honour it; use .*hybrid"):
                solve(problem, policy=name)


def test_a_given_layout_is_judged_by_the_same_limits() -> None:
    problem = problem_with(pinned=[[5, 0]])
    with pytest.raises(ProblemError, match="expert 5 on device 0: must be there"):
        evaluate(problem, Layout.contiguous(6, problem.capacity))
    assert split(problem, Layout.contiguous(6, problem.capacity), SplitRule.EVEN).quota.sum() == 21


def test_slots_are_shared_over_layers_for_the_least_sum() -> None:
    """Two flat layers and a skewed one: the budget goes where it helps, as trying all divisions confirms."""
    rng = np.random.default_rng(5)
    layers = [
        rng.integers(90, 110, (1, 1, 12)),
        rng.integers(90, 110, (1, 1, 12)),
        rng.integers(1, 1000, (1, 1, 12)) ** 2,
    ]
    problems = [Problem(Cluster.uniform(4, 4), Demand.of(loads)) for loads in layers]
    shares = share_slots(problems, 11)
    assert shares.slots.sum() <= 11
    assert shares.slots.tolist() == [3, 3, 4]  # four spare slots are enough for four devices (R >= D - 1)
    best = np.inf
    for slots in itertools.product((3, 4, 5), repeat=3):
        if sum(slots) <= 11:
            plans = [solve(replace(p, cluster=Cluster.uniform(4, n))) for p, n in zip(problems, slots, strict=True)]
            best = min(best, sum(float(p.split.device_loads().max()) for p in plans))
    assert shares.level == pytest.approx(best)
    assert shares.level <= shares.even_level
    with pytest.raises(InfeasibleError, match="needs 9 slots per device over 3 layers"):
        share_slots(problems, 8)
