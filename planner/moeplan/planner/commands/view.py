"""`moeplan view`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command, refuse_typed
from moeplan.planner.commands.options import (
    CLUSTER,
    OUTPUT,
    PROBLEM,
    Layers,
    MaxMoves,
    Nodes,
    Seed,
    Split,
    TraceFile,
    WindowSteps,
    Work,
    layer_numbers,
    positive,
    solve_parameters,
    writable,
)
from moeplan.planner.commands.time_model import Hidden, InterGbps, Intermediate, IntraGbps, Tflops, TimeModel
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["register"]

QUICK = 2_000
"""Candidates per plan: a page shows many."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(view)


def view(
    context: typer.Context,
    trace: TraceFile,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Plan file that `moeplan plan` wrote, to hold through all steps; by default the trace is re-planned "
            "every --every steps where it pays.",
            rich_help_panel=PROBLEM,
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Devices (ranks) that host experts.", show_default="the trace's sources", rich_help_panel=CLUSTER
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="Expert slots per device.", show_default="one more than the experts fill", rich_help_panel=CLUSTER
        ),
    ] = None,
    nodes: Nodes = 1,
    hidden: Hidden = 7168,
    intermediate: Intermediate = 2048,
    tflops: Tflops = 400.0,
    intra_gbps: IntraGbps = 400.0,
    inter_gbps: InterGbps = 50.0,
    window: WindowSteps = 10,
    every: Annotated[
        int,
        typer.Option(
            help="Steps from one plan to the next, and those over which a gain counts.", rich_help_panel=PROBLEM
        ),
    ] = 10,
    split_rule: Split = None,
    layers: Layers = None,
    max_moves: MaxMoves = None,
    work_limit: Work = QUICK,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--output", "-o", help="Page to write (HTML).", rich_help_panel=OUTPUT)] = Path(
        "report.html"
    ),
) -> None:
    """Make a page of a trace: what its steps ask for, and what plans make of it.

    One HTML file that opens from disk, without network: imbalance step by step, the load of every expert and device,
    time lost, forecasts against what came, and every plan with its reason. Experts in order and EPLB are shown beside.
    Time is modelled, as `moeplan replay` does it.
    """
    from moeplan.api.jobs import JobSpec
    from moeplan.planner.commands.terminal import compiling, progress
    from moeplan.planner.files.plan_file import PlanFile
    from moeplan.planner.pages.frame import self_contained
    from moeplan.planner.pages.trace_report import Rhythm, holding, trace_document, usual
    from moeplan.planner.studies.warming import load_kernels
    from moeplan.planner.traces.trace import Trace
    from moeplan.solvers import Layout

    writable("--output", out)
    model = TimeModel(hidden, intermediate, tflops, intra_gbps, inter_gbps)
    rhythm = Rhythm(positive("--every", every), positive("--window", window))
    opened = Trace.open(trace)
    chosen = layer_numbers(layers, opened.layers)
    held = None
    if plan is not None:
        refuse_typed(context, ["devices", "slots", "split_rule", "max_moves"], "is what the plan says; drop it")
        held = PlanFile.read(plan)
        held.check(opened.layers, opened.experts)
        chosen = [layer for layer in chosen if layer in held.layouts]
        if not chosen:
            raise ProblemError("--layers", layers, f"{plan} has none of them; it has {sorted(held.layouts)}")
        devices, slots, split_rule = held.devices, held.slots, held.split_rule
    devices = _devices(devices, opened.sources)
    cluster = model.cluster(devices, -(-opened.experts // devices) + 1 if slots is None else slots, nodes)
    spec = JobSpec(
        cluster,
        layers=len(chosen),
        experts=opened.experts,
        ranks=opened.sources,
        initial=(Layout.contiguous(opened.experts, cluster.slots),) * len(chosen),
        expert=model.expert,
        parameters=solve_parameters(None, work_limit, seed),
        split_rule=split_rule,
        max_moves=max_moves,
    )
    shown = usual(spec, rhythm) if held is None else holding(spec, rhythm, held, chosen)
    with compiling():
        load_kernels("eplb", "hybrid")
    with progress("replaying", opened.steps * len(shown)) as advance:
        document = trace_document(opened, chosen, shown, cost_text=str(model), on_step=advance)
    out.write_text(self_contained(document), "utf-8")
    typer.echo(f"{out}: open it in a browser; it needs no network")


def _devices(given: int | None, sources: int) -> int:
    if given is None and sources == 1:
        raise ProblemError("--devices", "none", "the trace does not tell ranks apart: give the number of devices")
    return sources if given is None else given
