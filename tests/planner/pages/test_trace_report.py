"""The report's numbers are those of the trace, and its file needs nothing and runs nothing but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.api.jobs import JobSpec
from moeplan.planner.files.plan_file import PlanFile, plan_document, write
from moeplan.planner.pages import trace_report
from moeplan.planner.pages.frame import self_contained
from moeplan.planner.pages.trace_report import Rhythm, holding, trace_document, usual
from moeplan.planner.studies.replay import replay
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, ExpertSpec, Layout, Problem, SolveParameters, solve

LAYERS = (0, 2)
RHYTHM = Rhythm(every=3, window=4)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """Twelve skewed steps of three layers, with a name that is an attack."""
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.lognormal(3, 1, (3, 1, 8)), (12, 3, 4, 8))
    path = tmp_path / "<img src=x onerror=alert(1)>.npz"
    np.savez(path, counts=counts.astype(np.uint16))
    return Trace.open(path)


def job(trace: Trace) -> JobSpec:
    cluster = Cluster.uniform(4, 3)
    return JobSpec(
        cluster,
        layers=len(LAYERS),
        experts=trace.experts,
        ranks=trace.sources,
        initial=(Layout.contiguous(trace.experts, cluster.slots),) * len(LAYERS),
        expert=ExpertSpec(weight_bytes=1000, token_bytes=10, seconds_per_token=1e-6),
        parameters=SolveParameters(work_limit=200),
    )


def unpacked(packed: Any) -> Any:
    data = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(data, packed["dtype"]).reshape(packed["shape"])


def test_every_token_of_the_trace_is_on_one_device_of_each_strategy(trace: Trace) -> None:
    shown = usual(job(trace), RHYTHM)
    document: Any = trace_document(trace, LAYERS, shown, cost_text="a model")
    (chunk,) = document["chunks"]
    demand = np.stack([step[list(LAYERS)].sum(axis=1) for step in trace.read()])
    np.testing.assert_array_equal(unpacked(chunk["demand"]), demand)
    assert chunk["steps"] == list(range(12))
    outcomes = replay((step[list(LAYERS)] for step in trace.read()), [one.strategy for one in shown])
    for strategy, outcome in zip(chunk["strategies"], outcomes, strict=True):
        loads, layouts = unpacked(strategy["loads"]), unpacked(strategy["layouts"])
        for step in range(12):
            for layer in range(len(LAYERS)):
                experts, tokens = layouts[strategy["version"][step], layer], loads[step, layer]
                assert (tokens[experts < 0] == 0).all()
                there = np.bincount(experts[experts >= 0], tokens[experts >= 0], minlength=8)
                np.testing.assert_array_equal(there, demand[step, layer])
            by_device = loads[step].sum(axis=2)
            imbalance = (by_device.max(axis=1) / by_device.mean(axis=1)).mean()
            assert imbalance == pytest.approx(outcome.steps[step].imbalance)
        for name in ("compute", "traffic", "moves"):
            found = [getattr(step, f"{name}_s") for step in outcome.steps]
            assert strategy["seconds"][name] == pytest.approx(found, rel=1e-5)
        lost = (1e-6 * 3 * (loads.sum(axis=3).max(axis=2) - loads.sum(axis=3).mean(axis=2))).sum(axis=1)
        assert strategy["seconds"]["lost"] == pytest.approx(lost, rel=1e-5, abs=1e-12)
    decisions = [row for row in document["plans"] if row["strategy"] == 2]
    assert [row["step"] for row in decisions] == [decision.step for decision in outcomes[2].decisions] == [2, 5, 8, 11]
    assert sum(row["moved"] for row in decisions) == outcomes[2].moved_replicas


def test_of_a_long_trace_some_steps_are_shown_and_seconds_are_of_all(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Any = trace_document(trace, LAYERS, usual(job(trace), RHYTHM), cost_text="")
    monkeypatch.setattr(trace_report, "MOST_NUMBERS", 3 * 2 * (8 + 3 * 12))  # three steps
    thin: Any = trace_document(trace, LAYERS, usual(job(trace), RHYTHM), cost_text="")
    assert thin["head"]["thinned"] == 4
    assert thin["chunks"][0]["steps"] == [0, 4, 8]
    for few, all_ in zip(thin["chunks"][0]["strategies"], whole["chunks"][0]["strategies"], strict=True):
        np.testing.assert_array_equal(unpacked(few["loads"]), unpacked(all_["loads"])[::4])
        for name in ("compute", "lost", "traffic", "moves"):
            assert sum(few["seconds"][name]) == pytest.approx(sum(all_["seconds"][name]), rel=1e-4)


def test_a_plan_is_held_from_the_first_step_to_the_last(trace: Trace, tmp_path: Path) -> None:
    plans = {}
    for layer in LAYERS:
        tokens = np.stack([step[layer] for step in trace.read()])
        parameters = SolveParameters(work_limit=200)
        plans[layer] = solve(Problem(Cluster.uniform(4, 3), Demand.of(tokens)), parameters=parameters)
    write(tmp_path / "plan.json", plan_document(plans))
    held = PlanFile.read(tmp_path / "plan.json")
    document: Any = trace_document(trace, LAYERS, holding(job(trace), RHYTHM, held, LAYERS), cost_text="")
    mine = document["chunks"][0]["strategies"][2]
    assert mine["version"] == [0] * 12
    np.testing.assert_array_equal(unpacked(mine["layouts"])[0], [plans[layer].layout.slots for layer in LAYERS])
    (row,) = [row for row in document["plans"] if row["strategy"] == 2]
    assert row["reason"] == "held"
    assert [layer["predicted"] for layer in row["layers"]] == [plans[layer].mean_imbalance for layer in LAYERS]


def test_the_page_holds_all_it_needs_and_names_cannot_leave_their_place(trace: Trace) -> None:
    document = trace_document(trace, LAYERS, usual(job(trace), RHYTHM), cost_text="</script><script>alert(1)</script>")
    page = self_contained(document)
    assert "<img src=x" not in page
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.S)
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", markup)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert len(scripts) == policy.count("'sha256-") - 1  # the other is the style's
    (data,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', page, re.S)
    assert json.loads(data)["head"]["title"] == trace.path.name
