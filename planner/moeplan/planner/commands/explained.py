"""Commands whose errors are one line that names what the user typed.

Everything that goes wrong is said on standard error after ``moeplan: ``. Exit codes: 0 for success, also where the
reader of the output went away; 1 where something outside failed, such as a daemon or a disk; 2 where the call was
wrong; 130 where the user interrupted it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from moeplan.planner.errors import FileError
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["EXIT_FAILED", "EXIT_USAGE", "Command", "explain", "fail", "refuse_typed"]

EXIT_FAILED, EXIT_USAGE = 1, 2

PARAMETERS = {
    "forecast.window_steps": "window",
    "forecast.method": "forecast",
    "payback.horizon_steps": "horizon",
    "payback.cost_factor": "caution",
    "intra_node.bytes_per_s": "intra_gbps",
    "inter_node.bytes_per_s": "inter_gbps",
    "spill.home": "devices",
    "replan.every_steps": "every",
}
"""Parameters of commands that fields come from, where they have other names."""


def fail(text: str, code: int) -> typer.Exit:
    """Say why the command ends; the exit to raise."""
    typer.echo(f"moeplan: {text}", err=True)
    return typer.Exit(code)


def refuse_typed(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse parameters that the user typed although they would change nothing.

    Raises:
        ProblemError: one of them was typed.
    """
    for option in context.command.params:
        if option.name in names:
            source = context.get_parameter_source(option.name)
            if source is not None and source.name == "COMMANDLINE":
                raise ProblemError(max(option.opts, key=len), context.params[option.name], reason)


def explain(error: ProblemError, flags: Mapping[str, str]) -> str:
    """The error's text, with the flag that a field came from in its place.

    Args:
        error: What is wrong.
        flags: How each parameter of the command is typed.
    """
    if isinstance(error, FileError) or error.field.startswith("--"):
        return str(error)
    layer, field = re.fullmatch(r"(?:layers\[(\d+)\]\.)?(.*)", error.field, re.S).groups()  # type: ignore[union-attr]
    field = re.sub(r"^(problem|job)\.", "", field)
    path, _, index = field.partition("[")
    name = PARAMETERS.get(".".join(path.split(".")[-2:]), path.split(".")[-1])
    if field.startswith("constraints.") and "constraints" in flags:
        place = f"{flags['constraints']}: {field.removeprefix('constraints.')}"
    elif name in flags:
        place = flags[name] + (f"[{index}" if index else "")
    else:
        place = field
    of = f"layer {layer}: " if layer else ""
    return f"{of}{place} = {error.value}: {error.reason}"


class Command(TyperCommand):
    """A command that ends with a line and an exit code where it cannot do what was asked."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        try:
            answer = super().invoke(ctx)
            sys.stdout.flush()
        except ProblemError as error:
            flags = {option.name: max(option.opts, key=len) for option in self.params if option.name}
            raise fail(explain(error, flags), EXIT_USAGE) from None
        except BrokenPipeError:  # what is still in the buffer has no reader: the interpreter would complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise fail(f"{place}{error.strerror or error}", EXIT_FAILED) from None
        except MemoryError as error:
            raise fail(f"out of memory: {error}; take fewer steps or layers at a time", EXIT_FAILED) from None
        return answer
