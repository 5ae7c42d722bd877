"""Least traffic between nodes: the split `home`, the bound on coverage, and the policy `traffic`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.instances import all_layouts, problems, random_layout

from moeplan.solvers import Cluster, Demand, Layout, Problem, ProblemError, SolveParameters, evaluate, solve
from moeplan.solvers.plan.cost import between_nodes, traffic
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.coverage import WHOLE, coverable, covered_split, domains, tokens_by_domain
from moeplan.solvers.split.rules import fabric_of, local, routes, split


def by_domain(problem: Problem) -> Int64:
    return tokens_by_domain(problem.cluster, problem.demand.tokens, problem.source_device)


def all_at_home(problem: Problem, layout: Layout) -> Int64:
    """The quota where every covered token stays."""
    cluster, stay = problem.cluster, np.full(problem.demand.scenarios, WHOLE)
    return covered_split(layout.slots, by_domain(problem), cluster.speed, domains(cluster), stay, NEVER)[0]


def crossing(problem: Problem, layout: Layout, rule: str) -> int:
    """Tokens between nodes, by following every route."""
    between = traffic(problem, layout, evaluate(problem, layout, rule).split)
    return int(between[:, problem.cluster.node[:, None] != problem.cluster.node].sum())


@settings(max_examples=80)
@given(problems(), st.integers(0, 2**32 - 1))
def test_covered_tokens_stay_home_and_no_split_sends_less(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout = random_layout(problem, seed)
    tokens, domain = by_domain(problem), domains(problem.cluster)
    quota = all_at_home(problem, layout)
    assert (quota >= 0).all()
    assert (quota[:, layout.slots < 0] == 0).all()
    for expert in range(problem.experts):
        assert (quota[:, layout.slots == expert].sum(axis=1) == problem.loads[:, expert]).all()
    placed = np.stack([layout.placed[domain == d].any(axis=0) for d in range(int(domain.max()) + 1)])
    covered = int(tokens[:, placed].sum())
    level = (quota.sum(axis=2) / problem.cluster.speed).max(axis=1)
    best = (split(problem, layout, SplitRule.OPTIMAL).device_loads() / problem.cluster.speed).max(axis=1)
    assert (level >= best).all()
    if problem.cluster.nodes > 1:
        divided = split(problem, layout, SplitRule.LOCAL)
        assert (problem.loads.sum() - covered) <= crossing(problem, layout, "local")
        free = local(fabric_of(problem), layout, problem.demand.tokens, tolerance=1e9)
        near = problem.cluster.node[problem.source_device][:, None] == problem.cluster.node[layout.hosts.device]
        assert (routes(problem, layout, free) * near).sum() == covered
        assert between_nodes(problem, layout, divided) == pytest.approx(
            [
                1 - (sent * near).sum() / sent.sum() if sent.sum() else 0
                for sent in routes(problem, layout, divided)
            ]
        )  # fmt: skip


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1))
def test_home_keeps_the_load_within_a_percent(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout = random_layout(problem, seed)
    level = (split(problem, layout, SplitRule.HOME).device_loads() / problem.cluster.speed).max(axis=1)
    best = (split(problem, layout, SplitRule.OPTIMAL).device_loads() / problem.cluster.speed).max(axis=1)
    assert (level <= best * 1.01 + 1 / problem.cluster.speed.min()).all()


@settings(max_examples=30)
@given(problems(max_devices=4, max_experts=4, speeds=False), st.integers(0, 3))
def test_no_layout_covers_more_than_the_bound(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    tokens, domain = by_domain(problem).sum(axis=0).astype(np.float64), domains(problem.cluster)
    bound = coverable(tokens, int(problem.capacity.sum()))
    layout = random_layout(problem, seed)
    placed = np.stack([layout.placed[domain == d].any(axis=0) for d in range(len(tokens))])
    assert tokens[placed].sum() <= bound + 1e-9


def test_as_few_crossings_as_by_enumeration() -> None:
    rng = np.random.default_rng(4)
    for _ in range(4):
        tokens = rng.integers(0, 60, (1, 4, 5))
        problem = Problem(Cluster.uniform(4, 2, nodes=2), Demand.of(tokens))
        parameters = SolveParameters(work_limit=3_000, traffic_tolerance=0.2)
        cap = solve(problem, policy="hybrid", parameters=parameters).split.device_loads().max() * 1.2
        best = min(
            crossing(problem, layout, "home")
            for layout in all_layouts(5, problem.capacity)
            if all_at_home(problem, layout).sum(axis=2).max() <= cap
        )
        layout = solve(problem, policy="traffic", parameters=parameters).layout
        quota = all_at_home(problem, layout)
        assert quota.sum(axis=2).max() <= cap
        covered = by_domain(problem)[0][
            np.stack([layout.placed[problem.cluster.node == n].any(axis=0) for n in range(2)])
        ].sum()
        assert tokens.sum() - covered <= best


def test_a_quarter_less_traffic_for_a_percent_of_load() -> None:
    # Sources of a node share favourite experts, as ranks that read the same kind of text do.
    rng = np.random.default_rng(0)
    taste = rng.dirichlet(np.full(64, 0.5), 4)
    tokens = np.stack([[rng.multinomial(4_096, taste[source // 4]) for source in range(16)] for _ in range(4)])
    problem = Problem(Cluster.uniform(16, 5, nodes=4), Demand.of(tokens))
    parameters = SolveParameters(work_limit=3_000)
    balanced = solve(problem, policy="hybrid", parameters=parameters)
    ours = solve(problem, policy="traffic", parameters=parameters)
    assert ours.mean_imbalance <= balanced.mean_imbalance * 1.011
    before = between_nodes(problem, balanced.layout, balanced.split).mean()
    after = between_nodes(problem, ours.layout, ours.split).mean()
    assert after <= 0.75 * before


def test_experts_of_one_node_s_tokens_move_there_at_no_loss() -> None:
    tokens = np.kron(np.eye(2, dtype=int), np.full((4, 8), 50))
    problem = Problem(Cluster.uniform(8, 3, nodes=2), Demand.of(tokens))
    plan = solve(problem, policy="traffic")
    assert between_nodes(problem, plan.layout, plan.split) == pytest.approx([0.0])
    assert plan.mean_imbalance == 1


def test_a_move_limit_holds() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 100, (2, 8, 16))
    free = Problem(Cluster.uniform(8, 3, nodes=2), Demand.of(tokens))
    current = random_layout(free, 1)
    limited = Problem(free.cluster, free.demand, current=current, max_moves=3)
    plan = solve(limited, policy="traffic", parameters=SolveParameters(work_limit=500))
    assert plan.moves is not None
    assert len(plan.moves) <= 3


def test_unknown_origins_are_refused() -> None:
    problem = Problem(Cluster.uniform(8, 3, nodes=2), Demand.of(np.ones(16, int)))
    with pytest.raises(ProblemError, match="needs the demand of each source"):
        solve(problem, policy="traffic")
    with pytest.raises(ProblemError, match="traffic_tolerance"):
        SolveParameters(traffic_tolerance=-0.1)
