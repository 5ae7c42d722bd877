"""Tokens that cross nodes: `traffic` beside the load-only plan, and beside the proven least.

    python benchmarks/traffic.py TRACE --devices 32 --nodes 4 --slots 9,10,12

Every row is a mean over layers and windows. `saved` compares with `hybrid` under the split of least load, each source
sending to the nearest replica that has quota left, so the baseline already uses what locality it happens to have.
`at most` is what a layout with these slots could save, whatever its loads. The last columns repeat both on the step
after the window, with the layout of the window and the split of that step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.commands.terminal import progress, show_table
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, evaluate, solve
from moeplan.solvers.plan.cost import between_nodes
from moeplan.solvers.split.coverage import coverable, tokens_by_domain
from result_file import write_result

POLICIES = ("static", "eplb", "hybrid", "traffic")
COLUMNS = {
    "slots": "",
    "policy": "",
    "between_nodes": ".1%",
    "saved": "+.1%",
    "at_most": ".1%",
    "imbalance": ".4f",
    "more_load": "+.2%",
    "next_between_nodes": ".1%",
    "next_saved": "+.1%",
    "next_imbalance": ".4f",
    "seconds": ".2f",
}
"""Figures of a row, and how they are shown."""


def least(problem: Problem) -> float:
    """No layout with all slots in use sends a smaller part of the tokens between nodes, averaged over scenarios."""
    tokens = tokens_by_domain(problem.cluster, problem.demand.tokens, problem.source_device)
    part = np.tensordot(problem.demand.weights / tokens.sum(axis=(1, 2)), tokens, axes=1)
    return 1.0 - coverable(part, int(problem.capacity.sum()))


def judged(problem: Problem, layout: Layout, rule: str) -> tuple[float, float]:
    """Part of the tokens between nodes, and imbalance."""
    plan = evaluate(problem, layout, rule)
    return float(problem.demand.weights @ between_nodes(problem, layout, plan.split)), plan.mean_imbalance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--slots", default="9,10,12")
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--every", type=int, default=60)
    parser.add_argument("--work-limit", type=int, default=SolveParameters().work_limit)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    trace = Trace.open(arguments.trace)
    widths = [int(slots) for slots in arguments.slots.split(",")]
    parameters = SolveParameters(work_limit=arguments.work_limit)
    rows: list[dict[str, Any]] = []
    plans = trace.window_count(arguments.window, arguments.every) * trace.layers * len(widths) * len(POLICIES)
    with progress("planning", plans) as advance:
        for slots in widths:
            cluster = Cluster.uniform(arguments.devices, slots, nodes=arguments.nodes)
            scores: dict[str, list[tuple[float, ...]]] = {policy: [] for policy in POLICIES}
            floor = []
            for window in trace.windows(arguments.window, arguments.every):
                for layer in range(trace.layers):
                    problem = Problem(cluster, Demand.of(window.history[:, layer]))
                    after = replace(problem, demand=Demand.of(window.next[layer]))
                    floor.append(least(problem))
                    for policy in POLICIES:
                        rule = {"traffic": "home", "eplb": "even"}.get(policy, "optimal")
                        plan = solve(problem, policy=policy, parameters=parameters)
                        now, then = judged(problem, plan.layout, rule), judged(after, plan.layout, rule)
                        scores[policy].append((*now, *then, plan.seconds))
                        advance()
            means = {policy: np.mean(values, axis=0) for policy, values in scores.items()}
            base = means["hybrid"]
            for policy, (remote, load, next_remote, next_load, seconds) in means.items():
                rows.append(
                    {
                        "slots": slots,
                        "policy": policy,
                        "between_nodes": remote,
                        "saved": 1 - remote / base[0],
                        "at_most": 1 - float(np.mean(floor)) / base[0],
                        "imbalance": load,
                        "more_load": load / base[1] - 1,
                        "next_between_nodes": next_remote,
                        "next_saved": 1 - next_remote / base[2],
                        "next_imbalance": next_load,
                        "seconds": seconds,
                    }
                )
    show_table(
        f"{arguments.trace.name}: {arguments.devices} devices in {arguments.nodes} nodes",
        list(COLUMNS),
        [[format(row[name], form) for name, form in COLUMNS.items()] for row in rows],
    )
    if arguments.out:
        write_result(arguments.out, rows)


if __name__ == "__main__":
    main()
