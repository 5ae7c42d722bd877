"""What a layout is worth: its objective under the split rule asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.solvers.objective import score as scores
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.memory import best_quota, token_caps
from moeplan.solvers.split.rules import Split, split

__all__ = ["judged", "reordered", "rule_of", "score_of"]


def score_of(problem: Problem, slots: Int32) -> float:
    """The objective of a layout under the split rule asked for; infinite where it does not fit the memory."""
    return judged(problem, slots)[0]


def judged(problem: Problem, slots: Int32, end: float = NEVER) -> tuple[float, Split | None]:
    """`score_of`, and how the tokens are divided, if that took long; for `end` see `split`."""
    rule = rule_of(problem)
    if rule is SplitRule.OPTIMAL:
        quota, _, fits = best_quota(problem, slots)
        return scores.score(problem, quota) if fits else np.inf, Split(rule, quota)
    divided = split(problem, Layout.trusted(slots, problem.experts), rule, end)
    caps = token_caps(problem.cluster, problem.expert, (slots != EMPTY).sum(axis=1))
    fits = caps is None or bool((divided.quota.sum(axis=2) <= caps).all())
    return scores.score(problem, divided.quota) if fits else np.inf, None if rule is SplitRule.EVEN else divided


def reordered(divided: Split, slots: Int32, to: Int32) -> Split:
    """The split of a layout, int32[devices, width], for one with the same replicas on each device in other slots."""
    quota = np.empty_like(divided.quota)
    device = np.arange(len(slots))[:, np.newaxis]
    before, after = np.argsort(slots, axis=1), np.argsort(to, axis=1)
    quota[:, device, after] = divided.quota[:, device, before]
    return replace(divided, quota=quota)


def rule_of(problem: Problem) -> SplitRule:
    """The split rule that layouts are judged under."""
    return problem.split_rule or SplitRule.OPTIMAL
