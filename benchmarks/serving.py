"""Layouts for serving engines beside those of the engines' own planners, under their even split.

    python benchmarks/serving.py TRACE:DEVICES:SLOTS ... [--offsets 0] [--peers FOLDER] [--out FILE.json]

Plans are made from ten steps and judged on the one after them, every 20 steps, with nothing in force. `peers.py` says
where the engines' planners come from; one that is not there is named. They may put two replicas of an expert on one
device, which gives them more freedom; `twice` counts such slots. Engines count the tokens of an expert;
`moeplan, by source` knows those of each source, as ranks of a training do, and has the default limit of work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moeplan.planner.traces.trace import Trace
from moeplan.runtime_client.integrations.serving_policy import plan_slots
from moeplan.solvers import Cluster, Problem, SplitRule, forecast, solve
from moeplan.solvers.problem.arrays import Int64
from peers import Peer, even_imbalance, load_peers
from result_file import write_result

WINDOW, EVERY = 10, 20
ENGINES = ("SGLang deepseek", "SGLang deepseek_vec", "vLLM default", "FlashLB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="+", metavar="TRACE:DEVICES:SLOTS")
    parser.add_argument("--offsets", default="0", help="first steps, comma-separated")
    parser.add_argument("--peers", type=Path, help="folder with the files of planners; see peers.py")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    peers, missing = load_peers(arguments.peers, ENGINES)
    planners: dict[str, Peer] = {"moeplan, by source": by_source}
    planners |= {name: partial(of_experts, planner) for name, planner in {"moeplan": ours, **peers}.items()}
    offsets = [int(offset) for offset in arguments.offsets.split(",")]
    rows: list[dict[str, Any]] = []
    for text in arguments.traces:
        path, devices, slots = text.rsplit(":", 2)
        rows += measure(Trace.open(path), Path(path).stem, int(devices), int(slots), planners, offsets)
    table = Table("trace", "planner", "on the window", "next step", "p95", "twice", "ms a layer")
    for row in rows:
        numbers = [f"{row[key]:.4f}" for key in ("window", "next_step", "p95")]
        table.add_row(row["trace"], row["planner"], *numbers, f"{row['twice']:.1%}", f"{row['ms']:.1f}")
    Console().print(table)
    for name, why in missing.items():
        print(f"{name} is not there: {why}")
    if arguments.out:
        write_result(arguments.out, rows)


def measure(
    trace: Trace, name: str, devices: int, slots: int, planners: dict[str, Peer], offsets: Sequence[int]
) -> list[dict[str, Any]]:
    """A row per planner, each given int64[steps, sources, experts]."""
    found: dict[str, list[tuple[float, float, float, float]]] = {each: [] for each in planners}
    windows = [window for offset in offsets for window in trace.windows(WINDOW, EVERY, offset)]
    for window in track(windows, name, transient=True):
        for layer in range(trace.layers):
            history, after = window.history[:, layer], window.next[layer].sum(axis=0)
            for each, planner in planners.items():
                start = time.perf_counter()
                try:
                    layout = planner(history, devices, slots)
                except ValueError:  # FlashLB plans no layout for some windows
                    continue
                seconds = time.perf_counter() - start
                twice = 1 - (sum(len(set(row[row >= 0].tolist())) for row in layout) + (layout < 0).sum()) / layout.size
                fitted = float(np.mean([even_imbalance(layout, step) for step in history.sum(axis=1)]))
                found[each].append((fitted, even_imbalance(layout, after), twice, seconds))
    rows = []
    for each, values in found.items():
        window_, next_, twice_, seconds_ = np.array(values).T
        rows.append(
            {
                "trace": name,
                "planner": each,
                "devices": devices,
                "slots": slots,
                "window": float(window_.mean()),
                "next_step": float(next_.mean()),
                "planned": len(values),
                "p95": float(np.quantile(next_, 0.95)),
                "twice": float(twice_.mean()),
                "ms": 1e3 * float(np.median(seconds_)),
            }
        )
    return rows


def of_experts(planner: Peer, tokens: Int64, devices: int, slots: int) -> Int64:
    """The layout of a planner that does not know sources."""
    return planner(tokens.sum(axis=1), devices, slots)


def by_source(tokens: Int64, devices: int, slots: int) -> Int64:
    """The layout for the default forecast, which draws sources anew."""
    problem = Problem(Cluster.uniform(devices, slots), forecast(tokens), split_rule=SplitRule.EVEN)
    return solve(problem).layout.slots.astype(np.int64)


def ours(tokens: Int64, devices: int, slots: int) -> Int64:
    """The layout that the plug-ins give."""
    return plan_slots(tokens[:, np.newaxis], devices * slots, devices, groups=1, nodes=1)[0].reshape(devices, slots)


if __name__ == "__main__":
    main()
