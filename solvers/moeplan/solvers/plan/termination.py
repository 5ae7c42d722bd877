"""Why a search ended."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Termination"]


class Termination(StrEnum):
    """Why the search for a plan ended."""

    PROVED = "proved"
    """The objective equals the bound: no layout is better."""
    TARGET_GAP = "target gap"
    """The objective is within `SolveParameters.target_gap` of the bound."""
    WORK_LIMIT = "work limit"
    """`SolveParameters.work_limit` is spent."""
    DEADLINE = "deadline"
    """`SolveParameters.deadline_s` is over."""
    NOTHING_LEFT = "nothing left to try"
    """The policy has done all that it does."""
    UNFINISHED = "unfinished"
    """The search goes on: a plan on the way, of `solve_anytime`."""
    GIVEN = "given"
    """Nothing was searched: the layout was given to be judged."""
