"""Fully sharded experts: every rank owns 1/N of every expert, and gathers the replicas that the layout gives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.device.exchange import DeviceExchange
from moeplan.runtime_client.device.expert import matrix_sizes
from moeplan.runtime_client.device.layout_plans import LayoutPlans
from moeplan.runtime_client.device.passes import Arrivals, run_pass
from moeplan.runtime_client.device.products import Owned
from moeplan.runtime_client.device.shard_memory import PublishedShard, ShardMemory
from moeplan.runtime_client.group import ExpertGroup, Traffic, switched_to
from moeplan.runtime_client.layers.changes import changes_of
from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape, feed_forward
from moeplan.runtime_client.layers.repeating import MadePasses, in_backward, unseen
from moeplan.runtime_client.layers.routing import combine, dispatch, find_route
from moeplan.runtime_client.layers.sharding import (
    DirectGathering,
    DirectReturning,
    Gathering,
    Placement,
    Returning,
    Slots,
    shard_width,
    version_of,
)
from moeplan.runtime_client.layers.spilling import (
    MovableSpillPlanner,
    SpilledPass,
    Spilling,
    planner_fingerprint,
    require_movable,
    require_passes,
    require_speed,
)
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec
from moeplan.solvers.problem.scalars import instance
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["FullyShardedExperts", "chain"]


class FullyShardedExperts(ExpertLayer):
    """The experts of one MoE layer, fully sharded over a group; it takes the place of a model's experts module.

    The only parameter, `shard`, is this rank's part of every expert, so the optimizer never sees a layout, and a new
    layout costs nothing beyond the gather that every pass makes anyway. One pass sends
    ``slots * expert bytes * (N - 1) / N`` per rank for the gather, and as much again for the gradients.

    `plan`, or its parts `layout` and `split_rule`, may be set between any two calls, on all ranks alike; a pass under
    way keeps what it started with until its backward is over. Ranks that differ raise instead of hanging.

    Args:
        shape: Dimensions of an expert.
        experts: Number of experts.
        group: The ranks.
        layout: Layout to start with; contiguous by default.
        split_rule: Rule that divides an expert's tokens among its replicas.
        planner: Lends replicas beyond the layout for single passes, from their known counts, for what the layout did
            not foresee; its homes are those replicas'. By default nothing is lent. What the layout has may be gathered
            ahead, what is lent only once the counts are known.
        cluster: Speeds, nodes and memory of the ranks' devices, by which tokens are divided and routed; by default
            devices on one node, as fast as `planner` has them. Give the one that plans are made for.
        expert: What replicas and tokens occupy, where the memory of `cluster` limits a split.
        compute_dtype: Type that weights travel and compute in; by default that of autocast, or else of the parameter.
        reshard: Whether to free the gathered weights after the forward pass and gather them again for the backward.
            It saves their memory and costs a second gather.
        memory: Has copy engines of GPUs gather the weights and return their gradients; share one between layers that
            run one after another. Without it, collectives of the group do.
        exchange: Runs passes on GPUs without the host, with a `memory`; one for `SlotsOfLayouts`, shared between layers
            that run one after another. It divides by the rules `optimal` and `even`, without limits of memory, and does
            not lend; ranks of its link domain are all as near. Without it, passes use the collectives of the group.
        dtype: Type of the parameter.
        device: Device of the parameter.

    Attributes:
        shard: Parameter [experts, ceil(elements / N)], columns ``rank * width`` onward of the flat experts.
        traffic: Bytes sent to other ranks since the counter was last cleared; tokens of an `exchange` are not counted.
    """

    own: ClassVar[str] = "shard"

    def __init__(
        self,
        shape: ExpertShape,
        experts: int,
        group: ExpertGroup,
        *,
        layout: Layout | None = None,
        split_rule: SplitRule | str = SplitRule.OPTIMAL,
        planner: MovableSpillPlanner | None = None,
        cluster: Cluster | None = None,
        expert: ExpertSpec = ExpertSpec(),
        compute_dtype: torch.dtype | None = None,
        reshard: bool = True,
        memory: ShardMemory | None = None,
        exchange: DeviceExchange | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, experts, group, compute_dtype)
        if planner is not None:
            require_passes(planner, group.size)
        if cluster is None:
            cluster = Cluster.uniform(group.size, 1, speed=None if planner is None else planner.options.speed)
        self._division = Division(cluster, expert, split_rule)
        if self._division.cluster.devices != group.size:
            raise ValueError(f"cluster.devices = {self._division.cluster.devices}: the group has {group.size} ranks")
        self.exchange = exchange
        self._dividing = None if exchange is None else self._divided_by(exchange, memory)
        self._require_divided(self._division)
        self._planner: MovableSpillPlanner | None = None
        self._spilling: Spilling | None = None
        self._ahead: _Ahead | None = None
        self.reshard = reshard
        self.memory = memory
        self._published: PublishedShard | None = None
        if memory is not None:
            memory.require(shape.elements, experts)
        self.shard = nn.Parameter(
            torch.zeros(experts, shard_width(shape.elements, group.size), dtype=dtype, device=device)
        )
        if layout is None:
            layout = Layout.contiguous(experts, np.full(group.size, math.ceil(experts / group.size), np.int32))
        self.layout = layout
        self.planner = planner
        self._chain = _Chain()
        self._latest: _Pass | None = None
        self._made: MadePasses[_Made] = MadePasses()

    @property
    def _replays(self) -> bool:
        return False  # the host says what is gathered, and when ranks have read it

    @property
    def layout(self) -> Layout:
        """Layout of the passes that start from now on."""
        return self._placement.layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        if isinstance(layout, PlannedLayer):
            raise TypeError("layout = a PlannedLayer: it says how to divide tokens too; write `layer.plan = planned`")
        instance("layout", layout, Layout, "Layout(slots, experts)")
        if layout.experts != self.experts:
            raise ValueError(f"layout.experts = {layout.experts}: the layer has {self.experts}")
        self._require_room(layout, self.planner)
        self._placement = Placement(layout, self.group, self.shard.device)

    @property
    def planner(self) -> MovableSpillPlanner | None:
        """What lends beyond the layout in the passes that start from now on; None if nothing does."""
        return self._planner

    @planner.setter
    def planner(self, planner: MovableSpillPlanner | None) -> None:
        if planner is not None and self.exchange is not None:
            raise ValueError(
                f"{self.title}: passes without the host do not lend beyond a layout; leave planner= out, or exchange="
            )
        if planner is not None:
            require_movable(planner)
            require_passes(planner, self.group.size)
            require_speed(planner, self._division.cluster)
        self._require_room(self.layout, planner)
        self._planner = planner

    def _require_room(self, layout: Layout, planner: MovableSpillPlanner | None) -> None:
        if self.memory is not None:
            self.memory.require_room(layout.slots, 0 if planner is None else self._lent(planner))
        if self._dividing is not None:
            self._dividing.require(layout)

    def _divided_by(self, exchange: DeviceExchange, memory: ShardMemory | None) -> LayoutPlans:
        """What divides tokens without the host.

        Raises:
            ValueError: the exchange is one for other layers, or shards do not travel by copy engines.
        """
        if memory is None:
            raise ValueError(
                "exchange without memory: passes without the host gather experts by it; write memory=ShardMemory(...)"
            )
        if memory.dtype != exchange.dtype:
            raise ValueError(f"exchange.dtype = {exchange.dtype}: the memory was made for {memory.dtype}")
        if self.shape.elements % self.group.size:
            raise ValueError(
                f"{self.shape}: an expert's {self.shape.elements} parameters are not a multiple of {self.group.size} "
                "ranks, as passes without the host need; leave exchange= out"
            )
        return exchange.layouts(self.shape, self.experts)

    def _require_divided(self, division: Division) -> None:
        """Refuse what passes without the host do not divide by.

        Raises:
            ValueError: the division is such.
        """
        if self._dividing is None:
            return
        if division.rule not in (SplitRule.OPTIMAL, SplitRule.EVEN):
            raise ValueError(
                f"{self.title}: split_rule = {division.rule.value}: passes without the host divide by optimal or even; "
                "plan with one of them, or leave exchange= out"
            )
        if division.cluster.memory_bytes is not None:
            raise ValueError(
                f"{self.title}: cluster.memory_bytes: passes without the host divide without limits of memory; give a "
                "cluster without memory_bytes, or leave exchange= out"
            )

    def _lent(self, planner: MovableSpillPlanner) -> Int32:
        """int32[ranks], most replicas that a rank is lent."""
        return np.minimum(planner.options.spare, self.experts)

    @property
    def plan(self) -> PlannedLayer:
        """Layout and division of the passes that start from now on, as a session brings them."""
        return PlannedLayer(self.layout, self._division)

    @plan.setter
    def plan(self, planned: PlannedLayer) -> None:
        if self.planner is not None:
            require_speed(self.planner, planned.division.cluster)
        self._require_divided(planned.division)
        self.layout, self._division = planned

    @property
    def split_rule(self) -> SplitRule:
        """Rule by which the passes that start from now on divide tokens."""
        return self._division.rule

    @split_rule.setter
    def split_rule(self, rule: SplitRule | str) -> None:
        division = Division(self._division.cluster, self._division.expert, rule)
        self._require_divided(division)
        self._division = division

    def device_loads(self, counts: Int64) -> Int64:
        """int64[ranks]: tokens that each rank computes of counts int64[sources, experts], under layout and rule."""
        if self.planner is None:
            return self._division.divide(self.layout, counts).device_loads()[0]
        return self._spill(self.planner, counts).loads

    def route(self, counts: Int64) -> tuple[Int32, Int64, Int64]:
        """Where this rank's tokens of counts int64[sources, experts] go, and what its slots receive from whom.

        Returns:
            (slots, send, receive): int32[ranks, width] experts of the slots, what is lent after those of the layout;
            int64[ranks, width] tokens from this rank to each slot; and int64[ranks, width] tokens from each source to
            the slots of this rank.

        Raises:
            InfeasibleError: no plan of `planner` keeps every rank within its token cap.
        """
        if self.planner is None:
            return self.layout.slots, *self._division.of_rank(self.layout, counts, self.group.rank)
        spilled = self._spill(self.planner, counts)
        return spilled.slots, spilled.send, spilled.receive

    def _spill(self, planner: MovableSpillPlanner, counts: Int64) -> SpilledPass:
        spilling = self._spilling
        now = planner, self.layout, self._division
        if spilling is None or (spilling.planner, spilling.layout, spilling.division) != now:
            spilling = self._spilling = Spilling(*now)
        return spilling.plan(counts, self.group.rank)

    def _require_cut_over_replicas(self, weights: DTensor) -> None:
        raise ValueError(
            f"{self.title}: FSDP2 would cut up experts that are in equal parts on the ranks of a group already. Write\n"
            "    fully_shard(model, ignored_params=set(expert_parameters(model).values()))\n"
            "and make the group larger, or use ResidentExperts, to spread their states over more ranks"
        )

    def _take(self, first: int, flat: Tensor) -> list[int]:
        width = self.shard.shape[1]
        part = flat[:, self.group.rank * width : (self.group.rank + 1) * width]
        rows = self.shard[first : first + len(flat)]
        rows[:, : part.shape[1]] = part
        rows[:, part.shape[1] :] = 0
        return list(range(first, first + len(flat)))

    @torch.no_grad()
    def read_experts(self, read: Callable[[int], Tensor]) -> None:
        group, width = self.group, self.shard.shape[1]
        for first in range(0, self.experts, group.size):  # each rank reads one of these, and sends its parts
            held = min(group.size, self.experts - first)
            mine = self.shard.new_zeros(int(group.rank < held), group.size * width)
            if len(mine):
                mine[:, : self.shape.elements] = read(first + group.rank)
            send, receive = [len(mine)] * group.size, [int(other < held) for other in range(group.size)]
            parts = mine.view(-1, width)
            got = group.exchange(parts, send, receive, weights=True, traffic=Traffic(), purpose="read").wait()
            self.shard[first : first + held] = got
            self._remember(list(range(first, first + held)))

    @torch.no_grad()
    def gather_experts(self, rank: int) -> Tensor | None:
        group = self.group
        here = group.rank == rank
        send = [self.experts * (other == rank) for other in range(group.size)]
        receive = [self.experts * here] * group.size
        got = group.exchange(
            self.shard.detach(), send, receive, weights=True, traffic=Traffic(), purpose="gathered"
        ).wait()
        parts = got.view(group.size, -1, self.shard.shape[1])
        return parts.transpose(0, 1).flatten(1)[:, : self.shape.elements] if here else None

    def _run(self, rows: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        self._chain.begin(self)
        if self.exchange is not None and self._dividing is not None:
            return self._run_without_host(self.exchange, self._dividing, rows, index, weight, dtype)
        placement, group = self._placed(), self.group
        follower = self._follower()
        means = placement.fingerprint ^ self._division.fingerprint
        if self.planner is not None:
            means ^= planner_fingerprint(self.planner)
        told = means ^ (follower._placement.fingerprint << 1 if follower else 0)
        if self.memory is not None:
            self.memory.check()
            told ^= self.memory.meetings << 32
        counts = self._gather_counts(index, weight, told & (2**62 - 1))
        made = self._made.repeated(self.title, counts)
        if made is not None:
            placement = made.placement
        gathering = self._take_ahead(placement, dtype) or self._start(placement, dtype, "weights.forward", self.shard)
        made = made or _Made(placement, *self.route(counts))
        gatherings, slots, width = [gathering], made.slots, placement.layout.slots.shape[1]
        if slots.shape[1] > width:  # something is lent, as every rank knows
            lent = Slots(slots[:, width:], self.experts, group, placement.device)
            behind = None if gathering.storage is None else (gathering.storage, len(placement.experts))
            gatherings.append(self._start(lent, dtype, "weights.forward", self.shard, behind))
            placement = Placement(Layout(slots, self.experts), group, placement.device)
        this = _Pass(self, placement, dtype)
        landed = this.land()
        route = find_route(slots, made.send, made.receive, index)
        (arrived,) = dispatch(group, route, rows, self.traffic, [sum(route.receive)])
        if follower is not None:
            follower._prefetch(follower._dtype(), self._chain.sweep)
        (flat,) = this.gather(landed, gatherings)
        results = feed_forward(self.shape, flat, arrived, [route.rows[slot] for slot in placement.slots])
        results = this.guard(results, flat)
        # The weights set out before the gradients of tokens do, to arrive beside them.
        output = combine(group, route, [results], weight, self.traffic, self.finish, announce=this.start)
        if output.requires_grad:
            self._made.add(output, counts, means, made)
        return output

    def _run_without_host(
        self,
        exchange: DeviceExchange,
        dividing: LayoutPlans,
        rows: Tensor,
        index: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        assert self.memory is not None, "`_divided_by` wants one"
        placement, division = self._placed(), self._division
        self.memory.check()
        means = placement.fingerprint ^ division.fingerprint
        key = dividing.key(placement.layout, division.cluster.speed, division.rule, means or 1)
        turn = self._turn(key, self.memory.meetings, means=means)
        gathering = self._take_ahead(placement, dtype) or self._start(placement, dtype, "weights.forward", self.shard)
        this = _Pass(self, placement, dtype)
        matrices = this.gather(this.land(), [gathering], matrix_sizes(self.shape))
        follower = self._follower()
        arrivals = Arrivals(
            lambda: gathering.finish(matrices[0]),
            None if follower is None else partial(follower._prefetch, follower._dtype(), self._chain.sweep),
            this.bring_back,
            this.own,
        )
        output = run_pass(exchange, turn, matrices, rows, index, weight, dtype, arrivals)
        this.free(output, matrices[0])
        return output

    def prefetch(self) -> None:
        """Start gathering the weights of the next forward pass. Every rank calls it at the same point, or none.

        Call it behind whatever changes the weights: what is written through ``.data`` afterwards, nobody sees.
        """
        self._prefetch(self._dtype(), None)

    def _prefetch(self, dtype: torch.dtype, sweep: int | None, after: torch.cuda.Event | None = None) -> None:
        if self._ahead is not None:
            self._ahead.gathering.drop()
        gathering = self._start(self._placed(), dtype, "weights.forward", self.shard, after=after, anew=True)
        self._ahead = _Ahead(gathering, self._chain, self._chain.backwards, sweep)

    def _placed(self) -> Placement:
        """The layout, with its tables where the weights are now."""
        if self._placement.device != self.shard.device:
            self._placement = Placement(self.layout, self.group, self.shard.device)
        return self._placement

    def _start(
        self,
        placement: Slots,
        dtype: torch.dtype,
        purpose: str,
        shard: Tensor,
        into: tuple[torch.UntypedStorage, int] | None = None,
        *,
        after: torch.cuda.Event | None = None,
        anew: bool = False,
    ) -> Gathering | DirectGathering:
        """Begin to gather weights, of which `shard` is this rank's part; copy engines write them `into` a storage from
        a row on, which are weights of a pass that others have been shown, or into new memory, and begin behind what
        `after` marks.

        A pass that runs again within a backward pass does not show once more what others have been shown for it; with
        `anew` weights are shown in any case.
        """
        memory = self.memory
        if memory is None:
            with unseen():
                return Gathering(shard, placement, self.group, dtype, self.traffic, purpose)
        if dtype != memory.dtype:
            raise ValueError(
                f"{self.title}: dtype = {dtype}: the memory was made for {memory.dtype}. Give the layer "
                f"compute_dtype={memory.dtype}, or run it under autocast, and prefetch() as well"
            )
        if self.shard.device != memory.device:
            raise ValueError(f"{self.title}: device = {self.shard.device}: the memory was made for {memory.device}")
        with unseen():
            if self._published is None:
                self._published = memory.open()
            # Between a forward pass and its backward weights stay as they are, and within one; at any other time they
            # may have changed, and in ways that autograd does not see. A checkpoint that is reentrant may run a pass
            # again by another layout or planner than it showed weights for.
            shown = into is not None
            if isinstance(placement, Placement) and not shown:
                shown = in_backward() and not anew and self._have_been_shown(placement)
                if not shown:
                    self._published.shown = self._shows(placement)
            gathering = DirectGathering(
                shard,
                placement,
                memory,
                self._published,
                shown=shown,
                into=into,
                room=None if self.planner is None else int(self._lent(self.planner)[self.group.rank]),
                after=after,
            )
        self.traffic[purpose] += gathering.sent
        return gathering

    def _shows(self, placement: Placement) -> tuple[tuple[int, int, int], int | None]:
        """What others are shown for a pass: which weights, and of which layout; of all experts where ranks may lend."""
        return changes_of(self.shard), None if self.planner is not None else placement.fingerprint

    def _have_been_shown(self, placement: Placement) -> bool:
        """Whether others were last shown what a pass asks for, by what all ranks find alike; without memory always."""
        published = self._published
        if published is None:
            return True
        weights, layout = self._shows(placement)
        return published.shown in ((weights, layout), (weights, None))

    def _still_shows(self, weights: tuple[int, int, int]) -> bool:
        """Whether others were last shown these weights, of whatever layout; without memory they are sent anyway."""
        published = self._published
        return published is None or published.shown is None or published.shown[0] == weights

    def _return(self, gradients: Sequence[Tensor], this: _Pass) -> Returning | DirectReturning:
        """Begin to return the gradients of slots, in parts of their columns; copy engines' are scaled on the way."""
        if self.memory is None:
            (gradient,) = gradients
            return Returning(gradient, this.placement, self.group, self.traffic)
        total, this.total = this.total, None
        return DirectReturning(gradients, this.placement, self.memory, self.shard, self.traffic, this.scale, total)

    def _take_ahead(self, placement: Placement, dtype: torch.dtype) -> Gathering | DirectGathering | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        found, now = ahead.gathering, (placement, version_of(self.shard), dtype)
        same = (found.placement, found.version, found.dtype) == now and self._have_been_shown(placement)
        if same and ahead.is_of_now(self._chain):
            return found
        # The layout, the planner or the weights have changed since, or may have, on every rank alike.
        found.drop()
        return None

    def _note_backward(self, number: int, gradient: Tensor) -> None:
        super()._note_backward(number, gradient)
        self._chain.backwards += 1

    def _follower(self) -> FullyShardedExperts | None:
        """The layer to prefetch: none in a recomputation, which runs the layers in another order."""
        return None if in_backward() else self._chain.after(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are in no chain."""
        return super().__getstate__() | {
            "_chain": _Chain(),
            "_ahead": None,
            "_latest": None,
            "_spilling": None,
            "_published": None,
            "_made": MadePasses(),
        }


def chain(layers: Sequence[FullyShardedExperts]) -> None:
    """Say in which order layers run, so that each gathers the weights of the next while it computes.

    Args:
        layers: In the order of the forward pass; the backward pass uses the reverse.
    """
    made = _Chain(layers)
    for layer in made.layers:
        layer._chain = made


class _Chain:
    """Layers in the order of their passes, and how far they have come.

    Attributes:
        layers: The layers; none where a layer is in no chain.
        sweep: Number of the run through them, forward, that is under way.
        backwards: Differs after a backward pass of any of them.
    """

    def __init__(self, layers: Sequence[FullyShardedExperts] = ()) -> None:
        self.layers = list(layers)
        self.sweep = self.backwards = 0
        self._last = -1

    def begin(self, layer: FullyShardedExperts) -> None:
        """Note a forward pass, unless it is one that a checkpoint runs again."""
        if not in_backward():
            place = self.layers.index(layer) if self.layers else 0
            self.sweep += place <= self._last
            self._last = place

    def after(self, layer: FullyShardedExperts) -> FullyShardedExperts | None:
        """The layer that comes next; None behind the last."""
        return self._beside(layer, 1)

    def before(self, layer: FullyShardedExperts) -> FullyShardedExperts | None:
        """The layer that came before; None for the first."""
        return self._beside(layer, -1)

    def _beside(self, layer: FullyShardedExperts, step: int) -> FullyShardedExperts | None:
        place = self.layers.index(layer) + step if self.layers else -1
        return self.layers[place] if 0 <= place < len(self.layers) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """Weights that were gathered ahead, and for what.

    Not every change of weights can be seen, and a layer may be left out of a pass, or run in another order than said.
    So these are for the same sweep, or where `prefetch` was called for the next one, and for no pass after a backward,
    which optimizers follow.

    Attributes:
        gathering: The weights.
        chain: Of the layer then.
        backwards: Of the chain then.
        sweep: Of the chain then; None where it was still to come.
    """

    gathering: Gathering | DirectGathering
    chain: _Chain
    backwards: int
    sweep: int | None

    def is_of_now(self, chain: _Chain) -> bool:
        """Whether the pass that is under way in a layer's chain may use them."""
        return (self.chain, self.backwards) == (chain, chain.backwards) and self.sweep in (None, chain.sweep)


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """What a pass is made with: the placement of the layout, and what `FullyShardedExperts.route` has planned."""

    placement: Placement
    slots: Int32
    send: Int64
    receive: Int64


class _Pass:
    """One forward pass of a layer: frees its gathered weights, and brings them back for the backward pass."""

    def __init__(self, layer: FullyShardedExperts, placement: Placement, dtype: torch.dtype) -> None:
        self.layer = layer
        self.placement = placement
        self.dtype = dtype
        self.scale = layer.scale
        self.freed = False
        self.arriving: Gathering | DirectGathering | None = None
        self.returning: Returning | DirectReturning | None = None
        self.total: Tensor | None = None
        self.shard: Tensor = layer.shard  # which ``torch.func.functional_call`` may put there for the pass alone
        self.version = changes_of(self.shard)
        # Weak, because autograd alone decides how long the weights are wanted.
        self.storage: StorageWeakRef | None = None
        self.size = 0
        before = layer._chain.before(layer)
        self.before = None if before is None else before._latest
        layer._latest = self

    def land(self) -> Tensor:
        """The shard, the gradients of whose slots come back to it; see `_Land`."""
        memory = self.layer.memory
        returning = None if memory is None else memory.returning
        # Its backward runs on the stream of its forward, so that no other waits for the gradients.
        with switched_to(returning):
            weights = self.layer._weights_of_pass(scaled=memory is not None)
            landed: Tensor = _Land.apply(weights, self)  # type: ignore[no-untyped-call]
        return landed

    def gather(
        self, landed: Tensor, gatherings: Sequence[Gathering | DirectGathering], columns: Sequence[int] = ()
    ) -> tuple[Tensor, ...]:
        """The weights of this rank's slots, [slots, N * width].

        Or parts of so many columns, on the same memory, for which the caller waits.
        """
        weights: tuple[Tensor, ...] = _Gather.apply(landed, gatherings, self, columns)  # type: ignore[no-untyped-call]
        return weights

    def guard(self, results: Tensor, flat: Tensor) -> Tensor:
        """`results`, before whose backward weights are brought back; their memory, which `flat` is on, is given up."""
        if not self._will_free(results):
            return results
        guarded: Tensor = _Restore.apply(results, flat, self)  # type: ignore[no-untyped-call]
        self.free(results, flat)
        return guarded

    def free(self, results: Tensor, flat: Tensor) -> None:
        """Give up the memory of weights that `results` were made with, if the backward will bring them back."""
        if self._will_free(results) and not in_backward():
            flat.untyped_storage().resize_(0)  # though autograd still refers to it
            self.freed = True

    def _will_free(self, results: Tensor) -> bool:
        return self.layer.reshard and torch.is_grad_enabled() and results.requires_grad

    def start(self) -> None:
        """Begin to gather the weights again, if they have been freed, are still wanted, and are what they were."""
        storage = self.storage
        if not self.freed or self.arriving is not None or storage is None or storage.expired():
            return
        if self.version == changes_of(self.shard) and self.layer._still_shows(self.version):
            into = torch.UntypedStorage._new_with_weak_ptr(storage.cdata), 0
            self.arriving = self.layer._start(self.placement, self.dtype, "weights.backward", self.shard, into)

    def restore(self, flat: Tensor) -> None:
        """Bring the weights back.

        Under activation checkpointing `flat` is not the tensor of this pass but a recomputed one, which is whole.

        Raises:
            RuntimeError: the layer has others since.
        """
        storage = flat.untyped_storage()
        if not self.freed or self.storage is None or storage._cdata != self.storage.cdata:
            return
        self.start()
        if self.arriving is None:
            raise RuntimeError(
                f"{self.layer.title}: its experts have changed since the forward pass of this backward, which "
                "gathers them again. Change them once all backward passes of a step are over"
            )
        if storage.nbytes() != self.size:  # or it would be copied, half arrived, to other memory
            storage.resize_(self.size)
        self.arriving.finish(flat)
        self.arriving, self.freed = None, False

    def bring_back(self, flat: Tensor) -> None:
        """`restore`, and begin with the weights of the layer before, whose backward comes next."""
        self.restore(flat)
        if self.before is not None:
            self.before.start()

    def own(self) -> Owned:
        """Where products write what this rank owns of the gradients of experts that are in its slots alone."""
        layer = self.layer
        assert layer.memory is not None, "passes without the host have one"
        self.total = layer.memory.room_for(layer.shard)
        return Owned(self.total, self.placement.alone, layer.group.rank * layer.shard.shape[1], self.scale)


class _Land(torch.autograd.Function):
    """Identity on the shard; its backward adds up the gradients that have come back from the slots.

    A node apart from `_Gather`, made before the dispatch, so that its backward runs last, and the gradients of weights
    travel beside those of tokens.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor, this: _Pass) -> Tensor:
        ctx.this = this
        ctx.save_for_backward(shard)
        return shard.view_as(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        this: _Pass = ctx.this
        (shard,) = ctx.saved_tensors
        assert this.returning is not None, "_Gather.backward has run"
        gradient, this.returning = this.returning.finish(shard), None
        return gradient, None


class _Gather(torch.autograd.Function):
    """The weights of this rank's slots; its backward sends their gradients to the owners."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        gatherings: Sequence[Gathering | DirectGathering],
        this: _Pass,
        columns: Sequence[int],
    ) -> tuple[Tensor, ...]:
        ctx.this, ctx.shape, ctx.dtype = this, shard.shape, shard.dtype
        flat = gatherings[0].memory(len(this.placement.experts))
        storage = flat.untyped_storage()
        this.storage, this.size = StorageWeakRef(storage), flat.numel() * flat.element_size()
        if not columns:
            parts = flat.split([len(gathering.placement.experts) for gathering in gatherings])
            for gathering, part in zip(gatherings, parts, strict=True):
                gathering.finish(part)
            return (flat,)
        # No views of each other, which autograd would look after.
        places = (0, *accumulate(columns[:-1]))
        return tuple(
            torch.empty_like(flat[:0]).set_(storage, place, (len(flat), width), flat.stride())
            for place, width in zip(places, columns, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        this: _Pass = ctx.this
        this.returning = this.layer._return(gradients, this)
        # Only tells _Land to run; the true gradient is still travelling. Of another type it would be written out.
        return gradients[0].new_zeros((), dtype=ctx.dtype).expand(ctx.shape), None, None, None


class _Restore(torch.autograd.Function):
    """Identity on the results of the experts; before their backward, it brings the weights back."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, flat: Tensor, this: _Pass) -> Tensor:
        ctx.this = this
        # Saved through autograd: under activation checkpointing this becomes the recomputed tensor.
        ctx.save_for_backward(flat)
        return results.view_as(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        this: _Pass = ctx.this
        (flat,) = ctx.saved_tensors
        this.bring_back(flat)
        return gradient, None, None
