"""A comparison of policies as a table."""

from __future__ import annotations

from moeplan.planner.compare import Comparison
from moeplan.planner.terminal import show_table

__all__ = ["show_comparison"]

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
