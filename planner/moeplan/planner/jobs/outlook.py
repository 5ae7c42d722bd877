"""From the window of past steps to the demand that a layout should suit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.api.jobs import Forecast, ForecastMethod, JobSpec
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.forecast import widened
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem

__all__ = ["LayerOutlook", "forecast_demand"]


@dataclass(frozen=True, slots=True, eq=False)
class LayerOutlook:
    """A layer to be planned, its demand still to be forecast: a worker does both, so that neither holds up the streams.

    Attributes:
        spec: The job.
        steps: int64[sources, experts] of each step of the layer's window, oldest first, at least one.
        current: Layout in force.
    """

    spec: JobSpec
    steps: tuple[Int64, ...]
    current: Layout

    def problem(self) -> Problem:
        """The layer's problem in the coming steps.

        Raises:
            ProblemError: a field contradicts another.
        """
        return self.spec.problem(forecast_demand(self.spec.forecast, np.stack(self.steps)), self.current)


def forecast_demand(forecast: Forecast, window: Int64) -> Demand:
    """The demand of one layer in the coming steps.

    Args:
        forecast: How to forecast.
        window: int64[steps, sources, experts], oldest step first, at least one step.

    Returns:
        One scenario; with ``SCENARIOS`` those of `widened`. Averages are rounded to whole tokens, halves to even.
    """
    match forecast.method:
        case ForecastMethod.LAST:
            return Demand.of(window[-1])
        case ForecastMethod.MEAN:
            return Demand.of(np.rint(window.mean(axis=0)).astype(np.int64))
        case ForecastMethod.EMA:
            average = window[0].astype(np.float64)
            for step in window[1:]:
                average += forecast.smoothing * (step - average)
            return Demand.of(np.rint(average).astype(np.int64))
        case ForecastMethod.SCENARIOS:
            return widened(window)
