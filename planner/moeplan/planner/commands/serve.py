"""`moeplan serve`: the daemon."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from moeplan.planner.commands.explained import EXIT_FAILED, EXIT_USAGE, Command, fail
from moeplan.planner.commands.options import DAEMON, OUTPUT
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["register"]

SECURITY = "Security"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(cls=Command)(serve)


def serve(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings.", envvar="MOEPLAN_CONFIG", rich_help_panel=DAEMON)
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="host:port or unix:path.", show_default="127.0.0.1:7433", rich_help_panel=DAEMON),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="Address by which others reach this daemon.", rich_help_panel=DAEMON)
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="host:port of Prometheus metrics.", show_default="127.0.0.1:7434", rich_help_panel=DAEMON),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(
            help="Collector of OpenTelemetry traces, http(s)://host:port.", show_default="none", rich_help_panel=DAEMON
        ),
    ] = None,
    no_page: Annotated[
        bool, typer.Option("--no-page", help="No live page where metrics are.", rich_help_panel=DAEMON)
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            help="URL of a shared store, postgresql://...", show_default="SQLite in --data", rich_help_panel=DAEMON
        ),
    ] = None,
    data: Annotated[
        str | None,  # a Path would read an empty name as the folder one is in
        typer.Option(
            help="Folder of the embedded store.",
            metavar="PATH",
            show_default="the user's data folder",
            rich_help_panel=DAEMON,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that solve.", show_default="cores - 1, at least 2", rich_help_panel=DAEMON),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="A limit, NAME=VALUE; repeatable. See --show.", rich_help_panel=DAEMON),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM file of the server's certificate.", rich_help_panel=SECURITY)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="PEM file of the server's private key.", rich_help_panel=SECURITY)
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            help="CA bundle (PEM) that verifies clients; they must show a certificate if it is set.",
            rich_help_panel=SECURITY,
        ),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="File of bearer tokens, one a line.", rich_help_panel=SECURITY)
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(help="TOML file of tenants: their tokens, roles, jobs and quotas.", rich_help_panel=SECURITY),
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow anyone, on any address.", rich_help_panel=SECURITY)
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(help="debug, info, warning or error.", show_default="info", rich_help_panel=OUTPUT),
    ] = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="Print the settings with their meaning, and end.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Run the planner daemon until SIGTERM; without options on localhost with an embedded store.

    Settings come from --config, then MOEPLAN_* environment variables (MOEPLAN_LIMITS__JOBS=10), then options; the later
    wins.
    """
    from pydantic import ValidationError

    from moeplan.planner.daemon.settings import UnknownSettingError, load

    given: dict[str, Any] = {
        "listen": listen,
        "advertise": advertise,
        "metrics": metrics,
        "traces": traces,
        "page": False if no_page else None,
        "store": store,
        "data": data,
        "workers": workers,
        "log_level": log_level,
        "security": _given(
            certificate=certificate,
            key=key,
            client_ca=client_ca,
            tokens=tokens,
            tenants=tenants,
            insecure=insecure or None,
        ),
        "limits": _limits(limit or []),
    }
    try:
        settings = load(config, _given(**given))
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            place = ".".join(str(part) for part in problem["loc"])
            reason = problem["msg"].removeprefix("Value error, ")
            typer.echo(f"moeplan: {place + ': ' if place else ''}{reason}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    except UnknownSettingError as error:
        raise fail(str(error), EXIT_USAGE) from None
    except UnicodeDecodeError:
        raise fail(f"--config = {config}: is no text file; give a TOML file in UTF-8", EXIT_USAGE) from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise fail(f"--config = {config}: {getattr(error, 'strerror', None) or error}", EXIT_USAGE) from None
    if show:
        _show(settings)
        return
    import asyncio
    import gc

    gc.disable()  # until it serves: what is imported stays, and to look through it takes a fifth of the start
    from moeplan.planner.daemon import logs
    from moeplan.planner.daemon.database import StoreError
    from moeplan.planner.daemon.server import StartError, serve

    logs.configure(settings.log_level)
    try:
        asyncio.run(serve(settings))
    except (StartError, StoreError) as error:
        raise fail(str(error), EXIT_FAILED) from None


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _limits(pairs: list[str]) -> dict[str, str]:
    limits = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ProblemError("--limit", pair, "must be NAME=VALUE, for instance jobs=10")
        limits[name] = value
    return limits


def _show(settings: Any) -> None:
    """Print the settings as a TOML file."""
    for name, info in type(settings).model_fields.items():
        if name in ("limits", "security"):
            continue
        value = getattr(settings, name)
        _show_line(name, "..." if name == "store" and value else value, info.description)  # may hold a password
    for section in ("limits", "security"):
        typer.echo(f"\n[{section}]")
        for name, info in type(getattr(settings, section)).model_fields.items():
            _show_line(name, getattr(getattr(settings, section), name), info.description)


def _show_line(name: str, value: object, meaning: str) -> None:
    if value is None:
        typer.echo(f'# {name} = ""  # {meaning}')
    else:
        shown = json.dumps(str(value) if isinstance(value, (str, Path)) else value)
        typer.echo(f"{name} = {shown}  # {meaning}")
