"""Errors of the planner's own: files that cannot be used."""

from __future__ import annotations

from pathlib import Path

from moeplan.solvers.problem.errors import ProblemError

__all__ = ["FileError"]


class FileError(ProblemError):
    """A file cannot be used: ``PATH: reason``, or ``PATH: part = value: reason``.

    Attributes:
        path: The file.
        field: The part of it that is wrong, or the whole file.
        value: What the part holds.
        reason: What is wrong, and what to give instead.
    """

    def __init__(self, path: Path | str, reason: str, part: str = "", value: object = None) -> None:
        super().__init__(part or str(path), value, reason)
        self.path = Path(path)
        self.args = (f"{path}: {part} = {value}: {reason}" if part else f"{path}: {reason}",)
