"""`moeplan compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.planner.commands.explained import Command, refuse_typed
from moeplan.planner.commands.options import (
    CLUSTER,
    PROBLEM,
    SEARCH,
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
    WindowSteps,
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
KNOWN = "Known counts, with --known-counts"
KNOWN_ONLY = ("spare", "domain", "tolerance")
LAYOUTS_ONLY = (
    *("slots", "nodes", "window", "forecast", "split_rule", "groups", "max_moves"),
    *("deadline_ms", "work_limit", "seed"),
)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(compare)


def compare(
    context: typer.Context,
    trace: TraceFile,
    devices: Devices,
    slots: Annotated[
        int | None, typer.Option(help="Expert slots per device (not with --known-counts).", rich_help_panel=CLUSTER)
    ] = None,
    nodes: Nodes = 1,
    window: WindowSteps = 10,
    every: Annotated[int, typer.Option(help="Steps from one plan to the next.", rich_help_panel=PROBLEM)] = 20,
    forecast: ForecastBy = ForecastMethod.SCENARIOS,
    split_rule: Split = None,
    layers: Layers = None,
    groups: Groups = 1,
    max_moves: MaxMoves = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Policies to compare, comma-separated; those of layouts by default.", rich_help_panel=SEARCH),
    ] = None,
    deadline_ms: Deadline = None,
    work_limit: Work = None,
    seed: Seed = 0,
    known_counts: Annotated[
        bool,
        typer.Option(
            "--known-counts",
            help="Plan each step from its own counts, by spilling to spare slots.",
            rich_help_panel=KNOWN,
        ),
    ] = False,
    spare: Annotated[
        int, typer.Option(help="Spare slots per device for transient replicas.", rich_help_panel=KNOWN)
    ] = 1,
    domain: Annotated[
        int | None, typer.Option(help="Devices per link domain; all by default.", rich_help_panel=KNOWN)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Accepted distance from the lower bound.", rich_help_panel=KNOWN)
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
    from moeplan.planner.commands.tables import show_comparison
    from moeplan.planner.commands.terminal import compiling, progress
    from moeplan.planner.studies.policies import Setting
    from moeplan.planner.studies.policies import compare as judge
    from moeplan.planner.studies.spilling import KNOWN_COUNTS_POLICIES
    from moeplan.planner.studies.warming import load_kernels
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Cluster, Forecast, SpillOptions
    from moeplan.solvers.policies.registry import find

    opened = Trace.open(trace)
    positive("--every", every)
    chosen = layer_numbers(layers, opened.layers)
    if known_counts:
        refuse_typed(context, LAYOUTS_ONLY, "means nothing with --known-counts, which plans no layouts; drop it")
        options = SpillOptions.uniform(opened.experts, devices, spare, domain=domain, tolerance=tolerance)
        names = (policies or ",".join(KNOWN_COUNTS_POLICIES)).split(",")
        _compare_known_counts(opened, chosen, options, names, every, output)
        return
    refuse_typed(context, KNOWN_ONLY, "is for --known-counts; add that, or drop this")
    if slots is None:
        raise ProblemError("--slots", "none", "give the expert slots per device; only --known-counts does without")
    names = [find(name.strip()).name for name in (policies or LAYOUT_POLICIES).split(",")]
    setting = Setting(
        Cluster.uniform(devices, slots, nodes=nodes),
        chosen,
        groups=groups,
        max_moves=max_moves,
        parameters=solve_parameters(deadline_ms, work_limit, seed),
        forecast=Forecast(forecast, window_steps=positive("--window", window)),
        split_rule=split_rule,
        every=every,
    )
    with compiling():
        load_kernels(*names)
    plans = opened.window_count(window, every) * len(setting.layers) * len(names)
    with progress("planning", plans) as advance:
        result = judge(opened, names, setting, advance)
    if output is Format.JSON:
        print_json(result)
        return
    show_comparison(
        f"{trace.name}: plan from {window} steps, judge on the next, every {every} steps "
        f"({opened.experts} experts, {devices} devices, {slots} slots each)",
        result,
        output,
    )


def _compare_known_counts(
    trace: Trace, layers: Sequence[int], options: SpillOptions, policies: Sequence[str], every: int, output: Format
) -> None:
    from moeplan.planner.commands.tables import show_known_counts
    from moeplan.planner.commands.terminal import progress
    from moeplan.planner.studies.spilling import compare_known_counts

    names = [name.strip() for name in policies]
    steps = (counts[list(layers)] for counts in trace.read())
    with progress("planning", -(-trace.steps // every) * len(layers) * len(names)) as advance:
        result = compare_known_counts(steps, options, names, every=every, on_plan=advance)
    if output is Format.JSON:
        print_json(result)
        return
    show_known_counts(
        f"{trace.path.name}: every {every} steps planned from its own counts "
        f"({trace.experts} experts at home on {options.devices} devices, {options.spare[0]} spare slots each)",
        result,
        output,
    )
