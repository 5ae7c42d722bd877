"""What a replay found: as a table, as JSON, as a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from moeplan.planner.line_chart import lines_svg
from moeplan.planner.terminal import show_table

if TYPE_CHECKING:
    from moeplan.planner.replay import Outcome

__all__ = ["ReplaySummary", "chart", "decision_lines", "show_replay", "summary"]


class ReplaySummary(TypedDict):
    """One strategy; seconds are modelled, `reasons` counts the decisions."""

    strategy: str
    total_s: float
    compute_s: float
    traffic_s: float
    moves_s: float
    imbalance: dict[str, float]
    plans_taken: int
    moved_replicas: int
    moved_bytes: int
    reasons: dict[str, int]
    step_s: list[float]


def summary(outcome: Outcome, weight_bytes: int) -> ReplaySummary:
    """A strategy's figures, ready for JSON.

    Args:
        outcome: What became of it.
        weight_bytes: Of one replica.
    """
    imbalance = [step.imbalance for step in outcome.steps]
    reasons = [decision.reason.value for decision in outcome.decisions]
    return {
        "strategy": outcome.name,
        "total_s": outcome.total_s,
        "compute_s": sum(step.compute_s for step in outcome.steps),
        "traffic_s": sum(step.traffic_s for step in outcome.steps),
        "moves_s": sum(step.moves_s for step in outcome.steps),
        "imbalance": {"mean": float(np.mean(imbalance)), "p95": float(np.quantile(imbalance, 0.95))},
        "plans_taken": outcome.plans_taken,
        "moved_replicas": outcome.moved_replicas,
        "moved_bytes": outcome.moved_replicas * weight_bytes,
        "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "step_s": [step.total_s for step in outcome.steps],
    }


def decision_lines(outcomes: Sequence[Outcome]) -> Iterator[dict[str, object]]:
    """Every decision of every strategy, ready for JSON."""
    for outcome in outcomes:
        for decision in outcome.decisions:
            yield {"strategy": outcome.name, **asdict(decision), "reason": decision.reason.value}


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


def chart(title: str, outcomes: Sequence[Outcome]) -> str:
    """SVG of the seconds that each strategy has lost to the one that ends best, step by step."""
    best = np.cumsum([step.total_s for step in min(outcomes, key=lambda outcome: outcome.total_s).steps])
    lines = [
        (outcome.name, list(enumerate(np.cumsum([step.total_s for step in outcome.steps]) - best)))
        for outcome in outcomes
    ]
    return lines_svg(f"{title}: time lost to the best strategy", "step", "modelled seconds", lines)
