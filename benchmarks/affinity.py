"""Experts of consecutive layers placed by affinity, on synthetic traces: the part of transitions that leave their node.

    python benchmarks/affinity.py [--out FILE.json]

Loads are those of all steps, the tolerance and the time of the ILP the defaults.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from moeplan.planner.traces.synthetic import SyntheticTrace, generate
from moeplan.solvers import Cluster, Layout
from moeplan.solvers.affinity.placement import crossings, place_by_affinity
from result_file import Columns, write_result
from result_table import show_rows

CASES = (
    (SyntheticTrace(steps=5, layers=3, experts=8, sources=4, top_k=2), 4, 2),
    (SyntheticTrace(steps=10, experts=16, top_k=2), 8, 2),
    (SyntheticTrace(steps=20), 16, 4),
    (SyntheticTrace(steps=10, layers=8, experts=256, sources=32, top_k=8, affinity=1.5), 32, 4),
)
"""Traces, devices and nodes."""

COLUMNS: Columns = {
    "experts": ("experts", "{}"),
    "layers": ("layers", "{}"),
    "devices": ("devices", "{}"),
    "nodes": ("nodes", "{}"),
    "in_order": ("experts in order", "{:.1%}"),
    "placed": ("placed", "{:.1%}"),
    "at_least": ("at least, by proof", "{:.1%}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    rows = [measured(*case) for case in track(CASES, transient=True)]
    show_rows("transitions that leave their node", rows, COLUMNS)
    if arguments.out:
        write_result(arguments.out, rows)


def measured(trace: SyntheticTrace, devices: int, nodes: int) -> dict[str, Any]:
    """A row of the table."""
    arrays = generate(trace)
    pairs = np.asarray(arrays["pairs"], np.int64)
    cluster = Cluster.uniform(devices, -(-trace.experts // devices), nodes=nodes)
    loads = arrays["counts"].sum(axis=(0, 2))
    placed = place_by_affinity(pairs, cluster, loads=loads)
    in_order = crossings(pairs, cluster, [Layout.contiguous(trace.experts, cluster.slots)] * trace.layers)
    return {
        "experts": trace.experts,
        "layers": trace.layers,
        "devices": devices,
        "nodes": nodes,
        "in_order": in_order / placed.total,
        "placed": placed.crossing / placed.total,
        "at_least": placed.bound / placed.total,
    }


if __name__ == "__main__":
    main()
