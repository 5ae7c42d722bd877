"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import ForecastMethod
from moeplan.solvers.problem.split_rules import SplitRule

CLUSTER, PROBLEM, SEARCH, DAEMON, OUTPUT = "Cluster", "Problem", "Search", "Daemon", "Output"
"""Panels of the help texts."""


class Format(StrEnum):
    """A table to read, or JSON or CSV for programs."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class EngineName(StrEnum):
    """An engine or a transport that loads layouts."""

    SGLANG = "sglang"
    VLLM = "vllm"
    TENSORRT_LLM = "tensorrt-llm"
    VLLM_ASCEND = "vllm-ascend"
    DEEPEP = "deepep"


Output = Annotated[
    Format,
    typer.Option("--format", help="A table to read, or JSON or CSV on standard output.", rich_help_panel=OUTPUT),
]
TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="An .npz file with counts[step, layer, source, expert].")
]
Devices = Annotated[int, typer.Option(help="Devices (ranks) that host experts.", rich_help_panel=CLUSTER)]
Slots = Annotated[int, typer.Option(help="Expert slots per device.", rich_help_panel=CLUSTER)]
Nodes = Annotated[
    int,
    typer.Option(help="Nodes that the devices are spread over, in contiguous blocks.", rich_help_panel=CLUSTER),
]
Layers = Annotated[
    str | None, typer.Option(help="Layers to plan, such as 0,3-5; all by default.", rich_help_panel=PROBLEM)
]
Groups = Annotated[int, typer.Option(help="Expert groups that routing treats as units.", rich_help_panel=PROBLEM)]
WindowSteps = Annotated[int, typer.Option(help="Newest steps to plan from.", rich_help_panel=PROBLEM)]
ForecastBy = Annotated[
    ForecastMethod,
    typer.Option("--forecast", help="How the demand to plan for follows from the window.", rich_help_panel=PROBLEM),
]
Split = Annotated[
    SplitRule | None,
    typer.Option(
        "--split-rule",
        help="How the system that will run the layout divides tokens; the policy's own by default.",
        rich_help_panel=PROBLEM,
    ),
]
MaxMoves = Annotated[
    int | None, typer.Option(help="Most replicas that a re-plan of a layer may copy.", rich_help_panel=PROBLEM)
]
Deadline = Annotated[
    float | None, typer.Option(help="Milliseconds per layer that a search may take.", rich_help_panel=SEARCH)
]
Work = Annotated[
    int | None,
    typer.Option(
        help="Candidate layouts per layer that a search may score; 10,000 by default, no limit with a deadline.",
        rich_help_panel=SEARCH,
    ),
]
Solver = Annotated[
    str,
    typer.Option(help="Solver of exact models: cpsat, highs, cbc, or another that PuLP finds.", rich_help_panel=SEARCH),
]
Prove = Annotated[bool, typer.Option("--prove", help="Also spend time on a stronger bound.", rich_help_panel=SEARCH)]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", rich_help_panel=SEARCH)]


def layer_numbers(text: str | None, layers: int) -> list[int]:
    """Layer numbers of a list such as ``0,3-5``."""
    return list(range(layers)) if text is None else numbers("--layers", text, layers)


def numbers(flag: str, text: str, count: int) -> list[int]:
    """Numbers below `count` of a list such as ``0,3-5``."""
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            raise ProblemError(flag, repr(text), "must look like 0,3-5") from None
        if not span or span[0] < 0 or span[-1] >= count:
            raise ProblemError(flag, part, f"must be within 0-{count - 1}")
        chosen.extend(span)
    return sorted(set(chosen))


def positive(flag: str, value: int) -> int:
    """The value, which must be at least 1."""
    if value < 1:
        raise ProblemError(flag, value, "must be at least 1")
    return value


def writable(flag: str, path: Path) -> Path:
    """The path of a file to be written, which is checked before anything takes time."""
    folder = path.parent
    if not folder.is_dir():
        raise ProblemError(flag, path, f"there is no folder {folder}; make it first")
    if path.is_dir():
        raise ProblemError(flag, path, "is a folder; give the name of a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ProblemError(flag, path, "may not be written; give a file in a folder of yours")
    return path


def solve_parameters(
    deadline_ms: float | None, work_limit: int | None, seed: int, solver: str = "cpsat", prove: bool = False
) -> SolveParameters:
    """Limits of a search from options."""
    if deadline_ms is not None and not deadline_ms > 0:
        raise ProblemError("--deadline-ms", deadline_ms, "must be above 0; leave it out for no limit")
    return SolveParameters(
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
        work_limit=work_limit,
        seed=seed,
        solver=solver,
        prove=prove,
    )


def print_json(document: object) -> None:
    """Print a document to standard output."""
    json.dump(document, sys.stdout, indent=2)
    print()
