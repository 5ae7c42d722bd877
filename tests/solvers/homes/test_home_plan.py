"""Homes over link domains: few moves, and less left after spilling."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from moeplan.solvers import Demand, ProblemError, SpillOptions, plan_homes, spilled_imbalance

RNG = np.random.default_rng(11)
OPTIONS = SpillOptions.uniform(32, 8, 2, domain=2)


def demand(scenarios: int = 4, experts: int = 32) -> Demand:
    popularity = np.random.default_rng(3).dirichlet(np.full(experts, 0.7))
    return Demand.of(np.random.default_rng(4).multinomial(4_000, popularity, (scenarios, 8)))


def test_homes_leave_less_after_spilling_and_every_device_keeps_as_many() -> None:
    plan = plan_homes(demand(), OPTIONS)
    assert plan.after < 1.01 < plan.before
    assert np.array_equal(np.bincount(plan.home), np.bincount(OPTIONS.home))
    assert np.array_equal(plan.moved, np.flatnonzero(plan.home != OPTIONS.home))


@pytest.mark.parametrize("most", [0, 1, 2, 6])
def test_no_more_move_than_may(most: int) -> None:
    plan = plan_homes(demand(), OPTIONS, max_moves=most)
    assert len(plan.moved) <= most
    assert (plan.after < plan.before) == (most >= 2)


def test_the_same_arguments_give_the_same_plan() -> None:
    first, second = (plan_homes(demand(), OPTIONS, max_moves=8, price=0.1) for _ in range(2))
    assert np.array_equal(first.home, second.home)
    assert first.after == second.after


def test_a_price_keeps_what_does_not_pay() -> None:
    cheap, dear = (plan_homes(demand(), OPTIONS, price=price) for price in (0.01, 1.0))
    assert 0 < len(dear.moved) < len(cheap.moved)
    assert cheap.after <= dear.after <= dear.before - len(dear.moved) / 32
    assert not len(plan_homes(demand(), OPTIONS, price=100.0).moved)


def test_two_experts_for_two_domains_are_exchanged_as_by_trying_all() -> None:
    options = SpillOptions.uniform(6, 2, 1, domain=1)
    tokens = RNG.integers(1, 100, (3, 1, 6))
    plan = plan_homes(Demand.of(tokens), options)
    share = tokens[:, 0] / tokens[:, 0].sum(axis=1, keepdims=True)
    best = min(
        np.mean([max(s[list(order[:3])].sum(), s[list(order[3:])].sum()) * 2 for s in share])
        for order in permutations(range(6))
    )
    assert plan.after == pytest.approx(best)


def test_groups_move_as_a_whole() -> None:
    plan = plan_homes(demand(), OPTIONS, groups=8)
    domains = OPTIONS.domain[plan.home].reshape(8, 4)
    assert (domains == domains[:, :1]).all()
    assert plan.after < plan.before
    with pytest.raises(ProblemError, match=r"groups\[0\] = at home in domains \[0, 1\]"):
        plan_homes(demand(), OPTIONS, groups=2)


def test_slow_domains_and_full_ones_get_less() -> None:
    slow = SpillOptions.uniform(32, 8, 2, domain=2, speed=[1, 1, 2, 2, 2, 2, 2, 2])
    plan = plan_homes(demand(), slow)
    load = np.bincount(slow.domain[plan.home], demand().loads().mean(axis=0))
    assert load[0] == pytest.approx(load[1] / 2, rel=0.1)

    capped = SpillOptions.uniform(32, 8, 2, domain=2, token_cap=[1_500, 1_500, *[10_000] * 6])
    assert spilled_imbalance(demand(), capped)[1] > 0
    plan = plan_homes(demand(), capped)
    held = SpillOptions.uniform(32, 8, 2, domain=2, token_cap=capped.token_cap, home=plan.home)
    assert spilled_imbalance(demand(), held)[1] == 0


def test_without_spare_slots_every_device_is_its_own_pool() -> None:
    options = SpillOptions.uniform(32, 8, 0)
    plan = plan_homes(demand(), options)
    loads = [np.bincount(plan.home, load, minlength=8) for load in demand().loads()]
    assert plan.after == pytest.approx(np.mean([load.max() / load.mean() for load in loads]))
    assert plan.after < plan.before


def test_a_demand_of_other_experts_is_refused() -> None:
    with pytest.raises(ProblemError, match="the homes are of 32"):
        plan_homes(demand(experts=16), OPTIONS)
