"""Lending beyond a layout: what it adds to sharded experts whose layouts follow the load, and what it takes.

    python benchmarks/lent_beyond.py TRACE:DEVICES:SLOTS ... [--spare 1] [--least 0.02] [--out FILE.json]

Every 20 steps a layout is planned from the ten before them, and judged on the step after: alone, and with what ranks
lend beyond it for that pass. Beside them homes in order, one slot for each expert, of which the same ranks lend. A loan
has so many tokens at least, as a share of a rank's mean load.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeplan.planner.traces.trace import Trace
from moeplan.runtime_client.layers.dividing import Division
from moeplan.runtime_client.layers.spilling import Spilling
from moeplan.solvers import (
    Cluster,
    ExpertSpec,
    Forecast,
    Layout,
    Problem,
    QuotaPlanner,
    SolveParameters,
    SpillOptions,
    forecast,
    solve,
)
from moeplan.solvers.problem.arrays import Int64
from result_file import write_result

WINDOW, EVERY = 10, 20
SEARCH = SolveParameters(work_limit=20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="+", metavar="TRACE:DEVICES:SLOTS")
    parser.add_argument("--spare", type=int, default=1, help="slots of a device for loans")
    parser.add_argument("--least", type=float, default=0.02, help="tokens of a loan, as a share of a mean load")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    measured: list[dict[str, Any]] = []
    table = Table("trace", "experts", "slots gathered", "imbalance alone", "with loans", "loans of a rank")
    for text in arguments.traces:
        path, devices, slots = text.rsplit(":", 2)
        trace, cluster = Trace.open(path), Cluster.uniform(int(devices), int(slots))
        homes = Cluster.uniform(cluster.devices, -(-trace.experts // cluster.devices))
        for name, on in (("planned", cluster), ("homes in order", homes)):
            found = np.array(list(judge(trace, on, name == "planned", arguments.spare, arguments.least)))
            alone, lent, loans = (float(mean) for mean in found.mean(axis=0))
            row: dict[str, Any] = {"trace": Path(text).name, "layout": name, "slots": int(on.slots[0])}
            row |= {"samples": len(found), "alone": alone, "lent": lent, "loans": loans}
            measured.append(row)
            table.add_row(row["trace"], name, str(row["slots"]), f"{alone:.4f}", f"{lent:.4f}", f"{loans:.2f}")
    Console().print(table)
    if arguments.out:
        write_result(arguments.out, measured)


def judge(
    trace: Trace, cluster: Cluster, planned: bool, spare: int, least: float
) -> Iterator[tuple[float, float, float]]:
    """Imbalance alone and with loans, and loans per rank, of each layer and step."""
    ranks = cluster.devices
    division = Division(cluster, ExpertSpec(), "optimal")
    layouts = [Layout.contiguous(trace.experts, cluster.slots)] * trace.layers
    for window in track(list(trace.windows(WINDOW, EVERY)), trace.path.name, transient=True):
        for layer, counts in enumerate(window.next):
            tokens = of_ranks(counts, ranks)
            if planned:
                demand = forecast(window.history[:, layer], Forecast(window_steps=WINDOW))
                problem = Problem(cluster, demand, current=layouts[layer], max_moves=cluster.total_slots // 10)
                layouts[layer] = solve(problem, parameters=SEARCH).layout
            options = SpillOptions.uniform(
                trace.experts, ranks, spare, min_tokens=max(1, int(least * tokens.sum() / ranks))
            )
            spilling = Spilling(QuotaPlanner(options, ranks, quick=True), layouts[layer], division)
            alone = division.divide(layouts[layer], tokens).device_loads()[0]
            spilled = spilling.plan(tokens, 0)
            loans = (spilled.slots >= 0).sum() - (layouts[layer].slots >= 0).sum()
            yield alone.max() / alone.mean(), spilled.loads.max() / spilled.loads.mean(), loans / ranks


def of_ranks(counts: Int64, ranks: int) -> Int64:
    """Counts int64[sources, experts] as of so many ranks: sources are joined, or their tokens dealt out."""
    sources = len(counts)
    if sources % ranks == 0:
        return counts.reshape(ranks, sources // ranks, -1).sum(axis=1)
    each, rest = np.divmod(counts.sum(axis=0), ranks)
    return each + (np.arange(ranks)[:, None] < rest)


if __name__ == "__main__":
    main()
