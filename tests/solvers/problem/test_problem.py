"""Validation: every mistake is refused at construction with the field, the value and the limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeplan.solvers import (
    Cluster,
    Demand,
    ExpertSpec,
    InfeasibleError,
    Layout,
    Link,
    Problem,
    ProblemError,
    SolveParameters,
    available_policies,
    evaluate,
    solve,
)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Cluster.uniform(0, 1), "cluster.devices"),
        (lambda: Cluster.uniform(4, -1), "cluster.slots"),
        (lambda: Cluster.uniform(4, 1, nodes=5), "cluster.nodes"),
        (lambda: Cluster.uniform(2, 1, speed=[1.0, 0.0]), "cluster.speed[1]"),
        (lambda: Cluster.uniform(2, 1, speed=[1.0, float("nan")]), "cluster.speed[1]"),
        (lambda: Cluster.uniform(2, 1, speed=[1.0]), "cluster.speed"),
        (lambda: Cluster.uniform(2, 1, speed=[1e-308, 1e308]), "cluster.speed[0]"),
        (lambda: Cluster.uniform(2, 1, speed=[1e308, 1e308]), "cluster.speed[0]"),
        (lambda: Cluster.uniform(2, 1, speed=[1.0, 0.9e-6]), "cluster.speed[1]"),
        (lambda: Cluster.uniform(2, 1, memory_bytes=[1, -1]), "cluster.memory_bytes[1]"),
        (lambda: Cluster(np.ones(2, int), np.array([0, 2]), np.ones(2)), "cluster.node"),
        (lambda: Link(0.0), "link.bytes_per_s"),
        (lambda: Link(1e-31), "link.bytes_per_s"),
        (lambda: Link(1.0, -1.0), "link.latency_s"),
        (lambda: Link(1.0, 1e31), "link.latency_s"),
        (lambda: Demand.of([1.5, 2.0]), "demand.tokens"),
        (lambda: Demand.of([1, -2]), "demand.tokens[0, 0, 1]"),
        (lambda: Demand.of([[[2**53, 2**53]]]), "demand.tokens"),
        (lambda: Demand.of(np.array([2**63], np.uint64)), "demand.tokens[0, 0, 0]"),
        (lambda: Demand.of(np.zeros((1, 1, 0), int)), "demand.tokens"),
        (lambda: Demand.of(3), "demand.tokens"),
        (lambda: Demand.of([[[1]]], [0.0]), "demand.weights"),
        (lambda: Demand.of([[[1]]], [1.0, 1.0]), "demand.weights"),
        (lambda: Demand.of([[[1]]], [float("inf")]), "demand.weights[0]"),
        (lambda: Demand.of([1], spread=-0.1), "demand.spread"),
        (lambda: Demand.of([1], spread=float("nan")), "demand.spread"),
        (lambda: ExpertSpec(weight_bytes=-1), "expert.weight_bytes"),
        (lambda: ExpertSpec(seconds_per_token=float("nan")), "expert.seconds_per_token"),
        (lambda: ExpertSpec(seconds_per_token=1e300), "expert.seconds_per_token"),
        (lambda: ExpertSpec(seconds_per_token=1e-300), "expert.seconds_per_token"),
        (lambda: Layout(np.array([[0, 0]]), 1), "layout.slots[0]"),
        (lambda: Layout(np.array([[0, 5]]), 2), "layout.slots[0, 1]"),
        (lambda: Layout(np.array([[0, -1]]), 2), "layout.slots"),
        (lambda: Layout(np.array([0, 1]), 2), "layout.slots"),
        (lambda: Layout.contiguous(3, [1, 1]), "layout.experts"),
        (lambda: Problem(Cluster.uniform(2, 2), Demand.of([1, 2]), max_moves=1), "max_moves"),
        (lambda: Problem(Cluster.uniform(2, 2), Demand.of([1, 2]), groups=3), "groups"),
        (lambda: SolveParameters(deadline_s=0), "parameters.deadline_s"),
        (lambda: SolveParameters(work_limit=-1), "parameters.work_limit"),
        (lambda: solve(Problem(Cluster.uniform(2, 2), Demand.of([1, 2])), policy="best"), "policy"),
    ],
)
def test_mistakes_name_their_field(make: Any, field: str) -> None:
    with pytest.raises(ProblemError) as caught:
        make()
    assert caught.value.field == field
    assert str(caught.value.value) in str(caught.value)


def test_current_layout_must_suit_the_problem() -> None:
    cluster, demand = Cluster.uniform(2, 2), Demand.of([1, 2])
    for current, field in [
        (Layout.contiguous(3, [2, 2]), "current.experts"),
        (Layout.contiguous(2, [1, 1, 1]), "current.devices"),
        (Layout(np.array([[0, 1], [-1, -1]]), 2), None),
    ]:
        if field is None:
            Problem(cluster, demand, current=current)
        else:
            with pytest.raises(ProblemError, match=field):
                Problem(cluster, demand, current=current)
    with pytest.raises(ProblemError, match=r"current.slots\[0\]"):
        Problem(
            Cluster(np.array([1, 1]), np.zeros(2, int), np.ones(2)),
            demand,
            current=Layout(np.array([[0, 1], [1, -1]]), 2),
        )


def test_too_few_slots_say_how_many_are_missing() -> None:
    with pytest.raises(InfeasibleError, match="7 experts need 3 more"):
        Problem(Cluster.uniform(2, 2), Demand.of(np.ones(7, int)))


def test_memory_limits_replicas() -> None:
    cluster = Cluster.uniform(2, 4, memory_bytes=[300, 199])
    problem = Problem(cluster, Demand.of([5, 5, 5]), ExpertSpec(weight_bytes=60, state_bytes=40))
    assert problem.capacity.tolist() == [3, 1]
    plan = solve(problem)
    assert (plan.layout.slots >= 0).sum(axis=1).tolist() == [3, 1]
    with pytest.raises(InfeasibleError, match="4 experts need 1 more"):
        Problem(Cluster.uniform(3, 4, memory_bytes=100), Demand.of([1, 1, 1, 1]), ExpertSpec(weight_bytes=100))


def test_memory_counts_activations() -> None:
    cluster = Cluster.uniform(2, 1, memory_bytes=1000)
    problem = Problem(cluster, Demand.of([80, 100]), ExpertSpec(weight_bytes=100, activation_bytes=10))
    with pytest.raises(InfeasibleError, match="needs 100 bytes more") as caught:
        solve(problem, policy="static")
    assert caught.value.field == "cluster.memory_bytes[1]"


def test_arrays_are_frozen_copies() -> None:
    tokens = np.array([1, 2, 3])
    demand = Demand.of(tokens)
    tokens[0] = 100
    assert demand.tokens[0, 0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        demand.tokens[0, 0, 0] = 5


@pytest.mark.parametrize("policy", sorted(available_policies()))
@pytest.mark.parametrize(
    ("devices", "slots", "tokens"),
    [
        (1, 3, [4, 5, 6]),
        (1, 1, [0]),
        (5, 1, [7]),
        (3, 2, [0, 0, 0]),
        (7, 3, [0, 0, 9, 0]),
        (5, 4, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_unusual_sizes_are_planned(policy: str, devices: int, slots: int, tokens: list[int]) -> None:
    for nodes in {1, min(2, devices), devices}:
        # One source per device, as `traffic` must know where tokens come from.
        sources = np.array([tokens] + [[0] * len(tokens)] * (devices - 1))
        problem = Problem(Cluster.uniform(devices, slots, nodes=nodes), Demand.of(sources))
        plan = solve(problem, policy=policy)
        assert plan.split.quota.sum() == sum(tokens)
        assert plan.bound >= 1
        assert plan.gap >= 0


def test_a_policy_refuses_what_it_cannot_honour() -> None:
    current = Layout.contiguous(4, [2, 2])
    problem = Problem(Cluster.uniform(2, 3), Demand.of([1, 2, 3, 4]), current=current, max_moves=1)
    with pytest.raises(ProblemError, match="eplb re-plans from scratch"):
        solve(problem, policy="eplb")


def test_evaluate_refuses_a_layout_of_another_problem() -> None:
    problem = Problem(Cluster.uniform(2, 3), Demand.of([1, 2, 3, 4]))
    with pytest.raises(ProblemError, match="layout"):
        evaluate(problem, Layout.contiguous(3, [2, 2]))
