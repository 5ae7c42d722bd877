"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import ForecastMethod
from moeplan.solvers.problem.split_rules import SplitRule


class Format(StrEnum):
    """A table to read, or JSON for programs."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[Format, typer.Option("--format", help="A table to read, or JSON on standard output.")]
TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="An .npz file with counts[step, layer, source, expert].")
]
Devices = Annotated[int, typer.Option(help="Devices (ranks) that host experts.")]
Slots = Annotated[int, typer.Option(help="Expert slots per device.")]
Nodes = Annotated[int, typer.Option(help="Nodes that the devices are spread over, in contiguous blocks.")]
Layers = Annotated[str | None, typer.Option(help="Layers to plan, such as 0,3-5; all by default.")]
Groups = Annotated[int, typer.Option(help="Expert groups that routing treats as units.")]
Deadline = Annotated[float | None, typer.Option(help="Milliseconds per layer that a search may take.")]
Work = Annotated[
    int | None,
    typer.Option(
        help="Candidate layouts per layer that a search may score; 10,000 by default, no limit with a deadline."
    ),
]
Solver = Annotated[str, typer.Option(help="Solver of exact models: cpsat, highs, cbc, or another that PuLP finds.")]
Prove = Annotated[bool, typer.Option("--prove", help="Also spend time on a stronger bound.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
ForecastBy = Annotated[
    ForecastMethod,
    typer.Option("--forecast", help="How the demand to plan for follows from the window."),
]
Split = Annotated[
    SplitRule | None,
    typer.Option("--split-rule", help="How the system that will run it divides tokens; the policy's own by default."),
]
MaxMoves = Annotated[int | None, typer.Option(help="Most replicas that a re-plan of a layer may copy.")]


def layer_numbers(text: str | None, layers: int) -> list[int]:
    """Layer numbers of a list such as ``0,3-5``."""
    return list(range(layers)) if text is None else numbers("--layers", text, layers)


def numbers(name: str, text: str, count: int) -> list[int]:
    """Numbers below `count` of a list such as ``0,3-5``."""
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ProblemError(name, repr(text), "must look like 0,3-5") from None
        if not span or span[0] < 0 or span[-1] >= count:
            raise ProblemError(name, part, f"must be within 0-{count - 1}")
        chosen.extend(span)
    return sorted(set(chosen))


def positive(name: str, value: int) -> int:
    if value < 1:
        raise ProblemError(name, value, "must be at least 1")
    return value


def solve_parameters(
    deadline_ms: float | None, work_limit: int | None, seed: int, solver: str = "cpsat", prove: bool = False
) -> SolveParameters:
    return SolveParameters(
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
        work_limit=work_limit,
        seed=seed,
        solver=solver,
        prove=prove,
    )


def print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()
