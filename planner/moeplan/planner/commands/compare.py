"""`moeplan compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.planner.commands.options import (
    Deadline,
    Devices,
    ForecastBy,
    Format,
    Groups,
    Layers,
    MaxMoves,
    Nodes,
    Output,
    Seed,
    Split,
    TraceFile,
    Work,
    layer_numbers,
    positive,
    print_json,
    solve_parameters,
)
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import ForecastMethod

if TYPE_CHECKING:
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import SpillOptions

__all__ = ["register"]

LAYOUT_POLICIES = "static,eplb,laer,symi,flexmoe,hybrid"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(compare)


def compare(
    trace: TraceFile,
    devices: Devices,
    slots: Annotated[int | None, typer.Option(help="Expert slots per device (not with --known-counts).")] = None,
    nodes: Nodes = 1,
    policies: Annotated[str | None, typer.Option(help="Policies to compare, comma-separated; all by default.")] = None,
    window: Annotated[int, typer.Option(help="Steps to plan from.")] = 10,
    every: Annotated[int, typer.Option(help="Steps from one plan to the next.")] = 20,
    layers: Layers = None,
    groups: Groups = 1,
    max_moves: MaxMoves = None,
    deadline_ms: Deadline = None,
    work_limit: Work = None,
    seed: Seed = 0,
    forecast: ForecastBy = ForecastMethod.SCENARIOS,
    split_rule: Split = None,
    known_counts: Annotated[
        bool, typer.Option("--known-counts", help="Plan each step from its own counts, by spilling to spare slots.")
    ] = False,
    spare: Annotated[int, typer.Option(help="With --known-counts: spare slots per device for transient replicas.")] = 1,
    domain: Annotated[
        int | None, typer.Option(help="With --known-counts: devices per link domain; all by default.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="With --known-counts: accepted distance from the lower bound.")
    ] = 5e-4,
    output: Output = Format.TABLE,
) -> None:
    """Compare policies on steps that they did not see.

    Every policy plans from a window of steps and is judged on the step right after it, over and over along the trace.
    Imbalance is the largest load of a device over the mean: 1.0 is perfect, and a step takes that much longer.
    --max-moves binds the policies that can limit their moves; the others re-plan freely.

    With --known-counts nothing is predicted: static, llep and quota split the very counts that they are judged on,
    over homes in order and --spare transient replicas per device, as a rank does in every micro-batch.
    """
    from dataclasses import replace

    from moeplan.planner.commands.tables import show_comparison
    from moeplan.planner.commands.terminal import progress, status
    from moeplan.planner.studies.policies import Setting
    from moeplan.planner.studies.policies import compare as judge
    from moeplan.planner.studies.spilling import KNOWN_COUNTS_POLICIES
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Cluster, Forecast, SolveParameters, SpillOptions
    from moeplan.solvers.policies.registry import find

    opened = Trace.open(trace)
    positive("--every", every)
    chosen = layer_numbers(layers, opened.layers)
    if known_counts:
        options = SpillOptions.uniform(opened.experts, devices, spare, domain=domain, tolerance=tolerance)
        names = (policies or ",".join(KNOWN_COUNTS_POLICIES)).split(",")
        _compare_known_counts(opened, chosen, options, names, every, output)
        return
    if slots is None:
        raise ProblemError("--slots", slots, "is needed: expert slots per device")
    names = [find(name.strip()).name for name in (policies or LAYOUT_POLICIES).split(",")]
    setting = Setting(
        Cluster.uniform(devices, slots, nodes=nodes),
        chosen,
        groups=groups,
        max_moves=max_moves,
        parameters=solve_parameters(deadline_ms, work_limit, seed),
        forecast=Forecast(forecast, window_steps=positive("--window", window)),
        split_rule=split_rule,
    )
    windows = opened.windows(window, every)
    with status("compiling kernels (the first time only)"):
        first = next(iter(opened.windows(window, every)))
        judge([first, first], names, replace(setting, layers=chosen[:1], parameters=SolveParameters(work_limit=1)))
    plans = opened.window_count(window, every) * len(setting.layers) * len(names)
    with progress("planning", plans) as advance:
        result = judge(windows, names, setting, advance)
    if output is Format.JSON:
        print_json(result)
        return
    show_comparison(
        f"{trace.name}: plan from {window} steps, judge on the next, every {every} steps "
        f"({opened.experts} experts, {devices} devices, {slots} slots each)",
        result,
    )


def _compare_known_counts(
    trace: Trace, layers: Sequence[int], options: SpillOptions, policies: Sequence[str], every: int, output: Format
) -> None:
    import numpy as np

    from moeplan.planner.commands.tables import show_known_counts
    from moeplan.planner.commands.terminal import progress
    from moeplan.planner.studies.spilling import compare_known_counts

    counts = np.stack([step[list(layers)] for i, step in enumerate(trace.read()) if i % every == 0])
    with progress("planning", counts.shape[0] * counts.shape[1] * len(policies)) as advance:
        result = compare_known_counts(counts, options, [name.strip() for name in policies], on_plan=advance)
    if output is Format.JSON:
        print_json(result)
        return
    show_known_counts(
        f"{trace.path.name}: every {every} steps planned from its own counts "
        f"({trace.experts} experts at home on {options.devices} devices, {options.spare[0]} spare slots each)",
        result,
    )
