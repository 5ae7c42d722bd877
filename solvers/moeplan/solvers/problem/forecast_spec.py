"""Options of a forecast, apart from the forecast itself, so that they can be read without the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moeplan.solvers.problem.errors import ProblemError

__all__ = ["Forecast", "ForecastMethod"]

MAX_WINDOW_STEPS = 4_096


class ForecastMethod(StrEnum):
    """A way from the window to the demand of the coming steps."""

    LAST = "last"
    """The newest step."""
    MEAN = "mean"
    """The mean of the steps, rounded to whole tokens, halves to even."""
    EMA = "ema"
    """Their exponential moving average, rounded likewise."""
    STEPS = "steps"
    """Every step as a scenario."""
    SCENARIOS = "scenarios"
    """Recent steps, perturbed as the window says that steps differ; see `widened`."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A forecast of demand.

    Attributes:
        method: What to make of the window.
        window_steps: Newest steps to make it from.
        smoothing: Weight of the newest step in the moving average.

    Raises:
        ProblemError: a value is out of range.
    """

    method: ForecastMethod = ForecastMethod.SCENARIOS
    window_steps: int = 8
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "method", ForecastMethod(self.method))
        except ValueError:
            known = ", ".join(ForecastMethod)
            raise ProblemError("forecast.method", repr(self.method), f"must be one of {known}") from None
        if not 1 <= self.window_steps <= MAX_WINDOW_STEPS:
            raise ProblemError("forecast.window_steps", self.window_steps, f"must be 1 to {MAX_WINDOW_STEPS}")
        if not 0 < self.smoothing <= 1:
            raise ProblemError("forecast.smoothing", self.smoothing, "must be above 0 and at most 1")
