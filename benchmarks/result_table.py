"""Results of benchmarks on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeplan.planner.commands.terminal import show_table
from result_file import Columns, cells

__all__ = ["show_rows"]


def show_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Columns) -> None:
    """Print these columns of the rows."""
    show_table(title, [name for name, _ in columns.values()], [cells(row, columns) for row in rows])
