"""The exact models, large neighbourhoods and strong bounds, against brute force."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.instances import optimum, problems, random_layout, small_problems

from moeplan.solvers import (
    Cluster,
    Demand,
    Layout,
    Problem,
    ProblemError,
    SolveParameters,
    Termination,
    evaluate,
    solve,
    solve_anytime,
    solve_layers,
)
from moeplan.solvers.exact import partition_model
from moeplan.solvers.exact.configurations import configuration_bounds
from moeplan.solvers.exact.model import Effort
from moeplan.solvers.exact.of_problem import whole
from moeplan.solvers.exact.run import run

SOLVERS = ("cpsat", "highs", "cbc")


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=15)
@given(problem=small_problems(3), seed=st.integers(0, 99))
def test_backends_find_the_optimum(solver: str, problem: Problem, seed: int) -> None:
    plan = solve(problem, policy="ilp", parameters=SolveParameters(solver=solver, target_gap=0, seed=seed))
    best = optimum(problem)
    # Continuous tokens: the layout is optimal up to the rounding of whole tokens.
    slack = 1 / max(1, problem.loads.sum(axis=1).min() / problem.cluster.speed.sum() * problem.cluster.speed.min())
    assert best * (1 - 1e-9) <= plan.mean_imbalance <= best * (1 + 1e-6) + (0 if solver == "cpsat" else slack)
    assert plan.bound <= best * (1 + 1e-9)


def test_highs_runs_with_any_number_of_threads_whatever_ran_before() -> None:
    model = whole(Problem(Cluster.uniform(3, 2), Demand.of([5, 3, 2])), None)
    for threads in (1, 2, 3):
        assert run(model, "highs", Effort(threads=threads)).status == "optimal"


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=8)
@given(problem=small_problems(3), seed=st.integers(0, 99), limit=st.integers(0, 3))
def test_backends_keep_the_limit_of_moves(solver: str, problem: Problem, seed: int, limit: int) -> None:
    current = random_layout(problem, seed)
    limited = Problem(problem.cluster, problem.demand, current=current, max_moves=limit)
    plan = solve(limited, policy="ilp", parameters=SolveParameters(solver=solver, target_gap=0))
    assert plan.moves is not None
    assert len(plan.moves) <= limit
    assert plan.mean_imbalance <= evaluate(limited, current).mean_imbalance * (1 + 1e-12)


@pytest.mark.parametrize("total", [10**11, 10**13, 10**15])
@pytest.mark.parametrize("tail", [1.0, 0.4])
def test_very_many_tokens_are_counted_in_larger_units(total: int, tail: float) -> None:
    """A solver's sums of tokens, speeds and weights must fit into 64 bits; nothing was planned where they did not."""
    part = np.random.default_rng(0).lognormal(0, 1, (3, 1, 6))
    part /= part.sum(axis=2, keepdims=True)
    cluster = Cluster(np.array([3, 2, 3]), np.zeros(3, int), np.array([1, 1.7, 2.3]))
    few, many = (
        solve(Problem(cluster, Demand.of((part * tokens).astype(np.int64)), tail=tail), policy="ilp")
        for tokens in (10**6, total)
    )
    assert many.objective == pytest.approx(few.objective, rel=3e-4)
    assert few.bound * (1 - 1e-3) <= many.bound <= many.objective


@settings(max_examples=25)
@given(st.sampled_from([(4, 2, 7), (4, 2, 6), (4, 3, 12), (3, 3, 8), (4, 2, 8)]), st.integers(0, 10**6))
def test_the_partition_is_the_placement_problem(shape: tuple[int, int, int], seed: int) -> None:
    devices, slots, experts = shape
    loads = (np.random.default_rng(seed).lognormal(0, 1, experts) * 1_000).astype(np.int64)
    problem = Problem(Cluster.uniform(devices, slots), Demand.of(loads))
    model = whole(problem, Layout.contiguous(experts, problem.capacity).slots)
    assert partition_model.applies(model)
    group, size = partition_model.groups_of(model)
    assert size.sum() == devices
    assert (np.bincount(group) == size * (slots - 1) + 1).all()
    answer = run(model, "cpsat", Effort(work=20.0))
    highs = run(model, "highs", Effort(work=20.0))
    assert answer.status == "optimal"
    assert answer.placed is not None
    assert highs.placed is not None
    levels = []
    for placed in (answer.placed, highs.placed):
        rows = np.full((devices, slots), -1, np.int32)
        for row, here in zip(rows, placed, strict=True):
            row[: here.sum()] = np.flatnonzero(here)
        levels.append(evaluate(problem, Layout(rows, experts)).split.device_loads().max())
    assert levels[0] == pytest.approx(levels[1], abs=1)  # HiGHS divides tokens
    assert answer.bound <= levels[0] / (loads.sum() / devices) * (1 + 1e-9)


@settings(max_examples=20)
@given(st.sampled_from([(3, 2, 5), (3, 2, 6), (3, 3, 8), (4, 2, 6), (4, 2, 7)]), st.data())
def test_configurations_never_exceed_the_optimum(shape: tuple[int, int, int], data: st.DataObject) -> None:
    devices, slots, experts = shape
    values = st.lists(st.sampled_from([1, 3, 10, 100, 101, 700, 997]), min_size=experts, max_size=experts)
    loads = np.array(data.draw(values))
    problem = Problem(Cluster.uniform(devices, slots), Demand.of(loads))
    best = optimum(problem) * loads.sum() / devices
    bound = loads.sum() / devices
    for value in configuration_bounds(loads, devices, slots, bound, float(loads.sum())):
        assert value >= bound
        bound = value
    assert bound <= best * (1 + 1e-9)


def test_configurations_close_a_gap() -> None:
    loads = (np.arange(1, 41) ** -0.6 * 1e5).astype(np.int64)
    problem = Problem(Cluster.uniform(22, 2), Demand.of(loads))
    plain = solve(problem, parameters=SolveParameters(work_limit=2_000))
    proved = solve(problem, parameters=SolveParameters(work_limit=20_000, prove=True))
    assert plain.gap > 0.04
    assert proved.bound > plain.bound * 1.02
    assert proved.bound <= proved.mean_imbalance <= plain.mean_imbalance


@settings(max_examples=25)
@given(problems(max_devices=5, max_experts=9), st.integers(0, 5), st.integers(0, 99), st.booleans())
def test_the_stream_never_gets_worse(problem: Problem, limit: int, seed: int, limited: bool) -> None:
    if limited:
        current = random_layout(problem, seed)
        problem = Problem(problem.cluster, problem.demand, current=current, max_moves=limit)
    parameters = SolveParameters(work_limit=6_000, seed=seed, prove=True)
    for policy in ("hybrid", "ilp", "eplb"):
        if policy == "eplb" and limited:
            continue
        parameters = SolveParameters(work_limit=6_000 if policy == "hybrid" else 50, seed=seed, prove=True)
        found = list(solve_anytime(problem, policy=policy, parameters=parameters))
        imbalance = [plan.mean_imbalance for plan in found]
        bounds = [plan.bound for plan in found]
        assert imbalance == sorted(imbalance, reverse=True)
        assert bounds == sorted(bounds)
        assert all(plan.bound <= plan.mean_imbalance * (1 + 1e-12) for plan in found)
        final = solve(problem, policy=policy, parameters=parameters)
        assert final.mean_imbalance == imbalance[-1]
        if limited:
            assert all(plan.moves is not None and len(plan.moves) <= limit for plan in found)


def test_neighbourhoods_are_the_same_in_every_process() -> None:
    script = """
import numpy as np
from moeplan.solvers import *
loads = (np.arange(1, 97) ** -0.6 * 1e5).astype(np.int64)
problem = Problem(Cluster.uniform(54, 2), Demand.of(loads))
plan = solve(problem, parameters=SolveParameters(work_limit=9_000, prove=True))
print(plan.layout.slots.tobytes().hex(), plan.mean_imbalance.hex(), plan.bound.hex())
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("\n") == 1  # nothing else is printed


@pytest.mark.timeout(120)  # without the deadline it would search for hours
@pytest.mark.parametrize("policy", ["hybrid", "ilp"])
def test_a_deadline_ends_the_search(policy: str) -> None:
    loads = (np.arange(1, 97) ** -0.6 * 1e5).astype(np.int64)
    problem = Problem(Cluster.uniform(54, 2), Demand.of(loads))
    solve(problem, policy=policy, parameters=SolveParameters(work_limit=100 if policy == "ilp" else 5_000, prove=True))
    hasty = SolveParameters(deadline_s=0.1, work_limit=10**9, target_gap=0, prove=True)
    assert solve(problem, policy=policy, parameters=hasty).termination is Termination.DEADLINE


def test_an_unknown_solver_is_refused() -> None:
    problem = Problem(Cluster.uniform(4, 2), Demand.of([9, 8, 7, 5, 3, 1, 1]))
    with pytest.raises(ProblemError, match="must be cpsat, highs, cbc, or one of"):
        solve(problem, policy="ilp", parameters=SolveParameters(solver="nonesuch"))


def test_layers_share_a_deadline() -> None:
    rng = np.random.default_rng(3)
    easy = [Problem(Cluster.uniform(4, 4), Demand.of(rng.integers(1, 100, 12))) for _ in range(3)]
    loads = (np.arange(1, 97) ** -0.6 * 1e5).astype(np.int64)
    hard = Problem(Cluster.uniform(54, 2), Demand.of(loads))
    first = solve(hard, parameters=SolveParameters(work_limit=0))
    problems = [*easy, hard]
    parameters = SolveParameters(work_limit=2_000)
    alone = [solve(problem, parameters=parameters) for problem in problems]
    together = solve_layers(problems, parameters=parameters)
    assert [plan.layout for plan in together] == [plan.layout for plan in alone]
    assert [plan.termination for plan in together] == [plan.termination for plan in alone]
    timed = solve_layers(problems, parameters=SolveParameters(deadline_s=1.0, work_limit=10**9))
    assert [plan.mean_imbalance for plan in timed[:3]] == [plan.mean_imbalance for plan in alone[:3]]
    # What the easy layers left, the hard one used; a deadline too short for any search still gives every layer a plan.
    assert timed[3].mean_imbalance < first.mean_imbalance
    assert len(solve_layers(problems, parameters=SolveParameters(deadline_s=1e-6))) == 4
