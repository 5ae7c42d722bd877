"""`moeplan replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import (
    OUTPUT,
    PROBLEM,
    Devices,
    ForecastBy,
    Format,
    Layers,
    MaxMoves,
    Nodes,
    Output,
    Seed,
    Slots,
    Split,
    TraceFile,
    WindowSteps,
    Work,
    layer_numbers,
    positive,
    print_json,
    solve_parameters,
    writable,
)
from moeplan.planner.commands.time_model import Hidden, InterGbps, Intermediate, IntraGbps, Tflops, TimeModel
from moeplan.solvers.problem.forecast_spec import ForecastMethod

__all__ = ["register"]

QUICK = 2_000
"""Candidates per plan: a replay makes many."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(replay)


def replay(
    trace: TraceFile,
    devices: Devices,
    slots: Slots,
    nodes: Nodes = 1,
    hidden: Hidden = 7168,
    intermediate: Intermediate = 2048,
    tflops: Tflops = 400.0,
    intra_gbps: IntraGbps = 400.0,
    inter_gbps: InterGbps = 50.0,
    window: WindowSteps = 10,
    every: Annotated[
        int,
        typer.Option(help="Steps between plans of the strategies that plan every so often.", rich_help_panel=PROBLEM),
    ] = 20,
    look: Annotated[
        int,
        typer.Option(help="Steps between looks of the strategy that moves when it pays.", rich_help_panel=PROBLEM),
    ] = 1,
    horizon: Annotated[
        int, typer.Option(help="Steps over which a gain counts against the time to move.", rich_help_panel=PROBLEM)
    ] = 20,
    caution: Annotated[
        float,
        typer.Option(help="How many times over the predicted gain must pay the move.", rich_help_panel=PROBLEM),
    ] = 1.0,
    forecast: ForecastBy = ForecastMethod.SCENARIOS,
    split_rule: Split = None,
    layers: Layers = None,
    max_moves: MaxMoves = None,
    work_limit: Work = QUICK,
    seed: Seed = 0,
    log: Annotated[
        Path | None,
        typer.Option(help="File for every decision and why, one JSON object a line.", rich_help_panel=OUTPUT),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Replay a trace as a job: what each rule of when to re-plan would have cost.

    The daemon's own planning runs step by step over the trace: always, never, every --every steps, and when the gain
    over --horizon steps pays for sending the weights. Time is modelled: compute (three forward times), four exchanges
    of tokens, and the weights that move, which the next step waits for. The defaults of the model are an expert of
    DeepSeek-V3 on H200s.
    """
    from moeplan.api.jobs import Forecast, JobSpec
    from moeplan.planner.commands.tables import show_replay
    from moeplan.planner.commands.terminal import compiling, progress
    from moeplan.planner.studies.replay import replay as run
    from moeplan.planner.studies.replay import usual_strategies
    from moeplan.planner.studies.replay_summary import decision_lines, summary
    from moeplan.planner.studies.warming import load_kernels
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Layout

    if log is not None:
        writable("--log", log)
    opened = Trace.open(trace)
    chosen = layer_numbers(layers, opened.layers)
    model = TimeModel(hidden, intermediate, tflops, intra_gbps, inter_gbps)
    cluster = model.cluster(devices, slots, nodes)
    spec = JobSpec(
        cluster,
        layers=len(chosen),
        experts=opened.experts,
        ranks=opened.sources,
        initial=(Layout.contiguous(opened.experts, cluster.slots),) * len(chosen),
        expert=model.expert,
        parameters=solve_parameters(None, work_limit, seed),
        forecast=Forecast(forecast, window_steps=positive("--window", window)),
        split_rule=split_rule,
        max_moves=max_moves,
    )
    strategies = usual_strategies(
        spec,
        every=positive("--every", every),
        look=positive("--look", look),
        horizon=positive("--horizon", horizon),
        caution=caution,
    )
    with compiling():
        load_kernels("eplb", "hybrid")
    with progress("replaying", opened.steps * len(strategies)) as advance:
        outcomes = run((step[chosen] for step in opened.read()), strategies, advance)
    if log is not None:
        log.write_text("".join(json.dumps(decision) + "\n" for decision in decision_lines(outcomes)))
    if output is Format.JSON:
        print_json({"strategies": [summary(outcome, spec.expert.weight_bytes) for outcome in outcomes]})
        return
    show_replay(
        f"{trace.name}: {opened.steps} steps of {len(chosen)} layers, modelled",
        outcomes,
        spec.expert.weight_bytes,
        output,
    )
