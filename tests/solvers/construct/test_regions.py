"""Regions: tokens by their speed, and plans that are as good within domains of unequal speed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Cluster, Constraints, Demand, Layout, Problem, SolveParameters, SplitRule, solve
from moeplan.solvers.construct.regions import divisions, narrowings
from moeplan.solvers.problem.limits import broken


def _in_domains(
    experts: int, devices: int, width: int, domains: int, scenarios: int, seed: int, *, sigma: float = 1.0
) -> Problem:
    """Lognormal loads on devices of four speeds, in domains of as many devices."""
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(0, sigma, experts) * rng.lognormal(0, 0.3, (scenarios, 1, experts)) * 1_000
    speed = rng.choice([0.5, 1.0, 1.5, 2.0], devices)
    cluster = Cluster(np.full(devices, width), np.zeros(devices, int), speed)
    domain = (np.arange(devices) * domains // devices).astype(np.int32)
    return Problem(cluster, Demand.of(loads.astype(np.int64)), constraints=Constraints(domain=domain))


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 999), st.sampled_from([0.5, 1.0]))
def test_regions_have_tokens_by_their_speed(domains: int, scenarios: int, seed: int, sigma: float) -> None:
    problem = _in_domains(160, 16, 13, domains, scenarios, seed, sigma=sigma)
    region, slots = problem.limits.region, np.bincount(problem.limits.region) * 13
    least = np.inf
    for divided in divisions(problem):
        number = np.bincount(divided, minlength=domains)
        assert (number <= slots).all()
        speed = np.bincount(region, problem.cluster.speed)
        tokens = np.stack([problem.loads[:, divided == r].sum(axis=1) for r in range(domains)])
        level = tokens / speed[:, None] / problem.mean_level
        least = min(least, float(level.max(axis=0).mean()))
    full = bool((number == slots).any())  # what is faster yet has no slots for more
    assert full or least < 1.03


@pytest.mark.parametrize("seed", range(6))
def test_domains_of_unequal_speed_are_planned_to_near_the_bound(seed: int) -> None:
    """Squares of loads per speed had counted as much for a slow domain as for a fast one; up to 1.30 was left."""
    problem = _in_domains(160, 16, 11, 4, 4, seed)
    plan = solve(problem, parameters=SolveParameters(work_limit=2_000))
    assert broken(problem.limits, plan.layout.placed) is None
    assert plan.objective <= 1.02 * plan.bound


@pytest.mark.parametrize("seed", range(4))
def test_domains_of_unequal_speed_are_planned_as_well_as_by_the_exact_model(seed: int) -> None:
    problem = _in_domains(14, 8, 3, 2, 1, seed)
    best = solve(problem, policy="ilp", parameters=SolveParameters(work_limit=3_000)).objective
    assert solve(problem, parameters=SolveParameters(work_limit=2_000)).objective <= 1.01 * best


@pytest.mark.parametrize("split_rule", [None, SplitRule.EVEN])
def test_groups_on_nodes_of_unequal_speed_are_divided_by_it(split_rule: SplitRule | None) -> None:
    rng = np.random.default_rng(0)
    cluster = Cluster(np.full(16, 10, np.int32), np.arange(16, dtype=np.int32) // 4, np.repeat([0.5, 1.0, 1.5, 1.0], 4))
    demand = Demand.of((rng.lognormal(0, 1, (1, 1, 128)) * 1_000).astype(np.int64))
    plan = solve(
        Problem(cluster, demand, groups=32, split_rule=split_rule), parameters=SolveParameters(work_limit=2_000)
    )
    assert plan.objective <= 1.1


def test_few_moves_go_to_the_domains_that_need_them() -> None:
    """A balance that took no heed of the limit of moves was never within it, and only the layout in force was left."""
    problem = _in_domains(96, 32, 4, 8, 8, 0)
    static = replace(problem, current=Layout.contiguous(96, problem.capacity), max_moves=0)
    found = [solve(replace(static, max_moves=m), parameters=SolveParameters(work_limit=2_000)) for m in (0, 20, 60)]
    assert found[1].objective < 1.6
    assert found[2].objective < 1.2
    for plan, moves in zip(found, (0, 20, 60), strict=True):
        assert plan.moves is not None
        assert len(plan.moves) <= moves


def test_units_leave_no_more_regions_than_half_of_the_moves_allow() -> None:
    problem = _in_domains(96, 32, 4, 8, 8, 0)
    static = replace(problem, current=Layout.contiguous(96, problem.capacity), max_moves=20)
    near, balanced = narrowings(static, static.limits.held)
    assert 0 < (near.may != balanced.may).any(axis=0).sum() <= 10


def test_balancing_asks_for_its_deadline_when_it_begins_and_keeps_it() -> None:
    problem = _in_domains(96, 32, 4, 8, 8, 0)
    wanted = Layout.contiguous(96, problem.capacity).placed
    asked = []

    def over() -> float:
        asked.append(True)
        return 0.0

    assert len(list(narrowings(problem, wanted))) == 2
    found = narrowings(problem, wanted, over)
    next(found)
    assert not asked  # what was made of the first tells how much time must be left
    assert next(found, None) is None
    assert asked


@pytest.mark.parametrize("seed", range(4))
def test_very_many_tokens_in_domains_are_planned_as_well_under_a_tail(seed: int) -> None:
    problem = replace(_in_domains(10, 4, 4, 2, 3, seed), tail=0.3)
    parameters = SolveParameters(work_limit=2_000)
    few = solve(problem, parameters=parameters).objective
    many = replace(problem, demand=Demand.of(problem.demand.tokens * 10**9))
    plan = solve(many, parameters=parameters)
    assert (plan.split.device_loads().sum(axis=1) == many.loads.sum(axis=1)).all()
    assert plan.bound <= plan.objective <= few * 1.002
