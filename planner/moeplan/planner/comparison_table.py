"""Comparisons of policies as tables."""

from __future__ import annotations

from moeplan.planner.compare import Comparison
from moeplan.planner.exact import ExactComparison
from moeplan.planner.terminal import show_table

__all__ = ["show_comparison", "show_exact"]

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


def show_exact(title: str, comparison: ExactComparison) -> None:
    """Print one row per exact-load policy."""
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
