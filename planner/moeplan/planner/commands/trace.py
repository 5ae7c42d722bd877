"""`moeplan trace`: look at recorded routing, take it over from other programs, or make some."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import OUTPUT, Format, Output, Seed, TraceFile, print_json, writable

__all__ = ["register"]

ROUTING = "Routing"


class RecordedBy(StrEnum):
    """Program that made a recording."""

    SGLANG = "sglang"
    VLLM = "vllm"
    TENSORRT_LLM = "tensorrt-llm"
    VLLM_ASCEND = "vllm-ascend"
    MEGATRON = "megatron"
    SLIME = "slime"
    ULTRAEP = "ultraep"
    HARMOENY = "harmoeny"
    CSV = "csv"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    trace = typer.Typer(
        no_args_is_help=True, help="Look at recorded routing, take it over from elsewhere, or make some."
    )
    trace.command(cls=Command)(generate)
    trace.command("import", cls=Command)(import_recording)
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


def import_recording(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files or the folder of the recording.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="TRACE", help="The .npz file to write.", rich_help_panel=OUTPUT)
    ],
    kind: Annotated[
        RecordedBy | None,
        typer.Option("--from", help="What recorded it; by default the content shows that.", rich_help_panel=ROUTING),
    ] = None,
) -> None:
    """Make a trace of what an engine or a framework recorded.

    It reads the recorders of SGLang (stat and per_pass), TensorRT-LLM, UltraEP and Megatron-core, rollouts of slime,
    the load statistics proposed for vLLM and load histories (JSON with load_history), loads for vllm-ascend's planner,
    HarMoEny's traces, and tables (CSV) with the columns step, layer, source, expert, tokens. Several files are of
    several ranks, or follow one another. Steps are read one at a time. What is left out, such as dense layers and what
    was cut off, is said.
    """
    from moeplan.planner.commands.terminal import progress
    from moeplan.planner.traces.formats.opening import open_recording
    from moeplan.planner.traces.writer import write_recording

    writable("--output", out)
    name, recording = open_recording(files, None if kind is None else kind.value)
    with progress(f"reading {name}", recording.total) as advance:
        steps = write_recording(out, recording, advance)
    numbers = recording.layer_numbers
    print(
        f"{out}: {steps} steps of {name}, {len(numbers)} layers ({numbers[0]} to {numbers[-1]} of the model), "
        f"{recording.sources} sources, {recording.experts} experts"
    )
    for left_out in recording.dropped:
        print(f"left out: {left_out}", file=sys.stderr)


def info(trace: TraceFile, output: Output = Format.TABLE) -> None:
    """Summarise a trace: its size, and how uneven its experts are."""
    from moeplan.planner.commands.terminal import progress, show_table
    from moeplan.planner.traces.summary import describe, head
    from moeplan.planner.traces.trace import Trace

    opened = Trace.open(trace)
    if output is Format.TABLE:  # at once, as all of it stands in the head; CSV is one table, that of the layers
        facts = [[name, str(value)] for name, value in head(opened).items() if value is not None]
        show_table(str(trace), ["trace", ""], facts)
    with progress("reading", opened.steps) as advance:
        description = describe(opened, advance)
    if output is Format.JSON:
        print_json(description)
        return
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
