"""HarMoEny's raw traces: a folder per rank with ``moe_layer-{l}.csv``, a row per iteration.

The column ``expert distribution`` is a list of token counts, one per expert.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, counts_of
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_harmoeny", "read_harmoeny"]

NAME = re.compile(r"moe_layer-(\d+)\.csv")
COLUMN = "expert distribution"


def is_harmoeny(path: Path) -> bool:
    """True if the folder holds such a trace."""
    return path.is_dir() and any(path.glob("[0-9]*/moe_layer-*.csv"))


def read_harmoeny(paths: Sequence[Path]) -> Recording:
    """The trace of one folder."""
    if len(paths) != 1 or not paths[0].is_dir():
        raise TraceError(paths[-1], "give one folder, which holds a folder of moe_layer-*.csv for each rank")
    (folder,) = paths
    ranks = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    if not ranks:
        raise TraceError(folder, "holds no folder 0, 1, ... with moe_layer-*.csv")
    layers = sorted(int(match[1]) for file in ranks[0].iterdir() if (match := NAME.fullmatch(file.name)))
    files = [[rank / f"moe_layer-{layer}.csv" for rank in ranks] for layer in layers]
    first = next(_rows(files[0][0]), None) if files else None
    if first is None:
        raise TraceError(ranks[0], "holds no moe_layer-*.csv with a row")
    dropped: list[str] = []

    def steps() -> Iterator[Int64]:
        tables = [[_rows(file) for file in of_layer] for of_layer in files]
        while True:
            rows = [[next(table, None) for table in of_layer] for of_layer in tables]
            found = [row for of_layer in rows for row in of_layer if row is not None]
            if len(found) < len(layers) * len(ranks):
                if found:
                    dropped.append("rows at the end that not every rank and layer has")
                return
            yield np.stack(found).reshape(len(layers), len(ranks), -1)

    return Recording(layers, len(ranks), len(first), steps(), dropped=dropped)


def _rows(path: Path) -> Iterator[Int64]:
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if COLUMN not in row:
                    raise TraceError(path, f"has no column `{COLUMN}`; has {', '.join(row)[:200]}")
                yield counts_of(path, COLUMN, json.loads(row[COLUMN] or "null"), 1)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(path, f"cannot be read ({error})") from None
