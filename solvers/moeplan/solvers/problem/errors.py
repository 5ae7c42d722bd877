"""Errors of the solvers.

ValueError
└── ProblemError          a field holds a value that no plan can be made from
    └── InfeasibleError   every field is valid, but no layout satisfies them together
"""

from __future__ import annotations

__all__ = ["InfeasibleError", "ProblemError"]


class ProblemError(ValueError):
    """A field of a problem is outside its limit.

    Attributes:
        field: Dotted name of the field, for instance ``cluster.slots``.
        value: The value found.
        reason: The limit that it broke, and what to do.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"{field} = {value}: {reason}")
        self.field = field
        self.value = value
        self.reason = reason


class InfeasibleError(ProblemError):
    """No layout satisfies all fields together; ``reason`` says which device or expert is short, and by how much."""
