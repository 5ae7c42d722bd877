"""Experts that another framework trains: resident ones, whose weights it owns, and fully sharded ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.integrations.planned_replicas import PlannedReplicas
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights
from moeplan.runtime_client.layers.lending import LoanBuffer
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.runtime_client.layers.spilling import MovableSpillPlanner, SpillPlanner
from moeplan.solvers import SpillPlan
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.layout import Layout

__all__ = ["FrameworkExperts", "FrameworkShards"]


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


class FrameworkShards(FullyShardedExperts):
    """Fully sharded experts, made of those that a framework has initialised at home.

    Their shard is the parameter that the framework optimises, clips and saves. A rank gathers as many experts as it
    had at home, and up to `spare` more: those of a planned layout, or, with a planner, what that lends for the
    micro-batch, known once the counts are.

    Args:
        shape: Dimensions of an expert.
        experts: Number of experts, at home on the ranks of the group in order.
        group: The ranks.
        flat: [owned, elements], this rank's experts. Every rank gives its own at the same point.
        spare: Slots of a rank beyond as many as it had at home.
        planner: Plans each micro-batch; None where layouts come from a session.
    """

    def __init__(
        self,
        shape: ExpertShape,
        experts: int,
        group: ExpertGroup,
        flat: Tensor,
        *,
        spare: int,
        planner: MovableSpillPlanner | None = None,
    ) -> None:
        slots = len(flat) + (spare if planner is None else 0)
        home = Layout.contiguous(experts, np.full(group.size, slots, np.int32))
        super().__init__(shape, experts, group, layout=home, planner=planner, dtype=flat.dtype, device="meta")
        self.shard = nn.Parameter(self.shards_of(flat))
        self._counts = np.zeros((group.size, experts), np.int64)

    @property
    def plan_in_force(self) -> PlannedLayer:
        """What the passes to come follow, on all ranks alike."""
        return self.plan

    @plan_in_force.setter
    def plan_in_force(self, planned: PlannedLayer) -> None:
        self.plan = planned

    @property
    def loads(self) -> tuple[Int64, Int64]:
        """(int64[ranks] of the experts at home, int64[ranks] as computed): tokens of each rank in the last pass."""
        home = self._counts.sum(axis=0).reshape(self.group.size, -1).sum(axis=1)
        return home, self.device_loads(self._counts)

    def _gather_counts(self, index: Tensor, weight: Tensor, layout: int = 0) -> Int64:
        self._counts = super()._gather_counts(index, weight, layout)
        return self._counts

    @torch.no_grad()
    def shards_of(self, flat: Tensor) -> Tensor:
        """[experts, width], this rank's part of what all ranks give: [owned, elements] of the experts at home."""
        size, owned = self.group.size, len(flat)
        padded = functional.pad(flat, (0, self.shard.shape[1] * size - flat.shape[1]))
        parts = padded.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
        return self._exchanged(parts, owned)

    @torch.no_grad()
    def homes_of(self, shard: Tensor) -> Tensor:
        """[owned, elements] of the experts at home, from all ranks' parts [experts, width]; undoes `shards_of`."""
        size = self.group.size
        parts = self._exchanged(shard, len(shard) // size)
        return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1)[:, : self.shape.elements].contiguous()

    def _exchanged(self, rows: Tensor, each: int) -> Tensor:
        every = [each] * self.group.size
        return self.group.exchange(rows, every, every, weights=True, traffic=Traffic(), purpose="read").wait()

    @property
    def _compares(self) -> bool:
        """Never: how a framework initialises and reduces its weights is its own."""
        return False

    def _require_own_gradients(self, weights: nn.Parameter) -> None:
        """The framework reduces gradients."""

    # This rank's part under its own name: the framework's checkpoints put parts together.
    _save_to_state_dict = nn.Module._save_to_state_dict
    _load_from_state_dict = nn.Module._load_from_state_dict


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
