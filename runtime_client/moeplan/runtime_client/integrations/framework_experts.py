"""Resident experts whose weights another framework owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import Tensor, nn

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.integrations.planned_replicas import PlannedReplicas
from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights
from moeplan.runtime_client.layers.lending import LoanBuffer
from moeplan.runtime_client.layers.resident import ResidentExperts, SpillPlanner
from moeplan.solvers import SpillPlan
from moeplan.solvers.problem.arrays import Int64

__all__ = ["FrameworkExperts"]


class FrameworkExperts(ResidentExperts):
    """Resident experts without parameters: each pass is given this rank's weights, and its gradients go back to them.

    So the framework goes on to initialise, shard, optimise, clip and save experts as it did. A pass copies the rank's
    experts of its layer once into flat form, which autograd keeps until the backward pass.

    Args:
        shape: Dimensions of an expert.
        experts: Number of experts, at home on the ranks of the group in order.
        group: The ranks.
        planner: Plans each micro-batch.
        buffer: Memory for transient replicas, shared by the layers.

    Attributes:
        source: The planner.
    """

    def __init__(
        self, shape: ExpertShape, experts: int, group: ExpertGroup, *, planner: SpillPlanner, buffer: LoanBuffer
    ) -> None:
        watched = _Watched(planner)
        super().__init__(shape, experts, group, planner=watched, buffer=buffer, device="meta")
        del self._parameters["flat"]
        self.source = planner
        self._watched = watched

    def run(self, weights: Sequence[Tensor], hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """`forward` with weights of the experts at home, [owned, ...] each, in the order of ``shape.parts``."""
        self.flat = cast(nn.Parameter, join_weights(*weights))
        try:
            output: Tensor = self(hidden, index, weight)
        finally:
            del self.flat
        return output

    @property
    def loads(self) -> tuple[Int64, Int64]:
        """(int64[ranks] of the experts at home, int64[ranks] as computed): tokens of each rank in the last pass."""
        return self._watched.home, self._watched.computed

    def _gather_counts(self, index: Tensor, weight: Tensor, layout: int = 0) -> Int64:
        if isinstance(self.source, PlannedReplicas):
            layout = self.source.fingerprint
        return super()._gather_counts(index, weight, layout)

    @property
    def _compares(self) -> bool:
        """Never: how a framework initialises and reduces its weights is its own."""
        return False

    def _require_own_gradients(self, weights: nn.Parameter) -> None:
        """The framework reduces gradients."""


class _Watched:
    """A planner whose last loads can be read."""

    def __init__(self, planner: SpillPlanner) -> None:
        self.planner = planner
        self.options = planner.options
        self.home = self.computed = np.zeros(len(planner.options.spare), np.int64)

    def plan(self, counts: Int64) -> SpillPlan:
        plan = self.planner.plan(counts)
        self.home = np.zeros_like(self.computed)
        np.add.at(self.home, self.options.home, counts.sum(axis=0))
        self.computed = plan.load.copy()
        return plan
