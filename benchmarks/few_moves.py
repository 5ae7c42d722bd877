"""What few moves are worth: layer 0 of a trace re-planned from the static layout with limits of moves.

    python benchmarks/few_moves.py [examples/traces/moe-e64-cut.npz] [--moves 2,4,8] [--out FILE.json]

The last ten steps are the scenarios, 16 devices have 5 slots each, parameters are the defaults. Time is of the
processor, as solves differ less in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, solve, warm_up
from result_file import Columns, write_result
from result_table import show_rows

TRACE = Path(__file__).parents[1] / "examples" / "traces" / "moe-e64-cut.npz"
STEPS, DEVICES, SLOTS, SEEDS = 10, 16, 5, range(6)
COLUMNS: Columns = {
    "moves": ("moves", "{}"),
    "first": ("seed 0", "{:.4f}"),
    "worst": ("worst of six seeds", "{:.4f}"),
    "seconds": ("processor, s", "{:.2f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trace", nargs="?", type=Path, default=TRACE)
    parser.add_argument("--moves", default="0,2,4,6,8,12,15,16", help="limits of moves, comma-separated")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    trace, cluster = Trace.open(arguments.trace), Cluster.uniform(DEVICES, SLOTS)
    steps = np.stack([step[0] for step in trace.read(trace.steps - STEPS)])
    static = Layout.contiguous(trace.experts, cluster.slots)
    problem = Problem(cluster, Demand.of(steps), current=static)
    warm_up()
    solve(problem)
    rows = [measured(problem, int(moves)) for moves in track(arguments.moves.split(","), transient=True)]
    show_rows(f"{trace.path.name}, layer 0", rows, COLUMNS)
    if arguments.out:
        write_result(arguments.out, rows)


def measured(problem: Problem, moves: int) -> dict[str, Any]:
    """A row of the table."""
    found, seconds = [], []
    for seed in SEEDS:
        start = time.process_time()
        plan = solve(replace(problem, max_moves=moves), parameters=SolveParameters(seed=seed))
        seconds.append(time.process_time() - start)
        found.append(plan.objective)
    return {"moves": moves, "first": found[0], "worst": max(found), "seconds": statistics.median(seconds)}


if __name__ == "__main__":
    main()
