"""Checking the single numbers that cross the library's edge, without NumPy: `moeplan --help` waits for none."""

from __future__ import annotations

from numbers import Integral, Real

from moeplan.solvers.problem.errors import ProblemError

__all__ = ["instance", "integer", "number", "short"]


def integer(field: str, value: object, low: int, high: int | None = None) -> int:
    """A whole number as an int.

    Raises:
        ProblemError: `value` is not an integer within [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ProblemError(field, short(value), "must be an integer; round or cast it first")
    whole = int(value)
    if whole < low or (high is not None and whole > high):
        limit = f"at least {low}" if high is None else f"{low} to {high if high < 2**53 else '2**53'}"
        raise ProblemError(field, whole, f"must be {limit}")
    return whole


def number(field: str, value: object) -> float:
    """A number as a float; its range is for the caller to check.

    Raises:
        ProblemError: `value` is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ProblemError(field, short(value), "must be a number")
    return float(value)


def instance(field: str, value: object, kind: type, write: str) -> None:
    """Check that a value is of our type.

    Raises:
        ProblemError: it is not; the message says what to write instead.
    """
    if not isinstance(value, kind):
        raise ProblemError(field, short(value), f"must be {kind.__name__}; write {write}")


def short(value: object) -> str:
    """A value for an error message, on one line and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 64 else f"{text[:61]}..."
