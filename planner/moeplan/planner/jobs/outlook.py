"""From the window of past steps to the demand that a layout should suit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.api.jobs import JobSpec
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.forecast import forecast
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import Problem

__all__ = ["LayerOutlook"]


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
        return self.spec.problem(forecast(np.stack(self.steps), self.spec.forecast), self.current)
