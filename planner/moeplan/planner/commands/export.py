"""`moeplan export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import OUTPUT, EngineName, writable
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(export)


def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that `moeplan plan --for ENGINE` wrote.")],
    engine: Annotated[
        EngineName, typer.Option("--to", help="What will load the layouts.", rich_help_panel=OUTPUT, show_default=False)
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", rich_help_panel=OUTPUT)],
    decoder_layers: Annotated[
        int | None,
        typer.Option(
            help="Layers of the model, dense ones counted, for sglang; by default up to the last with experts.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Write a plan as the file that an engine loads.

    sglang: JSON for --init-expert-location. vllm: an initial mapping, as proposed in vllm-project/vllm#41141; vLLM 0.33
    loads none, but asks moeplan itself (docs/serving.md). tensorrt-llm: YAML for moe_config.load_balancer. vllm-ascend:
    expert_map.json. deepep: redundancy mappings, an array for each layer. Layers are numbered as the engine does, with
    dense ones (sglang, tensorrt-llm) or without: a plan knows the numbers where its trace came from `moeplan trace
    import`.
    """
    from moeplan.planner.exports.engines import ENGINES
    from moeplan.planner.exports.model_layouts import ModelLayouts
    from moeplan.planner.exports.sglang_location import write_sglang
    from moeplan.planner.files.plan_file import PlanFile

    writable("--output", out)
    planned = PlanFile.read(plan)
    numbers = sorted((number, layer) for layer, number in planned.model_layers.items())
    model = ModelLayouts({number: planned.layouts[layer] for number, layer in numbers})
    last = max(model.layouts)
    if decoder_layers is not None and engine is not EngineName.SGLANG:
        raise ProblemError("--decoder-layers", decoder_layers, "is for --to sglang; drop it")
    if decoder_layers is not None and decoder_layers <= last:
        raise ProblemError("--decoder-layers", decoder_layers, f"must be above {last}, the last layer of the plan")
    content = ENGINES[engine.value].write(model) if decoder_layers is None else write_sglang(model, decoder_layers)
    temporary = out.with_name(out.name + ".part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(out)
    print(f"{out}: {len(model.layouts)} layers for {engine.value}, {model.slots} slots on {model.devices} devices")
