"""Results of studies as tables."""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.planner.commands.terminal import show_table
from moeplan.planner.studies.policies import Comparison
from moeplan.planner.studies.replay import Outcome
from moeplan.planner.studies.replay_summary import summary
from moeplan.planner.studies.spilling import KnownCountsComparison

__all__ = ["show_comparison", "show_known_counts", "show_replay"]

COLUMNS = (
    "imbalance",
    "on the window",
    "next step, even split",
    "next step, best split",
    "(p95)",
    "proven gap",
    "moved",
    "ms/layer",
)


def show_comparison(title: str, comparison: Comparison) -> None:
    """Print one row per policy."""
    show_table(
        title,
        COLUMNS,
        [
            [
                row["policy"],
                f"{row['fitted']['mean']:.4f}",
                f"{row['next_step']['even']['mean']:.4f}",
                f"{row['next_step']['optimal']['mean']:.4f}",
                f"{row['next_step']['optimal']['p95']:.4f}",
                f"{row['gap_to_bound']['mean']:.2%}",
                f"{row['moved_fraction']['mean']:.1%}",
                f"{row['plan_ms_per_layer']['p50']:.1f}",
            ]
            for row in comparison["policies"]
        ],
    )


def show_known_counts(title: str, comparison: KnownCountsComparison) -> None:
    """Print one row per policy under known counts."""
    show_table(
        title,
        ("imbalance", "mean", "p95", "max", "replicas", "(max)", "remote tokens", "us/layer"),
        [
            [
                row["policy"],
                f"{row['imbalance']['mean']:.4f}",
                f"{row['imbalance']['p95']:.4f}",
                f"{row['imbalance']['max']:.4f}",
                f"{row['replicas']['mean']:.1f}",
                f"{row['replicas']['max']:.0f}",
                "-" if row["remote_fraction"]["mean"] is None else f"{row['remote_fraction']['mean']:.1%}",
                f"{row['us_per_call']['p50']:.1f}",
            ]
            for row in comparison["policies"]
        ],
    )


def show_replay(title: str, outcomes: Sequence[Outcome], weight_bytes: int) -> None:
    """Print one row per strategy."""
    rows = []
    best = min(outcome.total_s for outcome in outcomes)
    for outcome in outcomes:
        found = summary(outcome, weight_bytes)
        rows.append(
            [
                outcome.name,
                f"{found['total_s']:.3f}",
                f"{found['total_s'] / best - 1:+.1%}",
                f"{found['compute_s']:.3f}",
                f"{found['traffic_s']:.3f}",
                f"{found['moves_s']:.3f}",
                f"{found['imbalance']['mean']:.4f}",
                str(found["plans_taken"]),
                f"{found['moved_bytes'] / 1e9:.1f}",
            ]
        )
    columns = ("seconds", "total", "over best", "compute", "traffic", "moves", "imbalance", "plans taken", "GB moved")
    show_table(title, columns, rows)
