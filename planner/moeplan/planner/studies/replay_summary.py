"""Results of a replay, in figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TypedDict

import numpy as np

from moeplan.planner.studies.replay import Outcome

__all__ = ["ReplaySummary", "decision_lines", "summary"]


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
