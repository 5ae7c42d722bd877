"""`moeplan plan`, `compare`, the planning of a job and a daemon: from the same steps the same layout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.daemon import DaemonProcess, Rank, eventually
from tests.support.repository import TRACE

from moeplan.api.job_plans import JobPlan
from moeplan.api.jobs import Closing, Forecast, JobSpec, Replan
from moeplan.planner.files.plan_file import PlanFile
from moeplan.planner.jobs.job import PlanningJob
from moeplan.planner.jobs.solve import LayersTask, plan_layers
from moeplan.planner.jobs.window import Cells, Report
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Layout, SolveParameters, SplitRule

STEPS, BETWEEN = 10, 15
DEVICES, SLOTS, WORK = 16, 5, 300


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded trace, cut after its second window and the step that judges it."""
    path = tmp_path_factory.mktemp("trace") / "cut.npz"
    np.savez(path, counts=np.stack(list(Trace.open(TRACE).read(0, STEPS + BETWEEN + 1))))
    return path


def command(name: str, trace: Path, rule: str | None, *arguments: object) -> Any:
    """What a command answers on the small cluster, as JSON."""
    sizes = ("--devices", DEVICES, "--slots", SLOTS, "--window", STEPS, "--work-limit", WORK, "--format", "json")
    asked = () if rule is None else ("--split-rule", rule)
    program = [sys.executable, "-m", "moeplan.planner.commands.main", name, str(trace)]
    done = subprocess.run(
        [*program, *map(str, (*sizes, *asked, *arguments))], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def job(current: Mapping[int, Layout], rule: SplitRule | None, sources: int) -> JobSpec:
    """The same as a job that looks once its window is full."""
    return JobSpec(
        Cluster.uniform(DEVICES, SLOTS),
        layers=len(current),
        experts=current[0].experts,
        ranks=sources,
        initial=tuple(current[layer] for layer in sorted(current)),
        parameters=SolveParameters(work_limit=WORK),
        forecast=Forecast(window_steps=STEPS),
        replan=Replan(every_steps=STEPS),
        closing=Closing(max_lag_steps=STEPS, timeout_s=600, quorum=1.0),  # on a busy machine a stream may fall behind
        split_rule=rule,
    )


def by_state_machine(spec: JobSpec, steps: list[Any]) -> JobPlan:
    """The plan of a job that is told these steps."""
    state = PlanningJob.begin(spec, incarnation=1)
    cells = Cells.of(np.arange(spec.layers), np.arange(spec.ranks))
    for number, tokens in enumerate(steps):
        task = state.report(Report(number, cells, tokens), now_s=float(number))
    assert task is not None, "the window is full"
    candidates = plan_layers(
        LayersTask(task.layers, task.outlooks, task.policy, task.parameters, time.monotonic() + 1e6)
    )
    plan = state.solved(task, candidates, solve_s=0.0)
    assert plan is not None
    return plan


def by_daemon(daemon: DaemonProcess, name: str, spec: JobSpec, steps: list[Any]) -> JobPlan:
    """The plan of a daemon that ranks tell these steps."""
    with daemon.client() as client:
        client.create_job(name, spec)
        ranks = [Rank(client, f"jobs/{name}", rank) for rank in range(spec.ranks)]
        for rank in ranks:
            rank.next("welcome")
        for number, tokens in enumerate(steps):
            for index, rank in enumerate(ranks):
                rank.report(number, tokens[:, index : index + 1])
        plan: JobPlan = eventually(lambda: (found := client.plan(f"jobs/{name}/plans/-")).version > 1 and found)
        for rank in ranks:
            rank.close()
    return plan


@pytest.mark.parametrize("rule", [None, pytest.param(SplitRule.EVEN, marks=pytest.mark.slow)])
def test_the_same_window_gives_the_same_layout(
    daemon: DaemonProcess, trace: Path, tmp_path: Path, rule: SplitRule | None
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    end = STEPS + BETWEEN
    plans = [
        command("plan", trace, rule, "--until", STEPS, "-o", first),
        command("plan", trace, rule, "--until", end, "--current", first, "-o", second),
    ]
    (compared,) = command("compare", trace, rule, "--policies", "hybrid", "--every", BETWEEN)["policies"]
    fitted = [layer["imbalance"] for plan in plans for layer in plan["layers"]]
    after = [layer["next_step"]["imbalance"] for plan in plans for layer in plan["layers"]]
    assert compared["fitted"] == {
        "mean": float(np.mean(fitted)),
        "p95": float(np.quantile(fitted, 0.95)),
        "max": max(fitted),
    }
    judged = compared["next_step"]["even" if rule is SplitRule.EVEN else "optimal"]
    assert judged["mean"] == float(np.mean(after))

    current, planned = PlanFile.read(first).layouts, PlanFile.read(second).layouts
    steps = list(Trace.open(trace).read(end - STEPS, end))
    spec = job(current, rule, sources=steps[0].shape[1])
    told = by_state_machine(spec, steps)
    assert any(layer.layout != current[layer.layer] for layer in told.layers), "something is to be planned"
    served = by_daemon(daemon, f"one-forecast-{rule or 'own'}", spec, steps)
    for layer in range(spec.layers):
        assert told.layers[layer].layout == planned[layer]
        assert served.layers[layer].layout == planned[layer]
