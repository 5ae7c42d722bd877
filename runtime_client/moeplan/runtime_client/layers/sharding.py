"""Experts in equal shards over a group: gathering the replicas of a layout, and returning their gradients.

Every rank owns 1/N of every expert, whatever the layout (fully sharded experts: LAER-MoE, ASPLOS 2026; placement
decoupled from optimizer state: SYMI, arXiv 2504.19925). A layout only decides which experts are gathered where.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.device.shard_memory import PublishedShard, ShardMemory
from moeplan.runtime_client.group import ExpertGroup, Traffic, Transfer, beside, join
from moeplan.runtime_client.layers.changes import changes_of
from moeplan.runtime_client.layers.copies import copy_strided, scatter_rows
from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.layout import EMPTY, Layout

__all__ = [
    "DirectGathering",
    "DirectReturning",
    "Gathering",
    "Placement",
    "Returning",
    "Slots",
    "shard_width",
    "version_of",
]


def shard_width(elements: int, size: int) -> int:
    """Elements of one expert that each of `size` ranks owns; the last ranks' shards are padded."""
    return -(-elements // size)


def version_of(shard: Tensor) -> tuple[int, int, int, int, torch.dtype]:
    """Differs after a change of the shard's values, as `changes_of` sees them, memory or type."""
    return *changes_of(shard), shard.data_ptr(), shard.dtype


class Slots:
    """Slots of the ranks, as one rank of a group gathers what fills them.

    Args:
        table: int32[ranks, width], the expert of each slot, -1 where it is empty.
        experts: Number of experts.
        group: The ranks.
        device: Where the weights are.

    Attributes:
        device: Where its tables are.
        experts: Experts of this rank's filled slots, in slot order.
        slots: Their slots.
        slot: int32[experts], which of this rank's filled slots has each expert, -1 if none.
        filled: Filled slots of each rank.
        replicas: int64[replicas], the expert of every replica in the order of devices and slots.
    """

    def __init__(self, table: Int32, experts: int, group: ExpertGroup, device: torch.device) -> None:
        filled = table != EMPTY
        self.device = device
        self.experts: list[int] = table[group.rank][filled[group.rank]].tolist()
        self.slots: list[int] = np.flatnonzero(filled[group.rank]).tolist()
        self.filled: list[int] = filled.sum(axis=1).tolist()
        self.replicas = torch.from_numpy(table[filled].astype(np.int64)).to(device)
        slot = np.full(experts, -1, np.int32)
        slot[self.experts] = np.arange(len(self.experts))
        self.slot = torch.from_numpy(slot).to(device)


class Placement(Slots):
    """A layout as one rank of a group carries it out.

    Attributes:
        layout: The layout.
        fingerprint: Number that differs between layouts (up to collisions of 62 bits).
        elsewhere: bool[experts], those that other ranks have.
        alone: int32[filled slots of this rank], the expert of each, -1 if other ranks have it, too.
        shared: int64[n], the experts that are not on this rank alone.
        begin: Number of replicas on the ranks before this one.
        order: int64[replicas], positions in `replicas` by expert, ascending for each.
        start: int64[experts + 1], where those of each expert begin in `order`.
        first: int64[experts], position in `replicas` of each expert's first one.
        several: int64[n], experts with more than one replica, those with most in front.
        rounds: Positions of the first replicas of the experts in `several`, of the second ones, and so on; as those
            with most are in front, each covers a beginning of `several`. Empty if no expert has several.
    """

    def __init__(self, layout: Layout, group: ExpertGroup, device: torch.device) -> None:
        if layout.devices != group.size:
            raise ValueError(
                f"layout.devices = {layout.devices}: the group has {group.size} ranks; plan for as many devices"
            )
        super().__init__(layout.slots, layout.experts, group, device)
        self.layout = layout
        self.fingerprint = fingerprint(layout.slots.tobytes(), str(layout.slots.shape).encode())
        self.begin = sum(self.filled[: group.rank])
        here = np.array(self.experts, np.int32)
        elsewhere = layout.replicas > np.bincount(here, minlength=layout.experts)
        alone = np.where(elsewhere[here], np.int32(-1), here)
        tables = elsewhere, alone, np.flatnonzero(elsewhere), *_by_expert(layout)
        self.elsewhere, self.alone, self.shared, self.order, self.start, self.first, self.several, *self.rounds = (
            torch.from_numpy(table).to(device) for table in tables
        )


def _by_expert(layout: Layout) -> list[Int64]:
    """`order`, `start`, `first`, `several` and each of the `rounds` of a `Placement`."""
    order = np.argsort(layout.slots[layout.slots != EMPTY], kind="stable")
    starts = layout.hosts.start.astype(np.int64)
    start = starts[:-1]
    several = np.argsort(-layout.replicas, kind="stable")[: (layout.replicas > 1).sum()]
    most = int(layout.replicas[several].max(initial=0))
    rounds = (order[start[several[layout.replicas[several] > nth]] + nth] for nth in range(most))
    return [order, starts, order[start], several, *rounds]


class Gathering:
    """The weights of this rank's slots, on their way from their owners.

    Every rank of the group makes one at the same point of its program.

    Args:
        shard: [experts, width], this rank's part of every expert.
        placement: What to gather.
        group: The ranks.
        dtype: Type that the weights travel and arrive in.
        traffic: Counter of the bytes sent.
        purpose: Key in `traffic`.

    Attributes:
        storage: None: the weights go to no memory before they are finished.
    """

    storage = None

    def __init__(
        self,
        shard: Tensor,
        placement: Slots,
        group: ExpertGroup,
        dtype: torch.dtype,
        traffic: Traffic,
        purpose: str,
    ) -> None:
        self.placement = placement
        self.version = version_of(shard)
        self.dtype = dtype
        self._size = group.size
        with beside(shard.device):
            packed = shard.detach().to(dtype).index_select(0, placement.replicas)
            receive = [len(placement.experts)] * group.size
            self._transfer: Transfer | None = group.exchange(
                packed, placement.filled, receive, weights=True, traffic=traffic, purpose=purpose
            )

    def memory(self, slots: int) -> Tensor:
        """Memory [slots, N * width] that the weights of this gathering may come first in."""
        assert self._transfer is not None, "a gathering is finished once"
        return self._transfer.received.new_empty(slots, self._size * self._transfer.received.shape[1])

    def finish(self, flat: Tensor) -> None:
        """Wait, and write into `flat`, [filled slots, N * width]. On CUDA the current stream waits, not the host."""
        assert self._transfer is not None, "a gathering is finished once"
        with beside(flat.device):
            received = self._transfer.wait()
            slots, width = len(flat), received.shape[1]
            # `data`: autograd need not know that a saved tensor is written, as its old values come back.
            by_slot = flat.data.view(slots, self._size, width)
            copy_strided(by_slot, received.view(self._size, slots, width).transpose(0, 1))
            self._transfer = None
        join(flat.device)

    def drop(self) -> None:
        """Wait for a gathering that is of no use, so that its buffers may go."""
        if self._transfer is not None:
            with beside(self._transfer.received.device):
                self._transfer.wait()
            self._transfer = None


class DirectGathering:
    """As `Gathering`, by copies straight from the ranks' memory into the weights' own.

    Args:
        shard: [experts, width], this rank's part of every expert.
        placement: What to gather.
        memory: Of the layers.
        published: Of this layer in it.
        shown: Whether other ranks know these weights already, from a gathering before.
        into: Memory that the weights go to, of any size, and the first row there; by default new memory.
        room: As in `ShardMemory.show_and_gather`.
        after: Behind what to begin, beside a product that has been launched since; by default behind all that has been.

    Attributes:
        storage: Memory that the weights go to.
        sent: Bytes that other ranks get from this one.
    """

    def __init__(
        self,
        shard: Tensor,
        placement: Slots,
        memory: ShardMemory,
        published: PublishedShard,
        *,
        shown: bool,
        into: tuple[torch.UntypedStorage, int] | None = None,
        room: int | None = None,
        after: torch.cuda.Event | None = None,
    ) -> None:
        self.placement = placement
        self.version = version_of(shard)
        self.dtype = memory.dtype
        self._memory = memory
        if shown:
            self._flat, self._arrival = memory.gather(published, placement, shard, into=into, room=room)
        else:
            assert isinstance(placement, Placement), "what is lent has been shown with the layout"
            self._flat, self._arrival = memory.show_and_gather(published, placement, shard, room=room, after=after)
        to_others = sum(placement.filled) - len(placement.experts)
        self.sent = to_others * shard.shape[1] * memory.dtype.itemsize

    @property
    def storage(self) -> torch.UntypedStorage:
        return self._flat.untyped_storage()

    def memory(self, slots: int) -> Tensor:
        """As of `Gathering`; the weights are there, or on their way."""
        width = self._flat.shape[1]
        return torch.empty_like(self._flat[:0]).set_(self.storage, 0, (slots, width), (width, 1))

    def finish(self, flat: Tensor) -> None:
        """Wait until the weights are in `flat`, the rows that they were sent to; as of `Gathering`."""
        self._memory.wait(self._arrival)

    def drop(self) -> None:
        """As of `Gathering`."""
        self._memory.wait(self._arrival)


class Returning:
    """Gradients of this rank's slots, on their way to the owners.

    Args:
        gradient: [filled slots, N * width].
        placement: The layout that the slots were gathered by.
        group: The ranks.
        traffic: Counter of the bytes sent.
    """

    def __init__(self, gradient: Tensor, placement: Placement, group: ExpertGroup, traffic: Traffic) -> None:
        self._placement = placement
        self._gradient = gradient  # read on the side stream, so it must not be freed before
        slots, width = len(gradient), gradient.shape[1] // group.size
        with beside(gradient.device):
            packed = gradient.new_empty(group.size, slots, width)
            copy_strided(packed, gradient.view(slots, group.size, width).transpose(0, 1))
            self._transfer = group.exchange(
                packed.flatten(0, 1),
                [slots] * group.size,
                placement.filled,
                weights=True,
                traffic=traffic,
                purpose="gradients",
            )

    def finish(self, like: Tensor) -> Tensor:
        """Wait, and add up the replicas of each expert.

        The sum is taken in float32 (float64 for double parameters) in the order of devices and slots, so it is the
        same in every run.

        Args:
            like: [experts, width], the shard.

        Returns:
            [experts, width] in the dtype of `like`.
        """
        placement = self._placement
        with beside(like.device):
            received = self._transfer.wait()
            total = received.index_select(0, placement.first).to(like.dtype)
            if placement.rounds:
                first, *others = placement.rounds
                sums = received.index_select(0, first).to(torch.promote_types(like.dtype, torch.float32))
                for rows in others:
                    sums[: len(rows)] += received.index_select(0, rows)
                scatter_rows(total, placement.several, sums.to(like.dtype))
        join(like.device)
        if like.device.type == "cuda":
            total.record_stream(torch.cuda.current_stream(like.device))
        return total


class DirectReturning:
    """As `Returning`, by copies straight into the memory of the owners.

    Args:
        gradients: [filled slots, columns] each, parts of [filled slots, N * width].
        placement: The layout that the slots were gathered by.
        memory: Of the layers.
        shard: [experts, width], for its type.
        traffic: Counter of the bytes sent.
        scale: What gradients are multiplied by.
        total: As in `ShardMemory.give_back`.
    """

    def __init__(
        self,
        gradients: Sequence[Tensor],
        placement: Placement,
        memory: ShardMemory,
        shard: Tensor,
        traffic: Traffic,
        scale: float,
        total: Tensor | None,
    ) -> None:
        self._memory = memory
        self._total, self._arrival = memory.give_back(gradients, placement, shard, scale, total)
        slots, others = len(placement.experts), memory.group.size - 1
        traffic["gradients"] += slots * others * shard.shape[1] * gradients[0].element_size()

    def finish(self, like: Tensor) -> Tensor:
        """As of `Returning`."""
        self._memory.wait(self._arrival)
        return self._total
