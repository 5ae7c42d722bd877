"""Policies: what every one of them promises, and fidelity to the published ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.instances import problems, random_layout

from moeplan.solvers import (
    Cluster,
    Demand,
    Layout,
    Problem,
    ProblemError,
    SolveParameters,
    Termination,
    available_policies,
    evaluate,
    solve,
    solve_anytime,
)
from moeplan.solvers.construct.replica_counts import adams_replicas
from moeplan.solvers.policies.flexmoe import flexmoe
from moeplan.solvers.policies.symi import proportional
from moeplan.solvers.problem.moves import keep_slots, relabel
from moeplan.solvers.problem.split_rules import SplitRule

QUICK = SolveParameters(work_limit=60)
POLICIES = sorted(available_policies())
BASELINES = [name for name in POLICIES if name not in ("hybrid", "ilp", "traffic")]  # ilp may be exact


@settings(max_examples=60)
@given(problems(), st.sampled_from(POLICIES), st.integers(0, 2**32 - 1))
def test_every_policy_makes_valid_plans(problem: Problem, policy: str, seed: int) -> None:
    assume(policy != "traffic" or problem.demand.sources > 1 or problem.devices == 1)
    first = solve(problem, policy=policy, parameters=QUICK)
    current = random_layout(problem, seed)
    second = solve(Problem(problem.cluster, problem.demand, current=current), policy=policy, parameters=QUICK)
    for plan in (first, second):
        # `Layout` itself refuses missing experts and duplicates.
        assert ((plan.layout.slots >= 0).sum(axis=1) <= problem.capacity).all()
        assert (plan.split.quota.sum(axis=(1, 2)) == problem.loads.sum(axis=1)).all()
    assert second.moves is not None
    arrived = {(int(d), int(e)) for d, e in zip(second.moves.device, second.moves.expert, strict=True)}
    assert arrived == {(d, e) for d, e in np.argwhere(second.layout.placed & ~current.placed)}
    assert all(current.placed[s, e] for s, e in zip(second.moves.source, second.moves.expert, strict=True))


@settings(max_examples=80)
@given(problems(), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_a_move_limit_is_hard(problem: Problem, limit: int, seed: int) -> None:
    current = random_layout(problem, seed)
    limited = Problem(problem.cluster, problem.demand, current=current, max_moves=limit)
    plan = solve(limited, parameters=QUICK)
    assert plan.moves is not None
    assert len(plan.moves) <= limit
    before = evaluate(limited, current)
    assert plan.mean_imbalance <= before.mean_imbalance * (1 + 1e-12)


@settings(max_examples=60)
@given(problems(max_devices=5, max_experts=8), st.sampled_from(SplitRule))
def test_hybrid_is_no_worse_than_any_baseline_under_any_split_rule(problem: Problem, rule: SplitRule) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1 or not rule.needs_sources)
    asked = replace(problem, split_rule=rule)
    # With any gap allowed, the search may stop short of a baseline by that much.
    ours = solve(asked, parameters=SolveParameters(work_limit=400, target_gap=0.0))
    assert ours.split.rule is rule
    for policy in BASELINES:
        theirs = solve(asked, policy=policy, parameters=QUICK)
        assert ours.mean_imbalance <= theirs.mean_imbalance * (1 + 1e-9) + 1e-9, policy


def test_a_rule_that_a_policy_cannot_plan_for_is_refused() -> None:
    problem = Problem(Cluster.uniform(4, 2), Demand.of([9, 8, 7, 5, 3]), split_rule=SplitRule.LITE)
    with pytest.raises(ProblemError, match=r"split_rule = lite: policy ilp plans for even, optimal only; use .*hybrid"):
        solve(problem, policy="ilp")
    with pytest.raises(ProblemError, match="policy traffic plans for home only"):
        solve(problem, policy="traffic")
    with pytest.raises(ProblemError, match="split_rule = home: needs the demand of each source"):
        replace(problem, split_rule=SplitRule.HOME)
    with pytest.raises(ProblemError, match="split_rule = 'fair': must be one of even, lite, optimal, home, local"):
        Problem(Cluster.uniform(4, 2), Demand.of([9]), split_rule="fair")  # type: ignore[arg-type]


def test_a_plan_says_why_its_search_ended() -> None:
    loads = (np.arange(1, 49) ** -0.6 * 1e5).astype(np.int64)
    hard = Problem(Cluster.uniform(27, 2), Demand.of(loads))
    easy = Problem(Cluster.uniform(4, 4), Demand.of(loads[:12]))
    assert solve(easy).termination is Termination.PROVED
    assert solve(hard, parameters=SolveParameters(target_gap=0.5)).termination is Termination.TARGET_GAP
    assert solve(hard, parameters=SolveParameters(work_limit=500)).termination is Termination.WORK_LIMIT
    hasty = SolveParameters(deadline_s=0.05, work_limit=10**9, target_gap=0)
    assert solve(hard, parameters=hasty).termination is Termination.DEADLINE
    assert solve(hard, policy="eplb").termination is Termination.NOTHING_LEFT
    assert evaluate(hard, solve(hard, policy="eplb").layout).termination is Termination.GIVEN
    *on_the_way, last = solve_anytime(hard, parameters=SolveParameters(work_limit=500))
    assert {plan.termination for plan in on_the_way} == {Termination.UNFINISHED}
    assert last.termination is Termination.WORK_LIMIT
    assert last.layout == solve(hard, parameters=SolveParameters(work_limit=500)).layout


def test_a_plan_is_a_line() -> None:
    plan = solve(Problem(Cluster.uniform(4, 2), Demand.of([9, 8, 7, 5, 3])))
    assert repr(plan).startswith("Plan(hybrid: 5 experts on 4 devices, optimal split, imbalance 1.0")
    assert "\n" not in repr(plan)


def test_same_plan_in_every_process() -> None:
    script = """
import numpy as np
from moeplan.solvers import *
rng = np.random.default_rng(5)
tokens = rng.integers(0, 300, (4, 8, 24))
problem = Problem(Cluster.uniform(8, 4, nodes=2), Demand.of(tokens))
for policy in available_policies():
    plan = solve(problem, policy=policy, parameters=SolveParameters(work_limit=300, seed=3))
    print(policy, plan.layout.slots.tobytes().hex(), plan.split.quota.tobytes().hex(), plan.mean_imbalance.hex())
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("\n") == len(POLICIES)


@pytest.mark.timeout(120)  # without the deadline it would search for hours
def test_the_seed_matters_and_the_deadline_is_kept() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3_000, (6, 8, 64))
    problem = Problem(Cluster.uniform(8, 9), Demand.of(tokens))
    solve(problem, parameters=SolveParameters(work_limit=10))
    layouts = {solve(problem, parameters=SolveParameters(work_limit=300, seed=s)).layout for s in range(3)}
    assert len(layouts) > 1
    solve(problem, parameters=SolveParameters(deadline_s=0.05, work_limit=10**9, target_gap=0))


def test_eplb_readme_example() -> None:
    # The example of the README of deepseek-ai/EPLB, layer 0 as printed there.
    loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    problem = Problem(Cluster.uniform(8, 2, nodes=2), Demand.of(loads), groups=4)
    slots = solve(problem, policy="eplb").layout.slots
    assert slots.reshape(-1).tolist() == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]


def test_flashlb_example() -> None:
    # vLLM-Ascend FlashLB's example: EPLB 232 with even splits, 181.25 = W / D by splitting freely.
    loads = [600, 560, 120, 120, 20, 10, 10, 10]
    problem = Problem(Cluster.uniform(8, 2), Demand.of(loads))
    eplb = solve(problem, policy="eplb")
    assert eplb.mean_imbalance * 181.25 == pytest.approx(232)
    assert evaluate(problem, eplb.layout, "optimal").split.device_loads().max() == 199  # 198.3, in whole tokens
    ours = solve(problem)
    assert ours.split.device_loads().max() == 182  # 181.25 in whole tokens
    assert ours.gap == pytest.approx(0)


def test_eplb_never_doubles_an_expert_on_a_device() -> None:
    # One expert takes all: the original stacks its replicas on the same devices (EPLB issue 22).
    loads = np.array([10_000] + [1] * 15)
    plan = solve(Problem(Cluster.uniform(8, 4), Demand.of(loads)), policy="eplb")
    assert plan.mean_imbalance < 1.01


def test_symi_algorithm_1_by_hand() -> None:
    # Goals 4.8, 2.4, 0.8, 0 of 8 slots: floors of max(goal, 1) are 4, 2, 1, 1, exactly 8.
    assert proportional(np.array([60, 30, 10, 0]), 8, 4).tolist() == [4, 2, 1, 1]
    # Goals 7.2, 0.6, 0.2: 7, 1, 1 is one too many; the largest excess with more than one replica gives one back.
    assert proportional(np.array([90, 8, 2]), 8, 8).tolist() == [6, 1, 1]
    # No load at all, and more replicas than devices: neither divides by zero nor loops.
    assert proportional(np.zeros(4, int), 8, 2).tolist() == [2, 2, 2, 2]
    assert proportional(np.array([100, 0]), 8, 3).tolist() == [3, 3]


def test_laer_keeps_the_cheaper_candidate() -> None:
    # Equal loads: even counts are perfect; a hot expert: the queue is.
    for loads, replicas in (([10, 10, 10, 10], [2, 2, 2, 2]), ([70, 10, 10, 10], [5, 1, 1, 1])):
        layout = solve(Problem(Cluster.uniform(8, 1), Demand.of(loads)), policy="laer").layout
        assert layout.replicas.tolist() == replicas


def test_laer_spreads_replicas_over_nodes() -> None:
    tokens = np.full((8, 4), 5)
    layout = solve(Problem(Cluster.uniform(8, 1, nodes=2), Demand.of(tokens)), policy="laer").layout
    for expert in range(4):
        hosts = np.argwhere(layout.slots == expert)[:, 0]
        assert {int(d) // 4 for d in hosts} == {0, 1}


def test_flexmoe_waits_for_its_trigger_and_then_expands() -> None:
    cluster = Cluster.uniform(4, 2)
    current = Layout(np.array([[0, 1], [1, 0], [2, 3], [3, 2]]), 4)
    calm = Problem(cluster, Demand.of([10, 10, 10, 10]), current=current)
    assert solve(calm, policy="flexmoe").layout == current
    hot = Problem(cluster, Demand.of([90, 10, 10, 10]), current=current)
    plan = solve(hot, policy="flexmoe")
    assert plan.layout.replicas[0] > 2
    assert plan.mean_imbalance < evaluate(hot, current, "even").mean_imbalance


def test_flexmoe_is_as_wide_as_the_devices_that_are_left() -> None:
    cluster = Cluster(slots=np.array([1, 2, 3]), node=np.zeros(3, np.int64), speed=np.ones(3))
    current = Layout(np.array([[2, -1, -1], [0, 1, -1], [1, 2, 0]], np.int32), 3)
    left = Problem(cluster, Demand.of([[1, 1, 0]]), current=current).without([2])
    assert flexmoe(left, SolveParameters()).slots.shape == (3, 2)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 8), st.integers(1, 4))
def test_adams_is_the_greedy_it_replaces(loads: list[int], extra: int, most: int) -> None:
    replicas = np.ones(len(loads), int)
    for _ in range(extra):
        share = np.where(replicas < most, np.array(loads) / replicas, -1)
        if share.max() < 0:
            break
        replicas[share.argmax()] += 1
    ours = adams_replicas(np.array(loads, np.float64), len(loads) + extra, most)
    assert ours.tolist() == replicas.tolist()


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_renaming_devices_keeps_most_replicas(problem: Problem, one: int, two: int) -> None:
    current, new = random_layout(problem, one), random_layout(problem, two)
    renamed = relabel(current, new.slots, problem.capacity, problem.cluster)
    before = evaluate(problem, new).split.device_loads() / problem.cluster.speed
    layout = Layout(renamed, problem.experts)
    assert ((layout.slots >= 0).sum(axis=1) <= problem.capacity).all()
    after = evaluate(problem, layout).split.device_loads() / problem.cluster.speed
    assert sorted(before.max(axis=1)) == pytest.approx(sorted(after.max(axis=1)))
    kept = (layout.placed & current.placed).sum()
    assert kept >= (new.placed & current.placed).sum()
    # Renaming a layout to itself moves nothing.
    same = Layout(relabel(current, current.slots, problem.capacity, problem.cluster), problem.experts)
    assert (same.placed == current.placed).all()


def test_slots_are_kept_in_place() -> None:
    slots = np.array([[3, 1, 0], [2, 4, 5]], np.int32)
    keep_slots(np.array([[0, 1, 2], [5, 4, 3]], np.int32), slots)
    assert slots.tolist() == [[0, 1, 3], [5, 4, 2]]


def test_laer_queue_goes_in_steps_of_the_nodes_as_the_artefact_does() -> None:
    # 20 experts on 2 nodes of 16 slots: too few for one each per node; from 1 replica up to 2, 4, 6.
    tokens = np.tile([50, 40, 30, 20] + [5] * 16, (16, 1))
    problem = Problem(Cluster.uniform(16, 2, nodes=2), Demand.of(tokens))
    assert solve(problem, policy="laer").layout.replicas.tolist() == [6, 4, 4, 2] + [1] * 16
