"""`moeplan policies`."""

from __future__ import annotations

import typer

from moeplan.planner.commands.explained import Command
from moeplan.planner.commands.options import Format, Output, print_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=Command)(policies)


def policies(output: Output = Format.TABLE) -> None:
    """List the policies and where each comes from."""
    from moeplan.planner.commands.terminal import show_table
    from moeplan.solvers import available_policies

    known = available_policies().values()
    if output is Format.JSON:
        print_json(
            {
                "policies": [
                    {"policy": p.name, "source": p.source, "split": p.split, "summary": p.summary} for p in known
                ]
            }
        )
        return
    show_table(
        "Policies",
        ["policy", "from", "split", "what it does"],
        [[p.name, p.source, p.split, p.summary] for p in known],
        output,
    )
