"""Replays: the real program on the real trace, and what the rule of when to move must never do."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.repository import TRACE

from moeplan.api.job_plans import Reason
from moeplan.api.jobs import Forecast, JobSpec, Payback, Replan
from moeplan.planner.jobs.job_plan import Candidate, decide, initial_plan, move_time_s
from moeplan.planner.studies import replay as replaying
from moeplan.planner.studies.replay import Outcome, Strategy, replay, usual_strategies
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, ExpertSpec, Layout, Link, SolveParameters
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.split_rules import SplitRule

SIZES = ("--devices", "16", "--slots", "5", "--nodes", "2", "--layers", "0", "--work-limit", "100")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The first 40 steps of the trace."""
    np.savez(tmp_path / "short.npz", counts=np.load(TRACE)["counts"][:40])
    return tmp_path / "short.npz"


def run(trace: Path, *arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "moeplan.planner.commands.main", "replay", *map(str, (trace, *SIZES, *arguments))],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_program_replays_a_trace(trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    found = json.loads(run(trace, "--look", 5, "--log", log, "--format", "json"))["strategies"]
    by_name = {strategy["strategy"]: strategy for strategy in found}
    static, pays = by_name["static"], by_name["hybrid when it pays"]
    steps = Trace.open(trace).steps
    for strategy in found:
        assert strategy["total_s"] == pytest.approx(sum(strategy["step_s"]))
        assert strategy["total_s"] == pytest.approx(strategy["compute_s"] + strategy["traffic_s"] + strategy["moves_s"])
        assert len(strategy["step_s"]) == steps
        assert strategy["imbalance"]["mean"] >= 1
        assert (strategy["moves_s"] > 0) == (strategy["moved_replicas"] > 0) == (strategy["plans_taken"] > 0)
    assert static["plans_taken"] == 0
    assert pays["total_s"] < min(s["total_s"] for name, s in by_name.items() if name != "hybrid when it pays")
    decisions = [json.loads(line) for line in log.read_text().splitlines()]
    assert {decision["strategy"] for decision in decisions} == by_name.keys() - {"static"}
    assert {decision["reason"] for decision in decisions} <= {reason.value for reason in Reason}
    mine = [decision for decision in decisions if decision["strategy"] == "hybrid when it pays"]
    assert [decision["step"] for decision in mine] == list(range(4, steps, 5))
    assert sum(decision["changed_layers"] > 0 for decision in mine) == pays["plans_taken"]


def test_the_program_prints_a_table_and_refuses_bad_input(trace: Path) -> None:
    table = run(trace, "--every", "30", "--look", "30")
    assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [
        "static",
        "eplb every 30",
        "hybrid every step",
        "hybrid every 30",
        "hybrid when it pays",
    ]
    assert "--look" in run(trace, "--look", "0", code=2)
    assert "--tflops" in run(trace, "--tflops", "0", code=2)
    assert "--inter-gbps = 0.0" in run(trace, "--inter-gbps", "0", code=2)


def job(*, bytes_per_s: float = 50e9, horizon: int = 20, factor: float = 1.0) -> JobSpec:
    cluster = Cluster.uniform(4, 3, nodes=2, inter_node=Link(bytes_per_s))
    return JobSpec(
        cluster,
        layers=1,
        experts=8,
        ranks=4,
        initial=(Layout.contiguous(8, cluster.slots),),
        expert=ExpertSpec(weight_bytes=1_000_000, seconds_per_token=1e-6),
        parameters=SolveParameters(work_limit=200),
        forecast=Forecast(window_steps=4),
        replan=Replan(every_steps=1, payback=Payback(horizon, factor)),
    )


def outcome(spec: JobSpec, steps: Iterator[Int64]) -> Outcome:
    return replay(steps, [Strategy("pays", spec)])[0]


def steady(count: int) -> Iterator[Int64]:
    """The same skewed step over and over."""
    tokens = np.array([400, 300, 10, 10, 10, 10, 10, 10])
    return iter([np.tile(tokens, (1, 4, 1))] * count)


def restless(count: int) -> Iterator[Int64]:
    """Another skew every three steps."""
    rng = np.random.default_rng(5)
    skews = rng.lognormal(3, 1, (count // 3, 8))
    return iter([rng.poisson(skew, (1, 4, 8)) for skew in skews for _ in range(3)])


def test_a_steady_load_is_moved_for_once() -> None:
    found = outcome(job(), steady(12))
    assert [decision.changed_layers for decision in found.decisions] == [1] + [0] * 11
    assert found.decisions[0].reason is Reason.GAIN_PAYS
    assert found.steps[1].moves_s == found.decisions[0].move_cost_s > 0
    assert all(step.moves_s == 0 for step in found.steps[2:])
    assert found.steps[-1].imbalance < 1.01 < found.steps[0].imbalance


def test_a_move_that_costs_more_than_the_horizon_gains_is_never_made() -> None:
    found = outcome(job(bytes_per_s=1e6), steady(12))
    assert found.plans_taken == found.moved_replicas == 0
    assert {decision.reason for decision in found.decisions} == {Reason.GAIN_TOO_SMALL}
    patient = outcome(job(bytes_per_s=1e6, horizon=100_000), steady(12))
    assert patient.plans_taken == 1


def test_caution_moves_less() -> None:
    moves = [outcome(job(factor=factor), restless(30)).plans_taken for factor in (0.0, 20.0, 1e6)]
    assert moves[0] > moves[1] >= moves[2] == 0


@settings(max_examples=60)
@given(
    before=st.floats(1e-6, 1e-2),
    after=st.floats(1e-6, 1e-2),
    horizon=st.integers(1, 1_000),
    factor=st.floats(0, 4),
    bytes_per_s=st.sampled_from([1e6, 1e8, 1e10]),
)
def test_a_plan_is_taken_exactly_if_its_gain_pays(
    before: float, after: float, horizon: int, factor: float, bytes_per_s: float
) -> None:
    spec = job(bytes_per_s=bytes_per_s, horizon=horizon, factor=factor)
    new = Layout(np.array([[0, 1, 2], [2, 3, 0], [4, 5, 0], [6, 7, 0]], np.int32), 8)
    candidate = Candidate(0, new, SplitRule.OPTIMAL, after, 1.0, 0.0, 1.0, before, 1.5, 0.0)
    decision, layers = decide(spec, initial_plan(spec, 1, 1), [candidate], step=3, window_steps=4)
    seconds, moved = move_time_s(spec.cluster, spec.moved_bytes, spec.initial[0], new)
    assert moved > 0
    pays = before > after and (before - after) * horizon > factor * seconds
    assert decision.changed_layers == pays == (layers[0].layout == new)
    assert (decision.reason is Reason.GAIN_PAYS) == pays
    assert decision.cost_after_s == (after if pays else before)


def test_a_replay_repeats_itself_and_strategies_do_not_touch_each_other() -> None:
    steps = [step[:1] for step in Trace.open(TRACE).read(0, 15)]
    cluster = Cluster.uniform(16, 5, nodes=2)
    spec = JobSpec(
        cluster,
        layers=1,
        experts=64,
        ranks=16,
        initial=(Layout.contiguous(64, cluster.slots),),
        expert=ExpertSpec(weight_bytes=10**7, token_bytes=4096, seconds_per_token=1e-7),
        parameters=SolveParameters(work_limit=100),
    )
    strategies = usual_strategies(spec, every=5, look=3, horizon=20, caution=1.0)
    together = replay(steps, strategies)
    for strategy, one in zip(strategies, together, strict=True):
        assert costs(replay(steps, [strategy])[0]) == costs(one)
    always = replay(steps, [replace(strategies[2], name="again")])[0]
    assert costs(always) == costs(together[2])


def costs(found: Outcome) -> list[Any]:
    return [(step.compute_s, step.traffic_s, step.moves_s, step.imbalance) for step in found.steps]


def test_a_window_larger_than_memory_is_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = [Strategy("pays", replace(job(), forecast=Forecast(window_steps=20)))]
    (at_once,) = replay(restless(60), strategies)
    monkeypatch.setattr(replaying, "MOST_BYTES", 1)
    (in_a_file,) = replay(restless(60), strategies)
    assert costs(in_a_file) == costs(at_once)
    assert in_a_file.decisions == at_once.decisions


def test_strategies_share_the_steps_of_their_windows() -> None:
    experts, window = 2**13, 30
    cluster = Cluster.uniform(4, experts // 4)
    initial = (Layout.contiguous(experts, cluster.slots),)
    spec = JobSpec(
        cluster,
        layers=1,
        experts=experts,
        ranks=4,
        initial=initial,
        forecast=Forecast(window_steps=window),
        replan=Replan(every_steps=1_000),
    )
    step = np.ones((1, 4, experts), np.int64)
    tracemalloc.start()
    replay((step.copy() for _ in range(40)), [Strategy(name, spec) for name in "abcd"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * window * step.nbytes
