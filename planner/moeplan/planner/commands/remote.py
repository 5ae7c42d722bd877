"""The way to a daemon: the options that say which, and a client of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.planner.commands.explained import EXIT_FAILED, EXIT_USAGE, fail
from moeplan.planner.commands.options import DAEMON
from moeplan.solvers.problem.errors import ProblemError

if TYPE_CHECKING:
    from moeplan.api.client import Client

__all__ = ["Ca", "Token", "connect", "with_client"]

LOCAL = "127.0.0.1:7433"

Server = Annotated[str, typer.Option(help="Address of the daemon.", envvar="MOEPLAN_SERVER", rich_help_panel=DAEMON)]
Token = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token.", envvar="MOEPLAN_TOKEN_FILE", rich_help_panel=DAEMON),
]
Ca = Annotated[
    Path | None,
    typer.Option(help="CA bundle (PEM) that verifies the server.", envvar="MOEPLAN_CA", rich_help_panel=DAEMON),
]
Certificate = Annotated[
    Path | None,
    typer.Option(help="PEM file of your certificate.", envvar="MOEPLAN_CERTIFICATE", rich_help_panel=DAEMON),
]
Key = Annotated[Path | None, typer.Option(help="PEM file of its key.", envvar="MOEPLAN_KEY", rich_help_panel=DAEMON)]


@contextmanager
def connect(
    server: Server = LOCAL, token: Token = None, ca: Ca = None, certificate: Certificate = None, key: Key = None
) -> Iterator[Client]:
    """A client; what the server refuses becomes a line and exit code 2, where it has no answer, 1."""
    from moeplan.api.client import Client
    from moeplan.api.connection import Security
    from moeplan.api.errors import InvalidRequestError, PreconditionError, ServiceError

    try:
        security = Security.from_files(token, ca, certificate, key)
        client = Client(server, security)
    except OSError as error:
        reason = (
            "give a file that can be read with --token, --ca, --certificate or --key, or in MOEPLAN_TOKEN_FILE etc."
        )
        raise fail(f"{error.filename}: {error.strerror}; {reason}", EXIT_USAGE) from None
    with client:
        try:
            yield client
        except ServiceError as error:
            field, equals, rest = error.message.partition(" = ")
            if isinstance(error, InvalidRequestError) and equals:  # as if it had been found here: with its flag
                value, _, reason = rest.partition(": ")
                raise ProblemError(field.removeprefix("problems[0]."), value, reason) from None
            wrong = isinstance(error, (InvalidRequestError, PreconditionError))
            raise fail(f"{error.code.name}: {error.message}", EXIT_USAGE if wrong else EXIT_FAILED) from None


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `connect` in place of its first parameter, the client that they make."""
    _, *own = _parameters(command)
    options = _parameters(connect)

    @wraps(command)
    def run(**given: Any) -> None:
        with connect(**{option.name: given.pop(option.name) for option in options}) as client:
            command(client, **given)

    # What typer reads: first what has no default.
    parameters = sorted((*own, *options), key=lambda parameter: parameter.default is not Parameter.empty)
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Its parameters, with their annotations as objects; only type checkers import the client, which loads slowly."""
    return list(signature(function, locals={"Client": Any}, eval_str=True).parameters.values())
