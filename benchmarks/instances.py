"""Random instances: moeplan's policies beside the planners of other projects, under even and under best split.

    python benchmarks/instances.py [--peers DIR] [--kinds zipf,hot] [--out FILE.json]

26 shapes from 8 experts on 2 devices to 384 on 128, each with seven kinds of load: one load vector, which is also what
the layout is judged on. See `peers` for where the others' code comes from. A layout with two replicas of one expert on
a device, which they allow and moeplan does not, is set apart: it counts in a planner's mean, but not among those that
hybrid must not be worse than.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from moeplan.planner.commands.terminal import show_table
from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, SplitRule, evaluate, solve
from moeplan.solvers.problem.arrays import Int64
from peers import Peer, even_imbalance, load_peers
from result_file import write_result

SHAPES = [
    *((8, 2, 6), (8, 4, 3), (8, 8, 2), (16, 4, 5), (16, 8, 3), (32, 4, 9), (32, 8, 5), (32, 16, 3), (60, 8, 8)),
    *((64, 8, 9), (64, 16, 4), (64, 16, 5), (64, 32, 3), (128, 8, 17), (128, 8, 20), (128, 16, 9), (128, 32, 5)),
    *((128, 64, 3), (160, 16, 11), (256, 16, 17), (256, 32, 9), (256, 64, 5), (256, 144, 2), (384, 48, 9)),
    *((384, 96, 5), (384, 128, 4)),
]
"""Experts, devices, slots of each."""

KINDS = ("zipf 0.6", "zipf 1.2", "lognormal 1", "lognormal 2", "hot", "uniform", "small")

OURS = ("hybrid", "eplb", "flexmoe", "laer", "symi", "static", "base")

RULES = {"even": SplitRule.EVEN, "best": SplitRule.OPTIMAL}

EQUAL = SolveParameters().target_gap
"""Relative difference that counts as none: hybrid stops that near to its bound."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", type=Path, help="folder with the others' code")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of load, comma-separated")
    parser.add_argument("--draw", type=int, default=0, help="number of the draw: the same shapes, other loads")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    peers, missing = load_peers(arguments.peers)
    instances = [(shape, kind) for shape in SHAPES for kind in kinds]
    rows = [
        row for shape, kind in track(instances, transient=True) for row in judged(shape, kind, arguments.draw, peers)
    ]
    for rule in RULES:
        show_table(
            f"{len(instances)} instances, {rule} split, max/mean",
            ["planner", "planned", "mean", "hybrid's there", "worse than hybrid", "better", "by at most", "set apart"],
            [
                *(
                    [format(cell, ".4f") if isinstance(cell, float) else str(cell) for cell in row.values()]
                    for row in summary(rows, rule)
                ),
                *([name, f"missing: {why}", *["-"] * 6] for name, why in missing.items()),
            ],
        )
        best = [min(values) for values in by_instance(rows, rule).values()]
        print(f"{rule} split, mean of the best planner of each instance: {np.mean(best):.4f}")
    if arguments.out:
        write_result(arguments.out, [*grouped(rows), {"missing": missing}])
        write_result(arguments.out.with_name(f"{arguments.out.stem}-planners.json"), planners(rows))


def tokens_of(experts: int, kind: str, seed: int) -> Int64:
    """int64[experts]: one load vector, of a million tokens where it is not a small one."""
    rng = np.random.default_rng(seed)
    match kind.split():
        case ["zipf", exponent]:
            weight = rng.permutation(np.arange(1, experts + 1) ** -float(exponent))
        case ["lognormal", sigma]:
            weight = rng.lognormal(0, float(sigma), experts)
        case ["hot"]:
            weight = rng.uniform(0.5, 1.5, experts)
            weight[rng.choice(experts, max(1, experts // 16), replace=False)] *= 20
        case ["uniform"]:
            weight = rng.uniform(0, 1, experts)
        case ["small"]:
            return rng.integers(0, 21, experts)
        case _:
            raise SystemExit(f"--kinds: {kind}: must be among {', '.join(KINDS)}")
    return (weight / weight.sum() * 1_000_000).astype(np.int64)


def judged(shape: tuple[int, int, int], kind: str, draw: int, peers: dict[str, Peer]) -> list[dict[str, Any]]:
    """A row for every planner: its imbalance under both rules, in whole tokens, or why it has none."""
    experts, devices, slots = shape
    tokens = tokens_of(experts, kind, SHAPES.index(shape) + len(SHAPES) * draw)
    problem = Problem(Cluster.uniform(devices, slots), Demand.of(tokens))
    rows = []
    for name in (*OURS, *peers):
        row: dict[str, Any] = {"instance": f"E{experts} D{devices} C{slots} {kind}", "planner": name}
        try:
            if name == "hybrid":
                layouts = {rule: solve(replace(problem, split_rule=how)).layout for rule, how in RULES.items()}
            elif name in peers:
                found = peers[name](tokens[None], devices, slots)
                distinct = [np.unique(device) for device in found]
                row["duplicates"] = found.size - sum(map(len, distinct))
                held = np.full((devices, slots), -1, np.int32)
                for device, experts_here in zip(held, distinct, strict=True):
                    device[: len(experts_here)] = experts_here
                layouts = dict.fromkeys(RULES, Layout.partial(held, experts))
            else:
                layouts = dict.fromkeys(RULES, solve(problem, policy=name).layout)
            row |= {rule: evaluate(problem, layouts[rule], how).objective for rule, how in RULES.items()}
            if row.get("duplicates"):  # replicas that share a device have a share each
                row["even"] = even_imbalance(found, tokens)
        except Exception as error:  # a planner that cannot plan this shape is reported, not hidden
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


def by_instance(rows: list[dict[str, Any]], rule: str) -> dict[str, list[float]]:
    """Imbalances of every planner that has one, by instance."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["instance"], []).append(row[rule])
    return found


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per instance, with what each planner has there; null where it cannot plan it."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        new: dict[str, Any] = {"instance": row["instance"], **{rule: {} for rule in RULES}, "duplicates": []}
        instance = found.setdefault(row["instance"], new)
        for rule in RULES:
            instance[rule][row["planner"]] = None if "error" in row else round(row[rule], 6)
        if row.get("duplicates"):
            instance["duplicates"].append(row["planner"])
    return list(found.values())


def summary(rows: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """Each planner's mean, and on how many instances it is worse and better than hybrid, those set apart left out."""
    ours = {row["instance"]: row[rule] for row in rows if row["planner"] == "hybrid"}
    table = []
    for planner in dict.fromkeys(row["planner"] for row in rows):
        mine = [row for row in rows if row["planner"] == planner and "error" not in row]
        ratio = np.array([ours[row["instance"]] / row[rule] for row in mine if not row.get("duplicates")])
        table.append(
            {
                "planner": planner,
                "planned": len(mine),
                rule: float(np.mean([row[rule] for row in mine])),
                f"hybrid_{rule}": float(np.mean([ours[row["instance"]] for row in mine])),
                f"worse_{rule}": int((ratio < 1 - EQUAL).sum()),
                f"better_{rule}": int((ratio > 1 + EQUAL).sum()),
                f"better_{rule}_by": max(0.0, float(ratio.max(initial=1)) - 1),
                "set_apart": sum(bool(row.get("duplicates")) for row in mine),
            }
        )
    return table


def planners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per planner, with its figures under every rule."""
    return [
        {k: v for of_rule in both for k, v in of_rule.items()}
        for both in zip(*(summary(rows, rule) for rule in RULES), strict=True)
    ]


if __name__ == "__main__":
    main()
