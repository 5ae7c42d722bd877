"""Counts as a table (CSV) with the columns step, layer, source, expert, tokens; source may be missing.

Rows are in the order of their steps; pairs that are not there have no tokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, start_of
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import MAX_TOKENS, Int64

__all__ = ["is_table", "read_table"]

COLUMNS = ("step", "layer", "expert", "tokens")
Cell = tuple[int, int, int, int, int]
"""Step, layer, source, expert, tokens."""


def is_table(path: Path) -> bool:
    """True if the first line names the columns."""
    head = start_of(path).split(b"\n", maxsplit=1)[0].decode(errors="replace")
    return set(COLUMNS) <= {name.strip() for name in head.split(",")}


def read_table(paths: Sequence[Path]) -> Recording:
    """The table of one file, which is read twice: its sizes are known only at its end."""
    if len(paths) > 1:
        raise TraceError(paths[1], "is a second table; put all rows into one")
    (path,) = paths
    numbers: set[int] = set()
    layers: set[int] = set()
    sources = experts = last = 0
    for step, layer, source, expert, _ in _cells(path):
        if numbers and step < last:
            raise TraceError(path, f"step {step} stands after step {last}; sort the rows by step")
        last = step
        numbers.add(step)
        layers.add(layer)
        sources, experts = max(sources, source + 1), max(experts, expert + 1)
    if not numbers:
        raise TraceError(path, "has no row")
    order = {layer: row for row, layer in enumerate(sorted(layers))}

    def steps() -> Iterator[Int64]:
        for _, cells in groupby(_cells(path), key=lambda cell: cell[0]):
            counts = np.zeros((len(order), sources, experts), np.int64)
            for _, layer, source, expert, tokens in cells:
                counts[order[layer], source, expert] += tokens
            yield counts

    return Recording(list(order), sources, experts, steps(), min(numbers), len(numbers))


def _cells(path: Path) -> Iterator[Cell]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise TraceError(
                    path, f"has no column {', '.join(sorted(missing))}; give step,layer,source,expert,tokens"
                )
            for number, row in enumerate(reader, 2):
                try:
                    cell = tuple(int(row.get(name) or 0) for name in ("step", "layer", "source", "expert"))
                    tokens = int(row["tokens"])
                except (ValueError, TypeError):
                    raise TraceError(path, f"line {number} does not hold whole numbers") from None
                if min(*cell, tokens) < 0 or tokens > MAX_TOKENS or max(cell[1:]) >= 2**16:
                    raise TraceError(path, f"line {number}: numbers must be at least 0, and below 2**16 but for tokens")
                yield (cell[0], cell[1], cell[2], cell[3], tokens)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(path, f"cannot be read ({error})") from None
