"""Published algorithms: what their paper or program gives on an input, beside what moeplan's policy gives on it.

    python benchmarks/fidelity.py [--out FILE.json]

Inputs are as small as they were published or worked by hand; docs/fidelity.md says where each comes from, and what our
policies do otherwise. UltraEP's are drawn as its test draws them, with other numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.commands.terminal import show_table
from moeplan.solvers import Cluster, Demand, LlepPlanner, Problem, QuotaPlanner, SpillOptions, SplitRule, solve
from moeplan.solvers.policies.symi import proportional
from moeplan.solvers.routing.balanced_assignment import balanced_assignment, optimal_assignment
from result_file import write_result
from spill import ULTRAEP_REPLICAS, zipf_counts

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    rows = [*eplb(), *flashlb(), *laer(), *llep(), *symi(), *ultraep(), *base()]
    show_table(
        "As published and here",
        ["algorithm", "input", "published", "here"],
        [[str(row[name]) for name in ("algorithm", "input", "published", "here")] for row in rows],
    )
    if arguments.out:
        write_result(arguments.out, rows)


def row(algorithm: str, given: str, published: object, here: object) -> Row:
    return {"algorithm": algorithm, "input": given, "published": published, "here": here}


def eplb() -> Iterator[Row]:
    loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    layout = solve(Problem(Cluster.uniform(8, 2, nodes=2), Demand.of(loads), groups=4), policy="eplb").layout
    published = [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    yield row("EPLB", "its README, layer 0: expert of each slot", published, layout.slots.ravel().tolist())


def flashlb() -> Iterator[Row]:
    loads = Demand.of([600, 560, 120, 120, 20, 10, 10, 10])
    problem = Problem(Cluster.uniform(8, 2), loads, split_rule=SplitRule.EVEN)
    for name, policy, published in (("EPLB", "eplb", 232), ("FlashLB", "hybrid", 205)):
        largest = int(solve(problem, policy=policy).split.device_loads().max())
        yield row(name, f"FlashLB's example, 8 x 2 slots: largest even load; here {policy}", published, largest)


def laer() -> Iterator[Row]:
    tokens = np.tile([50, 40, 30, 20] + [5] * 16, (16, 1))
    layout = solve(Problem(Cluster.uniform(16, 2, nodes=2), Demand.of(tokens)), policy="laer").layout
    yield row(
        "LAER-MoE", "16 devices, 2 nodes, 2 slots: replicas of experts 0-3", [6, 4, 4, 2], layout.replicas[:4].tolist()
    )


def llep() -> Iterator[Row]:
    counts = np.array([[24, 5, 20, 5]])
    options = SpillOptions.uniform(4, 2, 0)
    for gate, published in (("experts", 2), ("devices", 0)):
        planner = LlepPlanner(options, 1, min_tokens=1, gate="experts" if gate == "experts" else "devices")
        spilled = int(planner.plan(counts).quota.sum())
        whose = "paper" if gate == "experts" else "program"
        yield row("LLEP", f"24, 5, 20, 5 on 2 devices, gate on {gate} ({whose}): tokens spilled", published, spilled)


def symi() -> Iterator[Row]:
    for popularity, slots, most, published in (([60, 30, 10, 0], 8, 4, [4, 2, 1, 1]), ([90, 8, 2], 8, 8, [6, 1, 1])):
        counts = proportional(np.array(popularity), slots, most).tolist()
        yield row("SYMI", f"algorithm 1 by hand, popularity {popularity}, {slots} slots: replicas", published, counts)


def ultraep() -> Iterator[Row]:
    options = SpillOptions.uniform(128, 64, 2, tolerance=0.01)
    for ratio, published in ULTRAEP_REPLICAS.items():
        counts = zipf_counts(128, 64, ratio, tokens=8192)
        plan = QuotaPlanner(options, 64, dtype=counts.dtype).plan(counts)
        yield row("UltraEP", f"zipf, rank imbalance {ratio}: replicas for 1.01; here quota", published, plan.replicas)


def base() -> Iterator[Row]:
    scores = np.random.default_rng(0).normal(size=(1024, 16))
    ours, best = balanced_assignment(scores), optimal_assignment(scores)
    yield row("BASE", "1,024 tokens, 16 experts: score over the optimum", "-", round(ours.value / best.value, 6))
    counts = sorted(set(np.bincount(ours.expert).tolist()))
    yield row("BASE", "the same: tokens of an expert", [64], counts)


if __name__ == "__main__":
    main()
