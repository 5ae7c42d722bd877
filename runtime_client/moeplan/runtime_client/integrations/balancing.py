"""Common parts of the adapters of training frameworks: three words, the layers of a model, and where a step ends."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.integrations.framework_experts import FrameworkExperts, FrameworkShards
from moeplan.runtime_client.integrations.planned_replicas import PlannedReplicas
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.lending import LoanBuffer
from moeplan.runtime_client.planning.session import PlannerSession
from moeplan.runtime_client.recording.trace_ring import TraceRing
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int64

__all__ = ["BalancedLayer", "Balancer", "Mode"]

log = logging.getLogger("moeplan")

_TRACE_STEPS = 1000
"""Steps of a trace, the last ones of a run."""

_SAVE_EVERY = 100
"""Steps after which the trace is written again, and a line is logged."""


class Mode(StrEnum):
    """The word that says what an adapter does."""

    RECORD = "record"
    """Count tokens; the framework trains as it would without."""
    SPILL = "spill"
    """Lend replicas for single micro-batches, planned on the ranks from known counts."""
    PLANNED = "planned"
    """Hold the replicas that a planner's layouts say, from the counts of steps before."""


class Balancer:
    """The MoE layers of one model on one rank, from the framework's point of view.

    A step ends where the first forward pass in training after a step of any optimizer begins. Then the counts of the
    ranks of the expert-parallel group are gathered, and, if `planned`, go to the planner, whose layouts come into force
    on all ranks between two steps. The planner may be absent; experts stay at home then.

    Args:
        mode: One of `Mode`, or its word.
        spare: Replicas that a rank can hold of experts that are not its own; not used to `record`.
        planner: Address of the daemon, ``host:port`` or ``unix:path``; only if `planned`.
        job: Id of the job; where there are several expert-parallel groups, their first rank is appended.
        trace: File for the counts of the last 1,000 steps, which `moeplan trace info` and `moeplan plan` read; written
            every 100 steps and at exit by the first rank of each group, with that rank in its name where there are
            several groups.

    Attributes:
        layers: The layers, in the order in which the framework made them.
        counts: int64[layers, ranks, experts], tokens of the step that ended last; None before.
        imbalance: (as at home, as computed) of the step's last micro-batch: largest over mean tokens of a rank, mean
            over layers. The second is the first if nothing but recorded.
        steps: Steps that have ended.
        session: The line to the planner, once a step has ended; None unless `planned`.

    Raises:
        ValueError: `mode` is none of the three words, or `spare` is negative.
    """

    def __init__(
        self,
        mode: Mode | str,
        *,
        spare: int = 2,
        planner: str = "127.0.0.1:7433",
        job: str = "training",
        trace: Path | str | None = None,
    ) -> None:
        if mode not in list(Mode):
            raise ValueError(f"mode = {mode!r}: must be one of {', '.join(Mode)}")
        if spare < 0:
            raise ValueError(f"spare = {spare}: must be at least 0 slots")
        self.mode = Mode(mode)
        self.spare = spare
        self.layers: list[BalancedLayer] = []
        self.counts: Int64 | None = None
        self.imbalance = (1.0, 1.0)
        self.steps = 0
        self._planner, self._job = planner, job
        self._trace = None if trace is None else Path(trace)
        self._ring = TraceRing(_TRACE_STEPS)
        self._buffer = LoanBuffer()
        self._groups: dict[tuple[int, ...], ExpertGroup] = {}
        self._first: int | None = None  # rank of the group, where there are several
        self.session: PlannerSession | None = None
        self._updated = False
        self._hook = register_optimizer_step_post_hook(self._optimizer_has_stepped)
        atexit.register(self.abandon)

    def layer(
        self,
        name: str,
        experts: int,
        process_group: dist.ProcessGroup | None,
        shape: ExpertShape | None,
        shard: Tensor | None = None,
    ) -> BalancedLayer:
        """Add a layer; every rank of the group adds the same ones in the same order.

        Args:
            name: What errors call it.
            experts: Number of experts on all ranks together, at home on them in order.
            process_group: The expert-parallel ranks; None for one alone.
            shape: Dimensions of an expert; None where the framework computes them itself, to `record`.
            shard: [owned, elements], this rank's experts in flat form, to be spread over the ranks as
                `FrameworkShards`; None where they stay at home.

        Raises:
            ValueError: the number of experts differs from that of the layers before.
        """
        if self.layers and experts != self.layers[0].tokens.numel():
            raise ValueError(f"{name}: {experts} experts, and {self.layers[0].tokens.numel()} in the layers before")
        ranks = () if process_group is None else tuple(dist.get_process_group_ranks(process_group))
        if ranks not in self._groups:
            self._groups[ranks] = ExpertGroup() if process_group is None else ExpertGroup.within(process_group)
            self._first = ranks[0] if ranks and len(ranks) < dist.get_world_size() else None
        group = self._groups[ranks]
        made = None if shape is None or self.mode is Mode.RECORD else self._made(shape, experts, group, shard)
        if made is not None:
            made.name = name
        self.layers.append(BalancedLayer(self, experts, group, made))
        return self.layers[-1]

    def _made(
        self, shape: ExpertShape, experts: int, group: ExpertGroup, shard: Tensor | None
    ) -> FrameworkExperts | FrameworkShards:
        spills = self.mode is Mode.SPILL
        planner = QuotaPlanner(SpillOptions.uniform(experts, group.size, self.spare), group.size) if spills else None
        if shard is not None:
            return FrameworkShards(shape, experts, group, shard, spare=self.spare, planner=planner)
        planned = PlannedReplicas(experts, group.size, self.spare)
        return FrameworkExperts(shape, experts, group, planner=planner or planned, buffer=self._buffer)

    def _optimizer_has_stepped(self, *_: object) -> None:
        self._updated = True

    def begin_pass(self, layer: BalancedLayer) -> None:
        """End the step before, if `layer` is the first and an optimizer has stepped since its last pass."""
        if self._updated and layer is self.layers[0]:
            self._updated = False
            self._end_step(layer.group)

    @torch.no_grad()
    def _end_step(self, group: ExpertGroup) -> None:
        tally = torch.stack([layer.tokens for layer in self.layers])
        gathered = group.gather_rows(tally.flatten(), "the end of a step").cpu().numpy()
        for layer in self.layers:
            layer.tokens.zero_()
        self.counts = np.ascontiguousarray(gathered.reshape(group.size, *tally.shape).swapaxes(0, 1))
        self.imbalance = self._imbalance(self.counts)
        self.steps += 1
        if self.mode is Mode.PLANNED:
            if self.session is None:
                self.session = self._start_session(group)
            self.session.step(self.counts[:, group.rank])
        if group.rank == 0:
            self._ring.add(self.counts)
            if self.steps % _SAVE_EVERY == 0:
                log.info("step %d: imbalance %.4f at home, %.4f as computed", self.steps, *self.imbalance)
                self.save_trace()

    def _imbalance(self, counts: Int64) -> tuple[float, float]:
        experts = [layer.experts for layer in self.layers if layer.experts is not None]
        if experts:
            home, computed = (np.array(loads) for loads in zip(*(layer.loads for layer in experts), strict=True))
            return _mean_imbalance(home), _mean_imbalance(computed)
        ranks = counts.shape[1]
        home = counts.sum(axis=1).reshape(len(counts), ranks, -1).sum(axis=2)
        return (_mean_imbalance(home),) * 2

    def _start_session(self, group: ExpertGroup) -> PlannerSession:
        followers = self._planned()
        ranks = next(ranks for ranks, made in self._groups.items() if made is group)
        return PlannerSession(
            self._planner,
            self._job if self._first is None else f"{self._job}-{self._first}",
            [follower.plan_in_force.layout for follower in followers],
            self._apply,
            slots=followers[0].plan_in_force.layout.slots.shape[1],
            ranks=ranks or None,
        )

    def _planned(self) -> list[PlannedReplicas | FrameworkShards]:
        """What follows a plan in each layer."""
        experts = (layer.experts for layer in self.layers)
        followers = (each.source if isinstance(each, FrameworkExperts) else each for each in experts)
        return [follower for follower in followers if isinstance(follower, PlannedReplicas | FrameworkShards)]

    def _apply(self, plans: Sequence[PlannedLayer]) -> None:
        for follower, planned in zip(self._planned(), plans, strict=True):
            follower.plan_in_force = planned

    def save_trace(self) -> None:
        """Write the counts of the last steps to `trace`, if it was given and this is the first rank of its group."""
        if self._trace is None or not len(self._ring):
            return
        path = self._trace
        self._ring.save(path if self._first is None else path.with_stem(f"{path.stem}-{self._first}"))

    def abandon(self) -> None:
        """Stop counting, write the trace and leave the planner, without the other ranks; runs at exit."""
        atexit.unregister(self.abandon)
        self._hook.remove()
        self.save_trace()
        if self.session is not None:
            self.session.abandon()


class BalancedLayer:
    """One MoE layer of a model.

    Attributes:
        group: The ranks.
        experts: What computes it; None to `record`.
        tokens: int64[experts], tokens of this rank in the step so far.
    """

    def __init__(
        self, balancer: Balancer, experts: int, group: ExpertGroup, made: FrameworkExperts | FrameworkShards | None
    ) -> None:
        self.balancer = balancer
        self.group = group
        self.experts = made
        self.tokens = torch.zeros(experts, dtype=torch.int64, device="cpu")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def observe(self, index: Tensor, training: bool) -> None:
        """Count a pass, unless it does not train or a checkpoint recomputes it.

        Args:
            index: int64[tokens, k], experts of this rank's tokens.
            training: Whether the framework's module is in training mode.
        """
        if not training or torch._C._current_graph_task_id() != -1:
            return
        self.balancer.begin_pass(self)
        chosen = index.detach().reshape(-1).long()
        if self.tokens.device != chosen.device:
            self.tokens = self.tokens.to(chosen.device)
        self.tokens.scatter_add_(0, chosen, torch.ones_like(chosen))

    def run(self, weights: Sequence[Tensor], hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The output of a layer whose weights are the framework's; see `FrameworkExperts.run`."""
        assert isinstance(self.experts, FrameworkExperts), "the layer is only recorded, or holds its own weights"
        return self.experts.run(weights, hidden, index, weight)


def _mean_imbalance(loads: Int64) -> float:
    """Largest over mean of int64[layers, ranks], mean over layers."""
    means = np.maximum(loads.mean(axis=1), 1e-12)
    return float(np.mean(np.where(loads.sum(axis=1) > 0, loads.max(axis=1) / means, 1.0)))
