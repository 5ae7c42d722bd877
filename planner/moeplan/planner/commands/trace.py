"""`moeplan trace`: look at recorded routing, or make some."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import Format, Output, Seed, TraceFile, print_json, writable

__all__ = ["register"]

ROUTING = "Routing"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    trace = typer.Typer(no_args_is_help=True, help="Look at recorded routing, or make some.")
    trace.command(cls=Command)(generate)
    trace.command(cls=Command)(info)
    app.add_typer(trace, name="trace")


def generate(
    out: Annotated[Path, typer.Argument(metavar="TRACE", help="The .npz file to write.")],
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=ROUTING)] = 100,
    layers: Annotated[int, typer.Option(help="MoE layers.", rich_help_panel=ROUTING)] = 4,
    sources: Annotated[int, typer.Option(help="Ranks whose tokens are routed.", rich_help_panel=ROUTING)] = 16,
    experts: Annotated[int, typer.Option(help="Experts per layer.", rich_help_panel=ROUTING)] = 64,
    top_k: Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=ROUTING)] = 4,
    tokens_per_rank: Annotated[
        int, typer.Option(help="Tokens that each rank routes per step.", rich_help_panel=ROUTING)
    ] = 4096,
    skew: Annotated[
        float, typer.Option(help="Zipf exponent of the experts' popularity; 0 for equal.", rich_help_panel=ROUTING)
    ] = 0.6,
    drift: Annotated[
        float,
        typer.Option(help="Standard deviation of the change of log popularity per step.", rich_help_panel=ROUTING),
    ] = 0.02,
    locality: Annotated[
        float,
        typer.Option(help="Share of a rank's tokens that are of its own topic, 0 to 1.", rich_help_panel=ROUTING),
    ] = 0.0,
    affinity: Annotated[
        float,
        typer.Option(
            help="Standard deviation of a topic's log preference for an expert; 0 for topics that agree.",
            rich_help_panel=ROUTING,
        ),
    ] = 1.0,
    topics: Annotated[int, typer.Option(help="Topics; consecutive ranks share one.", rich_help_panel=ROUTING)] = 8,
    seed: Seed = 0,
) -> None:
    """Make a synthetic trace of known skew, drift, locality and affinity.

    It holds the pairs of experts that tokens met in consecutive layers, which `moeplan affinity` plans from.
    """
    from moeplan.planner.commands.terminal import progress
    from moeplan.planner.traces.synthetic import SyntheticTrace
    from moeplan.planner.traces.synthetic import generate as make
    from moeplan.planner.traces.writer import write_trace

    writable("TRACE", out)
    wanted = SyntheticTrace(
        steps=steps,
        layers=layers,
        sources=sources,
        experts=experts,
        top_k=top_k,
        tokens_per_rank=tokens_per_rank,
        skew=skew,
        drift=drift,
        locality=locality,
        affinity=affinity,
        topics=topics,
        seed=seed,
    )
    with progress("generating", steps) as advance:
        arrays = make(wanted, advance)
    write_trace(out, arrays)
    print(f"{out}: {steps} steps, {layers} layers, {sources} sources, {experts} experts")


def info(trace: TraceFile, output: Output = Format.TABLE) -> None:
    """Summarise a trace: its size, and how uneven its experts are."""
    from moeplan.planner.commands.terminal import progress, show_table
    from moeplan.planner.traces.summary import describe
    from moeplan.planner.traces.trace import Trace

    opened = Trace.open(trace)
    with progress("reading", opened.steps) as advance:
        description = describe(opened, advance)
    if output is Format.JSON:
        print_json(description)
        return
    if output is Format.TABLE:  # CSV is one table, that of the layers
        facts = [[name, str(value)] for name, value in description.items() if name != "per_layer" and value is not None]
        show_table(str(trace), ["trace", ""], facts)
    show_table(
        "Per layer, mean over steps",
        ["layer", "tokens per step", "hottest expert / mean", "idle experts", "change per step"],
        [
            [
                str(row["layer"]),
                f"{row['tokens']:,.0f}",
                f"{row['hottest']:.2f}",
                f"{row['idle']:.1f}",
                f"{row['change']:.1%}",
            ]
            for row in description["per_layer"]
        ],
        output,
    )
