"""The command line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moeplan.planner.commands import (
    admin,
    affinity,
    compare,
    evaluate,
    export,
    jobs,
    plan,
    policies,
    replay,
    serve,
    trace,
    view,
)
from moeplan.planner.commands.explained import EXIT_FAILED

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which leaves [brackets] alone
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"moeplan {version('moeplan')}")
        raise typer.Exit


@app.callback()
def _program(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version, and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Plan where the expert replicas of a Mixture-of-Experts model live, and prove how good the plan is.

    Exit codes: 0 done, 1 something outside failed (a daemon, a disk), 2 the call was wrong.
    """


for command in (trace, plan, export, evaluate, policies, compare, affinity, replay, view, serve, jobs, admin):
    command.register(app)


def main() -> None:
    """Run the command line; what cannot be done ends with a line on standard error."""
    try:
        code = app(prog_name="moeplan", standalone_mode=False)
    except typer.TyperException as error:  # the call cannot be read
        if text := error.format_message():
            context = getattr(error, "ctx", None)
            where = f" (see `{context.command_path} --help`)" if context else ""
            print(f"moeplan: {text}{where}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(EXIT_FAILED)
    sys.exit(code)


if __name__ == "__main__":
    main()
