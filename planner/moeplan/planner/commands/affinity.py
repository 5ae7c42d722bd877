"""`moeplan affinity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import (
    OUTPUT,
    PROBLEM,
    SEARCH,
    Devices,
    Format,
    Nodes,
    Output,
    Seed,
    TraceFile,
    WindowSteps,
    positive,
    print_json,
    writable,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(affinity)


def affinity(
    trace: TraceFile,
    devices: Devices,
    nodes: Nodes = 1,
    tolerance: Annotated[
        float,
        typer.Option(
            help="How far a node's load may exceed its share of a layer, as a fraction.", rich_help_panel=PROBLEM
        ),
    ] = 0.05,
    window: WindowSteps = 10,
    ilp_seconds: Annotated[
        float,
        typer.Option(help="Time for the exact solver, which small models are given.", rich_help_panel=SEARCH),
    ] = 10.0,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Plan file to write (JSON).", rich_help_panel=OUTPUT)
    ] = Path("plan.json"),
    output: Output = Format.TABLE,
) -> None:
    """Place all layers so that tokens find their next expert on the node where they are.

    For engines that do not send tokens home between layers. Every expert gets one replica. The trace must hold
    pairs[layer, expert, next_expert]; `moeplan trace generate` makes one that does.
    """
    from dataclasses import replace

    import numpy as np

    from moeplan.planner.commands.terminal import show_table, status
    from moeplan.planner.files.plan_file import plan_document, write
    from moeplan.planner.traces.trace import Trace, TraceError
    from moeplan.solvers import Cluster, Demand, Layout, Problem, evaluate
    from moeplan.solvers.affinity.placement import crossings, place_by_affinity

    writable("--output", out)
    opened = Trace.open(trace)
    pairs = opened.pairs()
    if pairs is None:
        raise TraceError(trace, "has no array `pairs`; affinity needs pairs[layer, expert, next_expert]")
    first = max(0, opened.steps - positive("--window", window))
    loads = np.sum([step.sum(axis=1) for step in opened.read(first)], axis=0)
    cluster = Cluster.uniform(devices, -(-opened.experts // max(1, devices)), nodes=nodes)
    with status("placing"):
        placed = place_by_affinity(pairs, cluster, loads=loads, tolerance=tolerance, ilp_seconds=ilp_seconds, seed=seed)
    plans = {
        layer: replace(evaluate(Problem(cluster, Demand.of(steps)), placed.layouts[layer]), policy="affinity")
        for layer, steps in enumerate(opened.by_layer(range(opened.layers), first, opened.steps))
    }
    document = plan_document(plans) | {
        "affinity": {"crossing": placed.crossing, "bound": placed.bound, "transitions": placed.total}
    }
    write(out, document)
    if output is Format.JSON:
        print_json(document)
        return
    total = max(1, placed.total)
    in_order = [Layout.contiguous(opened.experts, cluster.slots)] * opened.layers
    contiguous = crossings(pairs, cluster, in_order)
    show_table(
        f"{trace.name}: {len(plans)} layers placed, written to {out}",
        ["transitions that leave their node", ""],
        [
            ["experts in order", f"{contiguous / total:.1%}"],
            ["placed by affinity", f"{placed.crossing / total:.1%}"],
            ["at least, by proof", f"{placed.bound / total:.1%}"],
        ],
        output,
    )
