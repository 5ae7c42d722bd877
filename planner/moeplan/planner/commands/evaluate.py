"""`moeplan evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import (
    CLUSTER,
    PROBLEM,
    Deadline,
    ForecastBy,
    Format,
    MaxMoves,
    Nodes,
    Output,
    Seed,
    TraceFile,
    WindowSteps,
    Work,
    positive,
    print_json,
    solve_parameters,
)
from moeplan.planner.commands.time_model import Hidden, InterGbps, Intermediate, IntraGbps, Tflops, TimeModel
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import Forecast, ForecastMethod
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(evaluate)


def evaluate(
    trace: TraceFile,
    layout: Annotated[
        Path,
        typer.Option(
            help="Layouts in force: a plan file, or the file of sglang, vllm, tensorrt-llm or vllm-ascend.",
            rich_help_panel=PROBLEM,
            show_default=False,
        ),
    ],
    devices: Annotated[
        int | None, typer.Option(help="Devices, where the file does not tell.", rich_help_panel=CLUSTER)
    ] = None,
    nodes: Nodes = 1,
    hidden: Hidden = 7168,
    intermediate: Intermediate = 2048,
    tflops: Tflops = 400.0,
    intra_gbps: IntraGbps = 400.0,
    inter_gbps: InterGbps = 50.0,
    split_rule: Annotated[
        SplitRule,
        typer.Option(
            "--split-rule", help="How the system divides tokens; engines do it evenly.", rich_help_panel=PROBLEM
        ),
    ] = SplitRule.EVEN,
    window: WindowSteps = 10,
    until: Annotated[
        int | None,
        typer.Option(
            help="Step of the trace, from 0, that the window ends before and that judges; by default the last one.",
            rich_help_panel=PROBLEM,
        ),
    ] = None,
    forecast: ForecastBy = ForecastMethod.SCENARIOS,
    max_moves: MaxMoves = None,
    deadline_ms: Deadline = None,
    work_limit: Work = None,
    seed: Seed = 0,
    output: Output = Format.TABLE,
) -> None:
    """Judge layouts that are in force, and say what a new plan would gain.

    Both are judged on what the window forecasts and on the step after it, which neither knows. Imbalance is the largest
    load of a device over the mean: 1.0 is perfect. `bound` is proven: no layout and split of these slots is better.
    Seconds are those of the model of time, and say after how many steps moving pays.
    """
    from dataclasses import replace

    from moeplan.planner.commands.tables import show_evaluation
    from moeplan.planner.commands.terminal import compiling, progress
    from moeplan.planner.exports.engines import read_any
    from moeplan.planner.studies.evaluating import in_force, verdict
    from moeplan.planner.studies.planning import PlanRequest, plan_trace
    from moeplan.planner.studies.warming import load_kernels
    from moeplan.planner.traces.trace import Trace

    opened = Trace.open(trace)
    current = in_force(layout, read_any(layout, devices), opened)
    first = next(iter(current.values()))
    if devices not in (None, first.devices):
        raise ProblemError("--devices", devices, f"{layout} has {first.devices}")
    model = TimeModel(hidden, intermediate, tflops, intra_gbps, inter_gbps)
    expert = model.expert if opened.sources > 1 else replace(model.expert, token_bytes=0)
    request = PlanRequest(
        opened,
        sorted(current),
        model.cluster(first.devices, first.slots.shape[1], nodes),
        expert=expert,
        parameters=solve_parameters(deadline_ms, work_limit, seed),
        forecast=Forecast(forecast, window_steps=positive("--window", window)),
        until=opened.steps - 1 if until is None and opened.steps > 1 else until,
        split_rule=split_rule,
        current=current,
        max_moves=max_moves,
    )
    with compiling():
        load_kernels(request.policy)
    with progress("planning anew", len(request.layers)) as advance:
        planned = plan_trace(request, on_plan=advance)
    found = verdict(request, planned)
    if output is Format.JSON:
        print_json(found)
        return
    show_evaluation(f"{layout}: {len(planned)} layers under the {split_rule.value} split", found, output)
    if output is Format.TABLE:
        print(f"seconds: {model}")
