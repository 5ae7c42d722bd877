"""The picture of a replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeplan.planner.pages.line_chart import lines_svg
from moeplan.planner.studies.replay import Outcome

__all__ = ["chart"]


def chart(title: str, outcomes: Sequence[Outcome]) -> str:
    """SVG of the seconds that each strategy has lost to the one that ends best, step by step."""
    best = np.cumsum([step.total_s for step in min(outcomes, key=lambda outcome: outcome.total_s).steps])
    lines = [
        (outcome.name, list(enumerate(np.cumsum([step.total_s for step in outcome.steps]) - best)))
        for outcome in outcomes
    ]
    return lines_svg(f"{title}: time lost to the best strategy", "step", "modelled seconds", lines)
