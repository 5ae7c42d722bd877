"""`moeplan replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.options import (
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
    Work,
    layer_numbers,
    positive,
    print_json,
    solve_parameters,
)
from moeplan.planner.commands.terminal import progress
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import ForecastMethod

__all__ = ["register"]

QUICK = 2_000
"""Candidates per plan: a replay makes many."""

BYTES_PER_VALUE = 2
MATRICES = 3
"""Of a gated expert: gate, up and down projection, each hidden x intermediate."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(replay)


def replay(
    trace: TraceFile,
    devices: Devices,
    slots: Slots,
    nodes: Nodes = 1,
    window: Annotated[int, typer.Option(help="Newest steps to plan from.")] = 10,
    every: Annotated[int, typer.Option(help="Steps between plans of the strategies that plan every so often.")] = 20,
    look: Annotated[int, typer.Option(help="Steps between looks of the strategy that moves when it pays.")] = 1,
    horizon: Annotated[int, typer.Option(help="Steps over which a gain counts against the time to move.")] = 20,
    caution: Annotated[float, typer.Option(help="How many times over the predicted gain must pay the move.")] = 1.0,
    max_moves: MaxMoves = None,
    hidden: Annotated[int, typer.Option(help="Width of a token's vector (bf16).")] = 7168,
    intermediate: Annotated[int, typer.Option(help="Width of an expert (gated, bf16).")] = 2048,
    tflops: Annotated[float, typer.Option(help="What a device sustains on experts, in TFLOP/s.")] = 400.0,
    intra_gbps: Annotated[float, typer.Option(help="Gigabytes per second inside a node, each way.")] = 400.0,
    inter_gbps: Annotated[float, typer.Option(help="Gigabytes per second between nodes, per device.")] = 50.0,
    layers: Layers = None,
    work_limit: Work = QUICK,
    seed: Seed = 0,
    forecast: ForecastBy = ForecastMethod.SCENARIOS,
    split_rule: Split = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file to draw the cumulative time in.")] = None,
    log: Annotated[Path | None, typer.Option(help="File for every decision and why, one JSON object a line.")] = None,
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
    from moeplan.planner.pages.replay_chart import chart
    from moeplan.planner.studies.replay import replay as run
    from moeplan.planner.studies.replay import usual_strategies
    from moeplan.planner.studies.replay_summary import decision_lines, summary
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Cluster, ExpertSpec, Layout, Link

    for name, path in (("--plot", plot), ("--log", log)):
        if path is not None and not path.parent.is_dir():
            raise ProblemError(name, path, f"needs the folder {path.parent}; make it first")
    opened = Trace.open(trace)
    chosen = layer_numbers(layers, opened.layers)
    weights = MATRICES * positive("--hidden", hidden) * positive("--intermediate", intermediate)
    if not tflops > 0:
        raise ProblemError("--tflops", tflops, "must be above 0")
    cluster = Cluster.uniform(
        devices, slots, nodes=nodes, intra_node=Link(intra_gbps * 1e9), inter_node=Link(inter_gbps * 1e9)
    )
    spec = JobSpec(
        cluster,
        layers=len(chosen),
        experts=opened.experts,
        ranks=opened.sources,
        initial=(Layout.contiguous(opened.experts, cluster.slots),) * len(chosen),
        expert=ExpertSpec(
            weight_bytes=weights * BYTES_PER_VALUE,
            token_bytes=hidden * BYTES_PER_VALUE,
            seconds_per_token=2 * weights / (tflops * 1e12),
        ),
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
    with progress("replaying", opened.steps * len(strategies)) as advance:
        outcomes = run((step[chosen] for step in opened.read()), strategies, advance)
    if log is not None:
        log.write_text("".join(json.dumps(decision) + "\n" for decision in decision_lines(outcomes)))
    if plot is not None:
        plot.write_text(chart(trace.name, outcomes))
    if output is Format.JSON:
        print_json({"strategies": [summary(outcome, spec.expert.weight_bytes) for outcome in outcomes]})
        return
    show_replay(
        f"{trace.name}: {opened.steps} steps of {len(chosen)} layers, modelled", outcomes, spec.expert.weight_bytes
    )
