"""`moeplan trace generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeplan.planner.cli_options import Seed

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(generate)


def generate(
    out: Annotated[Path, typer.Argument(metavar="TRACE", help="The .npz file to write.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 4,
    sources: Annotated[int, typer.Option(help="Ranks whose tokens are routed.")] = 16,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 4,
    tokens_per_rank: Annotated[int, typer.Option(help="Tokens that each rank routes per step.")] = 4096,
    skew: Annotated[float, typer.Option(help="Zipf exponent of the experts' popularity; 0 for equal.")] = 0.6,
    drift: Annotated[float, typer.Option(help="How far log popularity wanders per step (standard deviation).")] = 0.02,
    locality: Annotated[float, typer.Option(help="Part of a rank's tokens that are of its own topic, 0 to 1.")] = 0.0,
    affinity: Annotated[
        float, typer.Option(help="How strongly topics prefer experts (log, standard deviation).")
    ] = 1.0,
    topics: Annotated[int, typer.Option(help="Topics; consecutive ranks share one.")] = 8,
    seed: Seed = 0,
) -> None:
    """Make a synthetic trace of known skew, drift, locality and affinity.

    It holds the pairs of experts that tokens met in consecutive layers, which `moeplan affinity` plans from.
    """
    from moeplan.planner.synthetic import SyntheticTrace, write_trace
    from moeplan.planner.synthetic import generate as make
    from moeplan.planner.terminal import progress

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
