"""Results of studies as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeplan.planner.commands.options import Format
from moeplan.planner.commands.terminal import show_table
from moeplan.planner.studies.evaluating import Verdict
from moeplan.planner.studies.planning import PlannedLayer
from moeplan.planner.studies.policies import Comparison
from moeplan.planner.studies.replay import Outcome
from moeplan.planner.studies.replay_summary import summary
from moeplan.planner.studies.spilling import KnownCountsComparison

__all__ = ["show_comparison", "show_evaluation", "show_known_counts", "show_plans", "show_replay"]

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


def show_plans(title: str, planned: Sequence[PlannedLayer], output: Format) -> None:
    """Print one row per layer; columns that say nothing of any layer are left out."""
    columns: dict[str, Callable[[PlannedLayer], str | None]] = {
        "layer": lambda p: str(p.layer),
        "slots": lambda p: str(int((p.plan.layout.slots >= 0).sum(axis=1).max())),
        "imbalance before": lambda p: _number(p.window.before),
        "after": lambda p: _number(p.window.after),
        "bound": lambda p: _number(p.plan.bound),
        "at most above optimum": lambda p: f"{p.plan.gap:.2%}",
        "next step before": lambda p: None if p.next_step is None else _number(p.next_step.before),
        "next step after": lambda p: None if p.next_step is None else _number(p.next_step.after),
        "between nodes": lambda p: None if p.between_nodes is None else f"{p.between_nodes:.1%}",
        "replicas to copy": lambda p: None if p.plan.moves is None else str(len(p.plan.moves)),
        "GB to copy": lambda p: None if p.move_bytes is None else f"{p.move_bytes / 1e9:.3f}",
        "ended by": lambda p: p.plan.termination,
        "ms": lambda p: f"{p.plan.seconds * 1e3:.1f}",
    }
    cells = {name: [cell(layer) for layer in planned] for name, cell in columns.items()}
    shown = {name: [cell or "-" for cell in column] for name, column in cells.items() if any(column)}
    show_table(title, list(shown), list(zip(*shown.values(), strict=True)), output)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def show_evaluation(title: str, found: Verdict, output: Format) -> None:
    """Print one row per layer and, but for CSV, what they come to."""
    columns = ["layer", "imbalance", "new plan", "bound", "next step", "with the new plan", "moves"]
    rows = [
        [
            str(row["layer"]),
            f"{row['imbalance']:.4f}",
            f"{row['planned']:.4f}",
            f"{row['bound']:.4f}",
            "" if row["next_step"] is None else f"{row['next_step']:.4f}",
            "" if row["next_step_planned"] is None else f"{row['next_step_planned']:.4f}",
            str(row["moves"]),
        ]
        for row in found["layers"]
    ]
    show_table(title, columns, rows, output)
    if output is Format.CSV:
        return
    steps = found["pays_after_steps"]
    said = "a new plan saves nothing" if steps is None else f"moving pays after {steps:,.0f} steps"
    print(
        f"mean {found['mean']:.4f}, 95th percentile {found['p95']:.4f}; with a new plan {found['mean_planned']:.4f} "
        f"and {found['p95_planned']:.4f}\n"
        f"{1e3 * found['seconds']:.2f} ms a step in these layers, {1e3 * found['seconds_planned']:.2f} ms with a new "
        f"plan; {found['moves']} replicas to copy in {1e3 * found['move_seconds']:.2f} ms: {said}"
    )


def show_comparison(title: str, comparison: Comparison, output: Format) -> None:
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
        output,
    )


def show_known_counts(title: str, comparison: KnownCountsComparison, output: Format) -> None:
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
        output,
    )


def show_replay(title: str, outcomes: Sequence[Outcome], weight_bytes: int, output: Format) -> None:
    """Print one row per strategy."""
    rows = []
    best = min(outcome.total_s for outcome in outcomes)
    for outcome in outcomes:
        found = summary(outcome, weight_bytes)
        rows.append(
            [
                outcome.name,
                f"{found['total_s']:.3f}",
                f"{found['total_s'] / best - 1:+.1%}" if best else "-",
                f"{found['compute_s']:.3f}",
                f"{found['traffic_s']:.3f}",
                f"{found['moves_s']:.3f}",
                f"{found['imbalance']['mean']:.4f}",
                str(found["plans_taken"]),
                f"{found['moved_bytes'] / 1e9:.1f}",
            ]
        )
    columns = ("seconds", "total", "over best", "compute", "traffic", "moves", "imbalance", "plans taken", "GB moved")
    show_table(title, columns, rows, output)
