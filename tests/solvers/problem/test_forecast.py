"""Objectives over scenarios, and scenarios widened from a window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.instances import all_layouts

from moeplan.solvers import Cluster, Demand, Problem, ProblemError, SolveParameters, evaluate, solve, solve_anytime
from moeplan.solvers.objective.score import risk
from moeplan.solvers.problem.forecast import AS_DRAWN, FEW_SOURCES, Widening, forecast, widened
from moeplan.solvers.problem.forecast_spec import Forecast, ForecastMethod

VALUES = st.lists(st.tuples(st.floats(1, 10), st.floats(0.01, 1)), min_size=1, max_size=8)


@given(VALUES, st.floats(0.01, 1))
def test_the_tail_mean_is_conditional_value_at_risk(pairs: list[tuple[float, float]], tail: float) -> None:
    value = np.array([value for value, _ in pairs])
    weights = np.array([weight for _, weight in pairs])
    weights /= weights.sum()
    # Rockafellar and Uryasev: the least of eta + E[max(0, value - eta)] / tail, attained at one of the values.
    expected = min(eta + weights @ np.maximum(0, value - eta) / tail for eta in value)
    assert risk(value, weights, tail) == pytest.approx(expected, rel=1e-9)


def test_tails_between_mean_and_maximum() -> None:
    value, weights = np.array([1.0, 4.0, 2.0]), np.array([0.5, 0.25, 0.25])
    assert risk(value, weights, 1.0) == 2.0
    assert risk(value, weights, 0.5) == 3.0
    assert risk(value, weights, 0.75) == pytest.approx((0.25 * 4 + 0.25 * 2 + 0.25 * 1) / 0.75)
    assert risk(value, weights, 0.1) == 4.0
    assert risk(value, weights, 1e-9) == 4.0


def _least_risk(problem: Problem) -> float:
    return min(
        risk(evaluate(problem, layout).imbalance, problem.demand.weights, problem.tail)
        for layout in all_layouts(problem.experts, problem.capacity)
    )


@pytest.mark.parametrize("tail", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_hybrid_comes_close_to_the_least_risk(tail: float, seed: int) -> None:
    tokens = np.random.default_rng(seed).lognormal(4, 1.2, (5, 1, 5)).astype(np.int64)
    demand = Demand.of(tokens, np.array([0.1, 0.2, 0.1, 0.3, 0.3]))
    problem = Problem(Cluster.uniform(3, 2), demand, tail=tail)
    plan = solve(problem, policy="hybrid", parameters=SolveParameters(work_limit=3_000, target_gap=0))
    assert 1 - 1e-9 <= risk(plan.imbalance, demand.weights, tail) / _least_risk(problem) <= 1.02


@pytest.mark.parametrize("solver", ["cpsat", "highs", "cbc"])
@pytest.mark.parametrize("tail", [0.7, 0.2])
@pytest.mark.parametrize("speed", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("seed", range(2))
def test_exact_models_find_the_least_risk(solver: str, tail: float, speed: tuple[float, ...], seed: int) -> None:
    tokens = np.random.default_rng(seed).lognormal(7, 1.2, (4, 1, 5)).astype(np.int64)
    tokens[1] *= seed  # a scenario without tokens is balanced
    demand = Demand.of(tokens, np.array([0.1, 0.3, 0.2, 0.4]))
    cluster = Cluster(np.full(3, 2), np.zeros(3, int), np.array(speed))
    problem = Problem(cluster, demand, tail=tail)
    plan = solve(problem, policy="ilp", parameters=SolveParameters(solver=solver, target_gap=0))
    least = _least_risk(problem)
    assert plan.objective == risk(plan.imbalance, demand.weights, tail)
    assert plan.objective == pytest.approx(least, rel=1e-3)  # whole tokens
    assert plan.objective >= least * (1 - 1e-9)
    assert least * 0.99 <= plan.bound <= least * (1 + 1e-9) or solver == "cbc"  # which does not say its bound


def test_anytime_never_raises_the_risk() -> None:
    tokens = np.random.default_rng(3).lognormal(4, 1.5, (6, 1, 12)).astype(np.int64)
    problem = Problem(Cluster.uniform(6, 3), Demand.of(tokens), tail=0.3)
    plans = list(solve_anytime(problem, policy="hybrid", parameters=SolveParameters(work_limit=3_000, target_gap=0)))
    assert len(plans) > 1
    assert [plan.objective for plan in plans] == sorted((plan.objective for plan in plans), reverse=True)
    assert all(plan.bound <= plan.objective and plan.objective >= plan.mean_imbalance - 1e-9 for plan in plans)


def test_a_tail_gives_up_the_mean_for_the_worst() -> None:
    """Two steps of three like (9, 1, ...), one like (1, 9, ...): the tail looks at whichever is served worst."""
    tokens = np.array([[90, 10, 30, 30], [90, 10, 30, 30], [10, 90, 60, 60]])[:, np.newaxis]
    means, worsts = [], []
    for tail in (1.0, 0.1):
        plan = solve(Problem(Cluster.uniform(2, 2), Demand.of(tokens), tail=tail), policy="hybrid")
        means.append(plan.mean_imbalance)
        worsts.append(plan.imbalance.max())
    assert means[0] <= means[1]
    assert worsts[1] <= worsts[0]


@pytest.mark.parametrize("tail", [0.0, -0.1, 1.1, float("nan")])
def test_a_tail_is_a_part(tail: float) -> None:
    with pytest.raises(ProblemError, match="tail"):
        Problem(Cluster.uniform(2, 2), Demand.of([1, 2]), tail=tail)


WINDOWS = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).poisson(50, np.random.default_rng(seed).integers(1, 9, 3))
)


@settings(max_examples=50)
@given(WINDOWS, st.floats(0, 3), st.floats(0, 1))
def test_widened_scenarios_are_a_demand_of_the_same_shape(
    window: np.ndarray[tuple[int, ...], np.dtype[np.int64]], spread: float, together: float
) -> None:
    widening = Widening(8, 0.4, spread, together, seed=3)
    demand = widened(window, widening)
    assert demand.tokens.shape == (8 if len(window) > 1 else 1, *window.shape[1:])
    assert np.array_equal(demand.tokens, widened(window, widening).tokens)
    assert (demand.tokens[:, window.sum(axis=0) == 0] == 0).all()


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 4), st.floats(0.1, 1))
def test_the_mean_of_sources_drawn_anew_is_that_of_the_steps(seed: int, spread: float, newest: float) -> None:
    rng = np.random.default_rng(seed)
    shape = rng.integers([2, FEW_SOURCES, 1], [9, 20, 9])
    window = rng.poisson(rng.lognormal(2, 2, shape))  # a few sources have most of an expert's tokens
    window[:, :, rng.random(shape[2]) < 0.2] = 0
    steps = widened(window, Widening(24, newest, spread=0)).tokens
    demand = widened(window, Widening(24, newest, spread))
    assert (demand.tokens >= 0).all()
    assert (demand.tokens[steps == 0] == 0).all(), "sources keep to the experts that they route to"
    error = demand.loads().mean(axis=0) - steps.sum(axis=1).mean(axis=0)
    assert (np.abs(error) <= shape[1] / 2 + 1e-6).all(), "but for the rounding of each cell"
    assert np.array_equal(demand.tokens, widened(window, Widening(24, newest, spread)).tokens)


def test_sources_drawn_anew_differ_as_steps_do() -> None:
    """Experts that a source routes to together rise and fall together, as far as steps do, times a constant."""
    rng = np.random.default_rng(0)
    topic = rng.lognormal(0, 0.8, (8, 64, 1))
    window = (1e4 * np.concatenate([topic, topic, rng.lognormal(0, 0.8, (8, 64, 1))], axis=2)).astype(np.int64)
    loads = window.sum(axis=1)
    drawn = widened(window, Widening(400, newest=1.0)).loads() / loads[-1]
    correlation = np.corrcoef(drawn.T)
    assert correlation[0, 1] > 0.99
    assert abs(correlation[0, 2]) < 0.5
    error = window[-1].std(axis=0) / window[-1].mean(axis=0) / np.sqrt(64)
    assert drawn.std(axis=0) == pytest.approx(AS_DRAWN * error, rel=0.25)


def test_what_sources_always_do_is_not_drawn() -> None:
    """Sources that route to experts of their own, the same in every step, leave nothing to chance."""
    step = np.random.default_rng(0).integers(0, 1_000, (8, 16))
    assert np.array_equal(widened(np.stack([step] * 5)).tokens, np.stack([step] * Widening().scenarios))


def test_few_sources_change_as_steps_did() -> None:
    """With fewer sources than can be drawn from, it does not matter which of them the tokens are from."""
    window = np.random.default_rng(0).integers(100, 10_000, (6, 1, 8)) * 2
    halves = np.concatenate([window // 2, window // 2], axis=1)
    assert np.abs(widened(halves).loads() - widened(window).loads()).max() <= 2
    steps = widened(window, Widening(spread=0)).loads()
    assert len(np.unique(widened(window).loads()[:, 0])) > len(np.unique(steps[:, 0]))


def test_newer_steps_more_often() -> None:
    window = np.arange(1, 5)[:, np.newaxis, np.newaxis] * np.ones((1, 1, 3), np.int64)
    steps, often = np.unique(widened(window, Widening(16, 0.5, spread=0)).tokens[:, 0, 0], return_counts=True)
    assert dict(zip(steps.tolist(), often.tolist(), strict=True)) == {1: 1, 2: 2, 3: 4, 4: 9}


def test_scenarios_spread_as_the_window_does() -> None:
    """Experts that rise and fall together do so in every scenario, or each by itself, as asked."""
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.2, 400)
    loads = np.exp(np.stack([wave, wave, -wave, rng.normal(0, 0.2, 400)], axis=1)) * 1e6
    window = loads.astype(np.int64)[:, np.newaxis]
    drawn = widened(window, Widening(400, newest=1.0, spread=1.0, together=1.0)).loads()
    change = np.log(drawn / loads[-1])
    correlation = np.corrcoef(change.T)
    assert correlation[0, 1] > 0.99
    assert correlation[0, 2] < -0.99
    assert abs(correlation[0, 3]) < 0.6
    assert change.std(axis=0) == pytest.approx(np.full(4, 0.2), rel=0.25)
    assert abs(change.mean()) < 1e-3
    alone = np.log(widened(window, Widening(400, newest=1.0, spread=2.0, together=0.0)).loads() / loads[-1])
    assert abs(np.corrcoef(alone.T)[0, 1]) < 0.2
    assert alone.std(axis=0) == pytest.approx(np.full(4, 0.4), rel=0.25)


@pytest.mark.parametrize(
    ("field", "values"),
    [("scenarios", [0, 3, 10_000]), ("newest", [0, 1.5]), ("spread", [-1, float("inf")]), ("together", [-1, 2])],
)
def test_widening_names_what_is_wrong(field: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ProblemError, match=f"widening.{field}"):
            Widening(**{field: value})  # type: ignore[arg-type]


def test_methods_by_hand() -> None:
    window = np.array([[[0, 10]], [[4, 10]], [[8, 40]]])
    assert forecast(window, Forecast(ForecastMethod.LAST)).tokens.tolist() == [[[8, 40]]]
    assert forecast(window, Forecast(ForecastMethod.MEAN)).tokens.tolist() == [[[4, 20]]]
    assert forecast(window, Forecast(ForecastMethod.EMA, smoothing=0.5)).tokens.tolist() == [[[5, 25]]]
    assert forecast(window, Forecast(ForecastMethod.STEPS, window_steps=2)).tokens.tolist() == [[[4, 10]], [[8, 40]]]
    scenarios = forecast(window)
    assert scenarios.tokens.shape == (Widening().scenarios, 1, 2)
    assert np.array_equal(scenarios.tokens, widened(window).tokens)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ProblemError, match="must be one of last, mean, ema, steps, scenarios"):
        Forecast(method="guess")  # type: ignore[arg-type]
