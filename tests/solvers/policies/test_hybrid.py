"""The default policy: exact on small problems, whatever they limit, and better with every move that it may make."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.instances import all_layouts, optimum, problems, random_layout, small_problems

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
    SplitRule,
    Termination,
    available_policies,
    evaluate,
    share_slots,
    solve,
    solve_anytime,
)
from moeplan.solvers.construct.tiers import tiered
from moeplan.solvers.exact.of_problem import any_layout
from moeplan.solvers.policies import hybrid
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.limits import broken

TRACE = Path(__file__).parents[3] / "examples" / "traces" / "moe-e64-cut.npz"


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(small_problems(scenarios=3), st.booleans())
def test_a_plan_for_one_load_vector_is_as_good_on_it_as_one_that_knows_no_other(
    problem: Problem, several: bool
) -> None:
    tokens = problem.demand.tokens if several else problem.demand.tokens[:1]
    wide = solve(replace(problem, demand=Demand.of(tokens)))
    only = solve(replace(problem, demand=Demand.of(tokens, spread=0)))
    assert wide.bound == only.bound
    if len(tokens) == 1:
        assert wide.objective <= max(only.objective, wide.bound * (1 + SolveParameters().target_gap))
    else:
        assert np.array_equal(wide.layout.slots, only.layout.slots)


def test_a_plan_for_one_load_vector_suits_the_step_after_it() -> None:
    with np.load(TRACE) as trace:
        counts = trace["counts"].sum(axis=2).astype(np.int64)
    cluster = Cluster.uniform(16, 5)
    after: dict[float, list[float]] = {0.0: [], 0.2: []}
    for step, layer in itertools.product(range(0, len(counts) - 1, 4), range(counts.shape[1])):
        for spread, found in after.items():
            plan = solve(Problem(cluster, Demand.of(counts[step, layer], spread=spread)))
            assert plan.objective <= 1.0001
            found.append(evaluate(Problem(cluster, Demand.of(counts[step + 1, layer])), plan.layout).objective)
    assert np.mean(after[0.2]) - 1 < 0.9 * (np.mean(after[0.0]) - 1)


def test_counts_at_the_limit_have_loads_near_them() -> None:
    for tokens in ([0, 0, 0], [2**52, 2**51, 2**51]):
        assert solve(Problem(Cluster.uniform(3, 2), Demand.of(tokens))).objective == pytest.approx(1)


def test_a_search_that_keeps_finding_something_leaves_work_for_the_exact_model() -> None:
    """Two bursts in five were better than the one before, so that the search never stalled and ended at 1.275."""
    cluster = Cluster(np.array([1, 3, 2]), np.zeros(3, int), np.array([1, 2, 1.5]))
    demand = Demand(np.array([[[3, 1, 1, 0]], [[0, 0, 10, 10]]]), np.array([0.5, 0.5]))
    current = Layout.contiguous(4, cluster.slots)
    problem = Problem(cluster, demand, current=current, max_moves=3)
    assert solve(problem).objective == pytest.approx(1.2375)


def test_moves_into_empty_slots_are_made_one_by_one() -> None:
    current = Layout.contiguous(2, np.full(5, 3))
    problem = Problem(Cluster.uniform(5, 3), Demand.of([[8, 40]]), current=current, max_moves=3)
    assert solve(problem).objective == pytest.approx(solve(problem, policy="ilp").objective)
    assert solve(problem).objective == pytest.approx(1.0417, abs=1e-3)


def test_the_smallest_problems_reach_the_exact_model() -> None:
    current = Layout.partial(np.array([[0], [0], [-1], [-1]]), 1)
    tiny = Problem(Cluster.uniform(4, 1), Demand.of([[[60]]] * 3), current=current, max_moves=1)
    assert solve(tiny).objective == pytest.approx(4 / 3)
    cluster = Cluster(np.array([1, 1, 3, 1]), np.zeros(4, int), np.array([1, 3.7, 2, 1]))
    unequal = Problem(cluster, Demand.of([66, 124, 111, 137, 196]))
    for seed in range(3):
        assert solve(unequal, parameters=SolveParameters(seed=seed)).objective < 1.349


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 3, 8]), st.sampled_from([1.0, 0.5]))
def test_every_plan_of_a_search_divides_all_tokens_as_well_as_can_be(seed: int, moves: int | None, tail: float) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 500, (64, 1, 20)) * rng.lognormal(0, 1, 20).astype(np.int64)
    cluster = Cluster(rng.integers(4, 7, 6, np.int32), np.zeros(6, np.int32), rng.choice([1.0, 1.5], 6))
    problem = Problem(cluster, Demand.of(tokens), tail=tail)
    if moves is not None:
        problem = replace(problem, current=random_layout(problem, seed), max_moves=moves)
    for plan in [*solve_anytime(problem, parameters=SolveParameters(work_limit=500))]:  # and none changes afterwards
        assert plan.objective == pytest.approx(evaluate(problem, plan.layout).objective, rel=1e-12)
        filled = plan.layout.slots >= 0
        assert not plan.split.quota[:, ~filled].any()
        assert (plan.split.quota >= 0).all()
        for quota, wanted in zip(plan.split.quota, problem.loads, strict=True):
            given_out = np.bincount(plan.layout.slots[filled], weights=quota[filled], minlength=problem.experts)
            assert given_out.tolist() == wanted.tolist()


def test_few_moves_from_a_static_layout_are_worth_it() -> None:
    counts = np.load(TRACE)["counts"][-10:, 0]
    current = Layout.contiguous(64, np.full(16, 5))
    problem = Problem(Cluster.uniform(16, 5), Demand.of(counts), current=current)
    reached = [solve(replace(problem, max_moves=moves)).objective for moves in (0, 2, 4, 8, 15)]
    assert reached[0] == pytest.approx(evaluate(problem, current).objective)
    assert reached == sorted(reached, reverse=True)
    assert reached[2] <= 1.19
    assert reached[3] <= 1.07
    assert reached[4] <= 1.01


def test_time_alone_ends_a_search_with_a_deadline_and_no_work_limit() -> None:
    loads = (np.arange(1, 49) ** -0.6 * 1e5).astype(np.int64)
    hard = Problem(Cluster.uniform(27, 2), Demand.of(loads))
    assert solve(hard, parameters=SolveParameters(deadline_s=0.5)).termination is Termination.DEADLINE
    both = SolveParameters(deadline_s=60, work_limit=500)
    assert solve(hard, parameters=both).termination is Termination.WORK_LIMIT
    guarded = SolveParameters().within(60)
    assert solve(hard, parameters=guarded).layout == solve(hard).layout


@settings(max_examples=60)
@given(st.data())
def test_a_failed_device_is_planned_around_whatever_else_is_limited(data: st.DataObject) -> None:
    problem = data.draw(small_problems(scenarios=2))
    current = random_layout(problem, data.draw(st.integers(0, 999)))
    domain = (np.arange(problem.devices) // 2).astype(np.int32) if data.draw(st.booleans()) else None
    moves = data.draw(st.sampled_from([None, 2, 4]))
    memory = ExpertSpec(weight_bytes=1) if data.draw(st.booleans()) else ExpertSpec()
    try:
        # Memory for two replicas where there may be three in force.
        cluster = replace(problem.cluster, memory_bytes=np.full(problem.devices, 2))
        limits = Constraints(domain=domain)
        whole = Problem(cluster, problem.demand, memory, current=current, max_moves=moves, constraints=limits)
        left = whole.without([data.draw(st.integers(0, problem.devices - 1))])
        best = optimum(left)
    except InfeasibleError:
        return
    if not np.isfinite(best):
        with pytest.raises(InfeasibleError):
            solve(left)
        return
    plan = solve(left)
    placed = plan.layout.placed
    assert broken(left.limits, placed) is None
    assert (placed.sum(axis=1) <= left.capacity).all()
    assert plan.objective <= best * (1 + 2e-4)
    free = replace(left, constraints=Constraints(), max_moves=None)
    for policy in available_policies():
        if policy != "traffic":
            assert (solve(free, policy=policy).layout.placed.sum(axis=1) <= left.capacity).all(), policy


def test_the_last_replica_of_a_failed_device_finds_another_in_its_domain() -> None:
    current = Layout(np.array([[0, -1], [1, -1], [2, -1], [3, -1]], np.int32), 4)
    limits = Constraints(domain=np.array([0, 0, 1, 1], np.int32))
    problem = Problem(Cluster.uniform(4, 2), Demand.of([9] * 4), current=current, constraints=limits)
    plan = solve(problem.without([0]))
    assert plan.layout.replicas.min() == 1
    assert (plan.layout.slots[0] == -1).all()


def test_a_layout_in_force_may_need_more_memory_than_there_is_now() -> None:
    current = Layout(np.array([[0, 1], [1, -1]], np.int32), 2)
    problem = Problem(
        Cluster.uniform(2, 2, memory_bytes=10), Demand.of([60, 40]), ExpertSpec(weight_bytes=10), current=current
    )
    for policy in ("hybrid", "flexmoe", "ilp"):
        assert solve(problem, policy=policy).layout.replicas.tolist() == [1, 1]


def test_shared_slots_leave_failed_devices_empty() -> None:
    current = Layout(np.array([[0, 1, 2], [3, 0, -1], [1, 2, -1], [3, -1, -1]], np.int32), 4)
    problem = Problem(Cluster.uniform(4, 4), Demand.of([9, 8, 7, 6]), current=current).without([3])
    shares = share_slots([problem, problem], 7)
    for plan in shares.plans:
        assert (plan.layout.slots[3] == -1).all()
    assert shares.slots.min() >= 3  # device 0 holds three replicas now
    with pytest.raises(InfeasibleError, match="what is in force, needs 6 slots per device over 2 layers"):
        share_slots([problem, problem], 5)


def test_expert_groups_stay_on_a_node_where_that_is_possible() -> None:
    tokens = np.random.default_rng(0).integers(1, 100, 64)
    problem = Problem(Cluster.uniform(16, 5, nodes=2), Demand.of(tokens), groups=8)
    plan = solve(problem)
    on_node = plan.layout.placed.reshape(2, 8, 8, 8).any(axis=(1, 3))  # [nodes, groups]
    assert (on_node.sum(axis=0) == 1).all()
    assert plan.objective <= solve(problem, policy="eplb").objective
    crowded = Problem(Cluster.uniform(3, 5, nodes=3), Demand.of(tokens[:12]), groups=2)  # six do not fit on a node
    assert solve(crowded).objective == pytest.approx(solve(replace(crowded, groups=1)).objective)


def test_what_cannot_fit_into_memory_is_refused_at_once() -> None:
    cluster = Cluster.uniform(4, 2, memory_bytes=100)
    problem = Problem(cluster, Demand.of([[50] * 8]), ExpertSpec(weight_bytes=10, activation_bytes=1))
    with pytest.raises(InfeasibleError, match="one replica of each expert and the activations of 400 tokens need 480"):
        solve(problem, parameters=SolveParameters(deadline_s=0.01))


@settings(max_examples=100)
@given(problems(), st.sampled_from(SplitRule), st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 2]), st.booleans())
def test_a_deadline_that_is_over_at_once_still_gives_a_valid_plan(
    problem: Problem, rule: SplitRule, seed: int, moves: int | None, regions: bool
) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1 or not rule.needs_sources)
    asked = replace(problem, split_rule=rule)
    if moves is not None:
        asked = replace(asked, current=random_layout(problem, seed), max_moves=moves)
    elif regions:
        try:
            asked = replace(asked, constraints=Constraints(domain=problem.cluster.node))
        except InfeasibleError:
            assume(False)
    plan = solve(asked, parameters=SolveParameters(deadline_s=1e-9, target_gap=0.0))
    assert plan.split.rule is rule
    assert broken(asked.limits, plan.layout.placed) is None
    assert not plan.split.quota[:, plan.layout.slots < 0].any()
    for expert in range(problem.experts):
        of_expert = plan.split.quota[:, plan.layout.slots == expert].sum(axis=1)
        assert (of_expert == problem.loads[:, expert]).all()


@pytest.mark.parametrize("rule", [SplitRule.OPTIMAL, SplitRule.EVEN, SplitRule.LITE])
@pytest.mark.parametrize("regions", [False, True])
def test_where_nothing_fits_no_layout_is_judged_for_which_there_is_no_time(
    monkeypatch: pytest.MonkeyPatch, rule: SplitRule, regions: bool
) -> None:
    judged = []

    def nothing_fits(problem: Problem, slots: Int32, end: float = NEVER) -> tuple[float, None]:
        judged.append(slots)
        time.sleep(2 * hybrid.LAST_RESORT_S)
        return np.inf, None

    monkeypatch.setattr(hybrid, "judged", nothing_fits)
    cluster = Cluster.uniform(4, 4, nodes=2, memory_bytes=1_000)
    demand = Demand.of(np.random.default_rng(0).integers(1, 9, (3, 4, 10)))
    limits = Constraints(domain=cluster.node) if regions else Constraints()
    problem = Problem(cluster, demand, ExpertSpec(weight_bytes=1, activation_bytes=1), constraints=limits)
    with pytest.raises(ProblemError, match="no layout was found in time"):
        solve(replace(problem, split_rule=rule), parameters=SolveParameters(deadline_s=1e-3))
    assert len(judged) == 1


def test_a_layout_is_cut_to_few_moves_in_one_way_only_where_that_ends_late(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def slowly(problem: Problem, slots: Int32, end: float = NEVER) -> tuple[float, None]:
        judged.append(slots)
        time.sleep(0.6 if len(judged) > 1 else 0.0)  # all but the layout in force
        return 2.0 - 0.1 * len(judged), None

    monkeypatch.setattr(hybrid, "judged", slowly)
    demand = Demand.of(np.random.default_rng(0).zipf(1.5, (2, 1, 24)))
    problem = Problem(Cluster.uniform(8, 4), demand, current=Layout.contiguous(24, np.full(8, 4)), max_moves=3)
    solve(problem, parameters=SolveParameters(deadline_s=0.5))
    assert len(judged) <= 2


@settings(max_examples=15)
@given(small_problems(scenarios=2), st.integers(0, 999), st.sampled_from([None, 1, 3]), st.sampled_from([1.0, 0.5]))
def test_even_splits_are_planned_for_as_well_as_by_brute_force(
    problem: Problem, seed: int, moves: int | None, tail: float
) -> None:
    # Sixty times the tokens, so that each of two to six replicas has a whole share.
    demand = Demand(60 * problem.demand.tokens, problem.demand.weights)
    even = replace(problem, demand=demand, split_rule=SplitRule.EVEN, tail=tail)
    if moves is not None:
        even = replace(even, current=random_layout(problem, seed), max_moves=moves)
    tables = (
        layout
        for used in itertools.product(*(range(room + 1) for room in problem.capacity))
        if sum(used) >= problem.experts
        for layout in all_layouts(problem.experts, np.array(used, np.int32))
    )
    allowed = (layout for layout in tables if broken(even.limits, layout.placed) is None)
    best = min(evaluate(even, layout).objective for layout in allowed)
    for policy in ("hybrid", "ilp"):
        plan = solve(even, policy=policy)
        assert plan.bound <= best * (1 + 1e-9)
        assert plan.objective <= best * (1 + 3e-4)


def test_an_even_split_fits_the_memory_where_it_can() -> None:
    cluster = Cluster.uniform(3, 3, memory_bytes=470)
    loads, expert = Demand.of([400, 100, 100, 50]), ExpertSpec(weight_bytes=100, activation_bytes=1)
    for policy in ("hybrid", "ilp"):
        plan = solve(Problem(cluster, loads, expert, split_rule=SplitRule.EVEN), policy=policy)
        assert plan.objective == pytest.approx(225 / (650 / 3), abs=1e-3)


def test_an_even_split_keeps_replicas_in_their_domains_from_a_layout_in_force() -> None:
    cluster, current = (
        Cluster(np.array([3, 1]), np.zeros(2, int), np.ones(2)),
        Layout(np.array([[1, 2, -1], [0, -1, -1]]), 3),
    )
    kept = Constraints(domain=np.array([0, 1]), pinned=np.array([[2, 0]]))
    demand = Demand.of([100, 7, 0])
    problem = Problem(cluster, demand, current=current, max_moves=1, constraints=kept, split_rule=SplitRule.EVEN)
    assert solve(problem).objective == pytest.approx(100 / 53.5)


@pytest.mark.parametrize("rule", [SplitRule.EVEN, SplitRule.OPTIMAL])
def test_no_bound_leaves_out_layouts_that_tear_groups_apart(rule: SplitRule) -> None:
    cluster = Cluster(np.array([2, 2, 1]), np.array([0, 0, 1]), np.ones(3))
    problem = Problem(cluster, Demand.of([997, 997, 100, 0]), groups=2, split_rule=rule)
    apart = evaluate(problem, Layout(np.array([[0, 3], [1, 2], [0, -1]]), 4))
    plan = solve(problem)
    assert plan.bound <= apart.objective


def test_a_preference_for_whole_groups_proves_nothing_about_others() -> None:
    """Groups of 90 and 10 tokens on two nodes: kept whole 1.8 is the best, torn apart 1.0."""
    problem = Problem(Cluster.uniform(4, 2, nodes=2), Demand.of([45, 45, 5, 5]), groups=2)
    assert solve(problem).bound == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_the_tail_of_scenarios_with_domains_is_searched_within_them(seed: int) -> None:
    """An exact model that found a layout in other regions, but could not prove it, left the search in the old ones."""
    tokens = np.random.default_rng(seed).lognormal(6, 1, (3, 1, 6)).astype(np.int64)
    cluster = Cluster(np.array([3, 2, 3]), np.array([0, 0, 1]), np.ones(3) if seed % 2 else np.array([1, 1.7, 2.3]))
    problem = Problem(cluster, Demand.of(tokens), tail=0.4, constraints=Constraints(domain=np.array([0, 0, 1])))
    plan = solve(problem, parameters=SolveParameters(work_limit=3_000))
    assert broken(problem.limits, plan.layout.placed) is None


def test_groups_that_fit_no_memory_on_their_nodes_are_torn_apart() -> None:
    cluster = Cluster(np.array([4, 1]), np.array([0, 1]), np.ones(2), np.array([884, 884]))
    demand, expert = Demand.of([100, 997, 7, 1]), ExpertSpec(activation_bytes=1)
    for rule in (SplitRule.EVEN, SplitRule.OPTIMAL):
        assert solve(Problem(cluster, demand, expert, groups=2, split_rule=rule)).objective < 1.1


@pytest.mark.parametrize("policy", ["hybrid", "ilp"])
def test_no_plan_on_the_way_needs_more_memory_than_there_is(policy: str) -> None:
    cluster = Cluster(np.array([2, 1, 2]), np.zeros(3, int), np.array([3, 1.5, 0.5]), np.array([1308, 643, 495]))
    tokens = np.array([[1, 7, 101, 997], [1, 997, 100, 10], [0, 997, 10, 1]])
    current = Layout(np.array([[3, 1], [0, -1], [2, 1]]), 4)
    expert = ExpertSpec(weight_bytes=100, activation_bytes=1)
    problem = Problem(cluster, Demand.of(tokens[:, None]), expert, current, max_moves=0, split_rule=SplitRule.EVEN)
    *_, last = solve_anytime(problem, policy=policy)
    assert last.objective == solve(problem, policy=policy).objective


def test_an_even_split_has_an_exact_model_on_cpsat_alone() -> None:
    problem = Problem(Cluster.uniform(2, 2), Demand.of([40, 30, 20]), split_rule=SplitRule.EVEN)
    with pytest.raises(ProblemError, match="solver = highs: an even split has an exact model on cpsat"):
        solve(problem, policy="ilp", parameters=SolveParameters(solver="highs"))
    assert solve(problem, parameters=SolveParameters(solver="highs")).objective == pytest.approx(1.1111, abs=1e-3)


def test_an_even_split_may_be_perfect_where_a_replica_is_left_out() -> None:
    problem = Problem(Cluster.uniform(2, 3), Demand.of([40, 30, 20, 10]), split_rule=SplitRule.EVEN)
    assert solve(problem).objective == pytest.approx(1)


@settings(max_examples=15)
@given(
    st.sampled_from([(8, 4, 3), (16, 4, 5), (32, 8, 5), (64, 16, 5), (48, 32, 2)]),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 1000),
)
def test_under_an_even_split_no_other_policy_is_better(shape: tuple[int, int, int], sigma: float, seed: int) -> None:
    experts, devices, slots = shape
    loads = (1e5 * np.random.default_rng(seed).lognormal(0, sigma, experts)).astype(np.int64)
    problem = Problem(Cluster.uniform(devices, slots), Demand.of(loads), split_rule=SplitRule.EVEN)
    reached = solve(problem, parameters=SolveParameters(work_limit=1_000)).objective
    for name, policy in available_policies().items():
        if name not in ("hybrid", "ilp", "traffic") and SplitRule.EVEN in policy.rules:
            assert reached <= solve(problem, policy=name).objective * (1 + SolveParameters().target_gap), name


def test_spare_slots_go_to_middling_experts_where_that_packs_better() -> None:
    # FlashLB's example, in vllm-ascend: EPLB's largest load is 232, FlashLB's 205, and the least there is 196.67; in
    # whole tokens 196, where the odd ones of 560 are beside an expert that is itself in two places.
    problem = Problem(Cluster.uniform(8, 2), Demand.of([600, 560, 120, 120, 20, 10, 10, 10]), split_rule=SplitRule.EVEN)
    assert solve(problem, policy="eplb").objective == pytest.approx(232 / 181.25, abs=0.01)
    slots = tiered(problem.mean_load, problem.capacity, problem.cluster.speed, 4, NEVER)
    assert evaluate(problem, Layout(slots, 8)).objective <= 205 / 181.25
    assert solve(problem).objective <= 197 / 181.25


def test_a_layout_is_found_without_tokens_and_without_a_construction() -> None:
    nothing = Problem(Cluster.uniform(3, 2), Demand.of([0, 0, 0]))
    for solver in ("cpsat", "highs"):
        slots = any_layout(nothing, solver, None)
        assert set(slots[slots >= 0].tolist()) == {0, 1, 2}


def _tight(devices: int, width: int, seed: int, *, room: float) -> Problem:
    """Weights that take a quarter of the memory, with `room` times what all need, and as much as a replica."""
    rng = np.random.default_rng(seed)
    experts = devices * (width - 1)
    tokens = (rng.lognormal(0, 1, experts) * rng.lognormal(0, 0.3, (4, 1, experts)) * 1_000).astype(np.int64)
    most = int(tokens.sum(axis=2).max())
    weight = max(1, most // (3 * experts))
    memory = np.full(devices, int((experts * weight + most) / devices * room) + weight)
    cluster = replace(Cluster.uniform(devices, width), memory_bytes=memory)
    return Problem(cluster, Demand.of(tokens), ExpertSpec(weight_bytes=weight, activation_bytes=1))


@pytest.mark.parametrize("seed", range(6))
def test_a_layout_that_fits_a_tight_memory_is_found_by_search_where_no_construction_fits(seed: int) -> None:
    """The exact model, which alone looked for one, gave up after 15 s, and in a tenth of a second at once."""
    problem = _tight(16, 5, seed, room=1.03)
    for parameters in (SolveParameters(work_limit=2_000), SolveParameters(deadline_s=0.5)):
        plan = solve(problem, parameters=parameters)
        room = problem.cluster.memory_bytes - (plan.layout.slots >= 0).sum(axis=1) * problem.expert.weight_bytes
        assert (plan.split.device_loads() <= room).all()


def test_slots_stay_empty_where_their_memory_is_worth_more_to_tokens() -> None:
    """With all slots in use the fastest device had room for so few tokens that the best found was 2.17."""
    cluster = Cluster(np.array([2, 4, 5, 5]), np.zeros(4, int), np.array([0.5, 2, 1.5, 3.7]), np.full(4, 1781))
    loads = [
        [246, 497, 168, 218, 782, 467, 112, 259, 99],
        [288, 257, 414, 566, 256, 401, 270, 729, 271],
        [431, 141, 199, 282, 283, 596, 313, 305, 954],
    ]
    problem = Problem(cluster, Demand.of(np.array(loads)[:, None]), ExpertSpec(weight_bytes=175, activation_bytes=1))
    assert solve(problem, parameters=SolveParameters(work_limit=1_000)).objective < 1.27


@pytest.mark.parametrize("seed", range(6))
def test_where_nothing_may_arrive_an_expert_keeps_to_a_domain_that_holds_it(seed: int) -> None:
    """Experts balanced over domains that do not hold them made every such layout invalid, and the plan twice as bad."""
    rng = np.random.default_rng(seed)
    home = rng.permutation(np.arange(12) % 8)
    slots = np.full((8, 3), -1)
    for device in range(8):
        kept = np.flatnonzero(home == device)
        further = [e for e in rng.permutation(12) if home[e] != device and rng.random() < 0.6]
        held = np.concatenate([kept, further])[:3]
        slots[device, : len(held)] = held
    limits = Constraints(domain=(np.arange(8) // 2).astype(np.int32), device_move_bytes=0)
    demand, expert = Demand.of(rng.integers(10, 40, 12)), ExpertSpec(weight_bytes=1)
    problem = Problem(Cluster.uniform(8, 3), demand, expert, current=Layout(slots, 12), constraints=limits)
    best = solve(problem, policy="ilp").objective
    assert solve(problem, parameters=SolveParameters(work_limit=500)).objective <= 1.15 * best
