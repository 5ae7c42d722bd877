"""Results of benchmarks as JSON: with the machine, the date and the commit, so that no figure stands without them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Columns", "cells", "write_result"]

HERE = Path(__file__).parent

Columns = Mapping[str, tuple[str, str]]
"""Figures of a row by name: their titles in a printed table, and how they stand in it, as ``{:.2f}``."""


def cells(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """A row of a printed table; what was not measured is a dash."""
    return ["-" if row.get(key) is None else form.format(row[key]) for key, (_, form) in columns.items()]


def write_result(
    path: Path, rows: Sequence[dict[str, Any]], *, commit: str | None = None, machine: dict[str, Any] | None = None
) -> None:
    """Write what was measured.

    Args:
        path: File to write.
        rows: Figures by name, as a table of the documents shows them.
        commit: Name of this checkout, where git cannot tell.
        machine: What it ran on, if not this host's processor.
    """
    commit, machine = commit or _commit(), machine or _machine()
    result = {"commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine}
    path.write_text(json.dumps({**result, "command": _command(), "rows": list(rows)}, indent=1) + "\n")


def _command() -> list[str]:
    """Program and arguments as given, but files by their names: where they lie is the machine's own."""
    program, *arguments = sys.argv
    return [f"benchmarks/{Path(program).name}", *(Path(each).name if os.sep in each else each for each in arguments)]


@cache
def _commit() -> str:
    """The commit of this checkout; with a plus where files have changed since, but for results written before."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    )
    return described.stdout.strip()


def _machine() -> dict[str, Any]:
    libraries = {name: version(name) for name in ("numpy", "numba", "ortools")}
    return {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), **libraries}


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    facts = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in facts.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
