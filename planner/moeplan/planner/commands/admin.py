"""`moeplan admin`: what an operator does to daemons and their stores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.planner.commands.explained import EXIT_FAILED, Command, fail
from moeplan.planner.commands.jobs import Name, resource
from moeplan.planner.commands.options import DAEMON, Format, Output, print_json
from moeplan.planner.commands.remote import with_client

if TYPE_CHECKING:
    from moeplan.api.client import Client

__all__ = ["register"]

Data = Annotated[
    Path | None,
    typer.Option(help="Folder of the embedded store.", show_default="the user's data folder", rich_help_panel=DAEMON),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    admin = typer.Typer(help="Operate daemons: move their jobs, copy their stores.", no_args_is_help=True)
    for command in (servers, move, drain, backup, restore, compact):
        admin.command(cls=Command)(command)
    app.add_typer(admin, name="admin")


@with_client
def servers(client: Client, output: Output = Format.TABLE) -> None:
    """List the daemons behind a shared store, with the jobs of each."""
    from moeplan.planner.commands.terminal import show_table

    found = client.servers()
    if output is Format.JSON:
        print_json([asdict(server) for server in found])
        return
    rows = [[s.address, s.version, str(s.jobs), "draining" if s.draining else "-"] for s in found]
    show_table(f"{len(rows)} daemons", ["address", "version", "jobs", "state"], rows, output)


@with_client
def move(
    client: Client,
    job: Name,
    to: Annotated[
        str,
        typer.Option(
            help="Address of the daemon that gets it.",
            show_default="the one with the fewest jobs",
            rich_help_panel=DAEMON,
        ),
    ] = "",
) -> None:
    """Give a job to another daemon; its ranks connect there, and its versions go on.

    Its window of statistics fills again.
    """
    address = client.move_job(resource(job), to)
    typer.echo(f"{resource(job)} is at {address}")


@with_client
def drain(
    client: Client,
    end: Annotated[bool, typer.Option("--end", help="Take jobs again.", rich_help_panel=DAEMON)] = False,
) -> None:
    """Give all jobs of a daemon to the others, and let it take no more: before it is stopped."""
    moved = client.drain(end=end)
    typer.echo(f"{client.address} takes jobs again" if end else f"{moved} jobs moved away from {client.address}")


def backup(file: Annotated[Path, typer.Argument(help="File to write; it must not exist.")], data: Data = None) -> None:
    """Copy the embedded store as it is at one moment, also while a daemon uses it.

    PostgreSQL has its own: pg_dump --table 'moeplan_*'.
    """
    from moeplan.planner.daemon import backup
    from moeplan.planner.daemon.database import StoreError

    try:
        size = backup.backup(_folder(data), file)
    except StoreError as error:
        raise fail(str(error), EXIT_FAILED) from None
    typer.echo(f"{file}: {size:,} bytes")


def restore(file: Annotated[Path, typer.Argument(help="A copy that backup made.")], data: Data = None) -> None:
    """Put a copy into a folder without a store, then start the daemon.

    Ranks that hold newer plans than the copy are given its plans only once versions have passed theirs: start their
    training with a later incarnation.
    """
    from moeplan.planner.daemon import backup
    from moeplan.planner.daemon.database import StoreError

    try:
        backup.restore(file, _folder(data))
    except StoreError as error:
        raise fail(str(error), EXIT_FAILED) from None


def compact(data: Data = None) -> None:
    """Give the space of deleted jobs and plans back to the disk; the daemon must be stopped."""
    from moeplan.planner.daemon import backup
    from moeplan.planner.daemon.database import StoreError

    try:
        before, after = backup.compact(_folder(data))
    except StoreError as error:
        raise fail(str(error), EXIT_FAILED) from None
    typer.echo(f"{before:,} bytes before, {after:,} after")


def _folder(data: Path | None) -> Path:
    from moeplan.planner.daemon.settings import default_data_folder

    return data or default_data_folder()
