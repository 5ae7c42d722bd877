"""The command line."""

from __future__ import annotations

import sys

import typer

from moeplan.planner.commands import affinity, compare, jobs, plan, policies, replay, serve, trace
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan where the expert replicas of a Mixture-of-Experts model live, and prove how good the plan is.",
)
for command in (trace, plan, policies, compare, affinity, replay, serve, jobs):
    command.register(app)

BAD_INPUT = 2


def main() -> None:
    """Run the command line; a mistake of the user's ends with a message and exit code 2."""
    try:
        app()
    except ProblemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
