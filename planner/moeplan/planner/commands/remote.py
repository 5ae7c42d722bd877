"""How commands reach a daemon: the options that say which, and a client of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moeplan.api.client import Client

__all__ = ["Ca", "Token", "connect", "with_client"]

EXIT_FAILED = 1
LOCAL = "127.0.0.1:7433"

Server = Annotated[str, typer.Option(help="Address of the daemon.", envvar="MOEPLAN_SERVER")]
Token = Annotated[Path | None, typer.Option(help="File with the bearer token.", envvar="MOEPLAN_TOKEN_FILE")]
Ca = Annotated[
    Path | None,
    typer.Option(help="PEM file of the authorities that sign the server's certificate.", envvar="MOEPLAN_CA"),
]
Certificate = Annotated[Path | None, typer.Option(help="PEM file of your certificate.", envvar="MOEPLAN_CERTIFICATE")]
Key = Annotated[Path | None, typer.Option(help="PEM file of its key.", envvar="MOEPLAN_KEY")]


@contextmanager
def connect(
    server: Server = LOCAL, token: Token = None, ca: Ca = None, certificate: Certificate = None, key: Key = None
) -> Iterator[Client]:
    """A client; what the server refuses becomes a message and exit status 1."""
    from moeplan.api.client import Client
    from moeplan.api.connection import Security
    from moeplan.api.errors import ServiceError

    try:
        with Client(server, Security.from_files(token, ca, certificate, key)) as client:
            yield client
    except ServiceError as error:
        typer.echo(f"moeplan: {error.code.name}: {error.message}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    except OSError as error:
        typer.echo(f"moeplan: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None


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
