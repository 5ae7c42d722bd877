"""The terminal: tables, plain columns when piped, progress for anything over two seconds, what is being compiled."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moeplan.planner.commands.options import Format

__all__ = ["Advance", "compiling", "progress", "show_table", "status"]


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], output: Format = Format.TABLE
) -> None:
    """Print a table to standard output; the first column is text, the others are numbers."""
    if output is Format.CSV:
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return
    console = Console(markup=False)
    if console.is_terminal:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    print(title)
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


class Advance:
    """Moves a progress bar on by one."""

    def __init__(self, bar: Progress, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)

    def __call__(self) -> None:
        """One more is done."""
        self._bar.advance(self._task)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A progress bar, with an estimate where the total is known, on standard error and only if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Advance(bar, total)


@contextmanager
def status(what: str) -> Iterator[None]:
    """Say what is going on, on standard error, while it goes on."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        print(what, file=sys.stderr, flush=True)
        yield


@contextmanager
def compiling() -> Iterator[None]:
    """Say what is compiled, on standard error; nothing where all kernels are in the cache, as after the first time."""
    from numba.core import event

    console = Console(stderr=True)
    shown = console.status("loading kernels")

    class Compilations(event.Listener):  # type: ignore[misc]
        """Hears of every kernel that is not in the cache."""

        count = 0

        def on_start(self, event: Any) -> None:
            """A kernel is compiled."""
            self.count += 1
            name = event.data["dispatcher"].py_func.__name__
            shown.update(f"compiling kernels, once after an installation: {name}, {self.count} so far")
            if self.count == 1 and not console.is_terminal:
                print("compiling kernels, once after an installation: about a minute", file=sys.stderr, flush=True)

        def on_end(self, event: Any) -> None:
            """It is done."""

    with event.install_listener("numba:compile", Compilations()):
        if not console.is_terminal:
            yield
            return
        with shown:
            yield
