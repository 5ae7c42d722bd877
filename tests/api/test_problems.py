"""A problem, its parameters and its plan mean the same in a message."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.equality import same
from tests.support.instances import problems, random_layout

from moeplan.api import wire
from moeplan.solvers import (
    Cluster,
    Constraints,
    Demand,
    ExpertSpec,
    Link,
    Problem,
    ProblemError,
    SolveParameters,
    solve,
)
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.v1 import problem_pb2

LINKS = st.builds(Link, st.sampled_from([1e9, 4e11, float("inf")]), st.sampled_from([0.0, 1e-6]))
EXPERTS = st.builds(
    ExpertSpec,
    weight_bytes=st.integers(0, 2**40),
    state_bytes=st.integers(0, 2**40),
    token_bytes=st.integers(0, 2**20),
    activation_bytes=st.integers(0, 2**20),
    seconds_per_token=st.floats(1e-9, 10),
)


@st.composite
def whole_problems(draw: st.DrawFn) -> Problem:
    """Problems in which every field may differ from its default."""
    problem = draw(problems())
    cluster = replace(problem.cluster, intra_node=draw(LINKS), inter_node=draw(LINKS))
    if draw(st.booleans()):
        cluster = replace(cluster, memory_bytes=np.full(cluster.devices, 2**60))
    weights = draw(st.lists(st.floats(0.1, 9), min_size=problem.demand.scenarios, max_size=problem.demand.scenarios))
    current = random_layout(problem, draw(st.integers(0, 99))) if draw(st.booleans()) else None
    expert = draw(EXPERTS)
    budget = draw(st.none() | st.integers(0, 2**50)) if current is not None and expert.weight_bytes else None
    return Problem(
        cluster,
        Demand.of(problem.demand.tokens, weights),
        expert,
        current=current,
        max_moves=None if current is None else draw(st.none() | st.integers(0, 9)),
        groups=draw(st.sampled_from([groups for groups in (1, 2, 5) if problem.experts % groups == 0])),
        tail=draw(st.floats(0.1, 1)),
        split_rule=draw(st.none() | st.sampled_from([rule for rule in SplitRule if not rule.needs_sources])),
        constraints=Constraints(min_tokens=draw(st.integers(0, 9)), device_move_bytes=budget, node_move_bytes=budget),
    )


@given(whole_problems())
def test_problems(problem: Problem) -> None:
    """To the last bit, or the daemon's plan would be the plan of another problem."""
    message = problem_pb2.Problem.FromString(wire.write_problem(problem).SerializeToString())
    assert same(wire.read_problem(message), problem)


@given(
    st.builds(
        SolveParameters,
        deadline_s=st.none() | st.integers(1, 10**12).map(lambda nanos: nanos / 10**9),
        work_limit=st.integers(0, 2**62),
        target_gap=st.floats(0, 1e6),
        traffic_tolerance=st.floats(0, 1e6),
        seed=st.integers(0, 2**32 - 1),
        solver=st.sampled_from(["cpsat", "highs", "cbc"]),
        threads=st.integers(1, 1024),
        prove=st.booleans(),
    )
)
def test_parameters(parameters: SolveParameters) -> None:
    assert wire.read_parameters(wire.write_parameters(parameters)) == parameters


def test_what_is_left_out_has_the_defaults_of_the_library() -> None:
    assert wire.read_parameters(problem_pb2.SolveParameters()) == SolveParameters()
    assert wire.read_expert(problem_pb2.ExpertSpec()) == ExpertSpec()
    assert same(wire.read_cluster(problem_pb2.Cluster(slots=[2, 2])), Cluster.uniform(2, 2))


def test_no_limit_of_time_is_infinite() -> None:
    assert wire.read_parameters(wire.write_parameters(SolveParameters(deadline_s=float("inf")))).deadline_s is None


def test_failed_devices_and_pairs_travel() -> None:
    limits = Constraints(forbidden=np.array([[0, 1]]), pinned=np.array([[7, 2]]))
    whole = Problem(
        Cluster.uniform(4, 3), Demand.of(np.arange(1, 9)), current=random_layout(_problem(), 0), constraints=limits
    )
    there = wire.read_problem(wire.write_problem(whole.without([0])))
    assert same(there.limits, whole.without([0]).limits)
    message = wire.write_problem(whole)
    message.failed.append(9)
    with pytest.raises(ProblemError, match=r"failed\[0\] = 9: must be"):
        wire.read_problem(message)


def _problem() -> Problem:
    return Problem(Cluster.uniform(4, 3), Demand.of(np.arange(1, 9)))


@settings(max_examples=30)
@given(problems(), st.sampled_from(["hybrid", "eplb"]))
def test_plans(problem: Problem, policy: str) -> None:
    plan = solve(problem, policy=policy)
    plan = replace(plan, seconds=round(plan.seconds, 9))
    message = problem_pb2.Plan.FromString(wire.write_plan(plan).SerializeToString())
    assert same(wire.read_plan(message, problem), plan)
    assert message.mean_imbalance == plan.mean_imbalance
    assert message.gap == plan.gap
    assert wire.read_array("quota", message.quota).tolist() == plan.split.quota.tolist()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layout": wire.write_array(np.zeros((4, 1), np.int32))}, r"plan\.layout"),
        ({"layout": wire.write_array(np.arange(8, dtype=np.int32).reshape(2, 4))}, "8 experts on 2 devices"),
        ({"split_rule": "unheard of"}, r"plan\.split_rule = 'unheard of': must be one of even"),
        ({"bound": 1e9}, r"plan\.bound = 1000000000.0: is no bound"),
        ({"bound": float("nan")}, r"plan\.bound = nan: is no bound"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, object], error: str) -> None:
    message = wire.write_plan(solve(_problem()))
    for name, value in change.items():
        message.ClearField(name)  # type: ignore[arg-type]
        message.MergeFrom(problem_pb2.Plan(**{name: value}))  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=error):
        wire.read_plan(message, _problem())


def test_figures_of_a_plan_do_not_rest_on_trust() -> None:
    plan = solve(_problem())
    message = wire.write_plan(plan)
    message.mean_imbalance, message.cost_s, message.gap = 1.0, 0.0, 0.0
    del message.imbalance[:]
    message.ClearField("quota")
    judged = wire.read_plan(message, _problem())
    assert same(judged.imbalance, plan.imbalance)
    assert same(judged.cost, plan.cost)
    assert same(judged.split, plan.split)
