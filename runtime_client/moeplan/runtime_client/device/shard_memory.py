"""Memory through which sharded experts travel by copy engines: shards that all ranks read, and room for gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.device.launches import Launch, aligned, blocks_beside, lanes
from moeplan.runtime_client.device.memory import UNIT, SymmetricMemory, places, symmetric_memory
from moeplan.runtime_client.device.peer_copies import Copies, stretches
from moeplan.runtime_client.errors import MissedPassError
from moeplan.runtime_client.group import ExpertGroup, on_stream, switched_to
from moeplan.solvers.problem.arrays import Int32, Int64

__all__ = ["PublishedShard", "ShardMemory"]

_ROOMS = 2
"""Rooms for gradients, in turn: one is filled while the other is added up."""

_PIECE = 4096
"""Elements that a block converts or adds up at a time."""

_SPOILED = 64
"""Rows that a block of `spoil` looks after."""


class Filled(Protocol):
    """What fills slots of one rank, as `Slots` has it."""

    @property
    def experts(self) -> list[int]: ...
    @property
    def slot(self) -> Tensor: ...


class Placed(Filled, Protocol):
    """A layout on one rank, as `Placement` has it: the filled slots of all ranks are numbered in their order."""

    @property
    def elsewhere(self) -> Tensor: ...
    @property
    def shared(self) -> Tensor: ...
    @property
    def begin(self) -> int: ...
    @property
    def order(self) -> Tensor: ...
    @property
    def start(self) -> Tensor: ...


@dataclass(slots=True, eq=False)
class PublishedShard:
    """A layer's shards as other ranks read them.

    Attributes:
        rows: [experts, width] in symmetric memory, this rank's, of the experts that others have had since.
        addresses: int64[ranks], where each rank's begins as seen from here.
        held: What the addresses depend on.
        read: Meetings before the last gathering; as many now mean that other ranks may still be reading. -1 before the
            first, when there is nothing to read.
        shown: For the layer to say what rows were written for last; None if none were.
    """

    rows: Tensor
    addresses: Int64
    held: object
    read: int = -1
    shown: tuple[tuple[int, int, int], int | None] | None = None


class ShardMemory:
    """Lets `FullyShardedExperts` gather experts and return their gradients on GPUs without taking processors for it.

    One for all layers of the same dimensions that run one after another; pass it to each of them. The ranks must reach
    each other's memory (one NVLink domain). Copy engines read experts from where their shards are straight into
    the gathered ones, and write gradients of slots to the ranks that own them. Nothing that a rank owns is sent to
    itself. Gathering, returning and the layers' own work run side by side on streams of their own.

    Memory of a rank in bytes, with b per element, E elements of an expert, N ranks and S slots:
    ``b * experts * E / N`` for each layer, and ``2 * b * S * E`` for gradients, in place of what NCCL takes for every
    gathering under way.

    If a rank does not come to a meeting in time, weights and gradients are not numbers from then on, on all ranks; the
    error is raised by the next pass that sees it, and by `check`. Nothing works after that.

    Args:
        group: The ranks.
        elements: Parameters of one expert, as `ExpertShape.elements`.
        experts: Number of experts.
        slots: Most slots of a rank in any layout; the same on all ranks.
        device: This rank's GPU.
        dtype: What weights travel and compute in.
        time_limit: How long ranks wait for each other; by default as long as the group does.

    Raises:
        ValueError: there is nothing to share; the message says why.
        RuntimeError: as `symmetric_memory`.
    """

    def __init__(
        self,
        group: ExpertGroup,
        elements: int,
        experts: int,
        *,
        slots: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        time_limit: timedelta | None = None,
        memory: Callable[[dist.ProcessGroup, int, torch.device], SymmetricMemory] = symmetric_memory,
    ) -> None:
        if group.weights is None:
            raise ValueError("group of one rank: nothing travels; leave `memory` out")
        if slots < 1:
            raise ValueError(f"slots = {slots}: must be at least 1")
        from moeplan.runtime_client.device import shard_kernels  # which needs Triton

        self.group, self.experts, self.slots, self.dtype = group, experts, slots, dtype
        self.elements, self.width = elements, -(-elements // group.size)
        self._make, self._ranks = memory, group.weights
        rank, size = group.rank, group.size
        rooms = [f"gradients {number}" for number in range(_ROOMS)]
        sizes = {"gathering": 8 * size, "returning": 8 * size, "abort": 8}
        begins, total = places(sizes | dict.fromkeys(rooms, size * slots * self.width * dtype.itemsize))
        shared = memory(group.weights, total, device)
        self._shared = shared
        self.device = shared.own.device
        self._abort = shared.view(begins["abort"], (1,), torch.int64)
        self._failed = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._rooms = [
            (shared.view(begins[room], (size * slots, self.width), dtype), _addresses(shared, begins[room]))
            for room in rooms
        ]
        limit_ns = int((time_limit or group.timeout).total_seconds() * 1e9)
        self._gathering, self._returning = (
            _Line(shared, shared.view(begins[name], (size,), torch.int64), self._abort, rank, limit_ns)
            for name in ("gathering", "returning")
        )
        self._returns = 0
        self._held: tuple[Sequence[Tensor], torch.cuda.Event | None] | None = None
        self._add: dict[tuple[torch.dtype, int, int, int, float], Launch] = {}
        self._add_replicas = shard_kernels.add_replicas
        self._blocks = blocks_beside(self.device)
        sizes = {"EXPERTS": experts, "RANKS": size, "WIDTH": self.width, "BLOCKS": self._blocks, "PIECE": _PIECE}
        self._show, self._show_own = (Launch(shard_kernels.show, 8, SHOWN=shown, **sizes) for shown in (False, True))
        self._all_wanted = torch.ones(experts, dtype=torch.bool, device=self.device)
        self._all_experts = torch.arange(experts, device=self.device)
        self._spoil = Launch(shard_kernels.spoil, 1, ROW=size * self.width, BLOCK=_SPOILED)
        # Other ranks first, each rank beginning with another.
        self._peers = np.array([(rank + step) % size for step in range(1, size + 1)])
        self._gathered: WeakKeyDictionary[Filled, tuple[Copies, Int64]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, object]) -> ShardMemory:
        """Itself: copies of layers share it, as layers do."""
        return self

    @property
    def meetings(self) -> int:
        """Meetings for gatherings so far; other ranks have had as many before the same pass."""
        return self._gathering.meetings

    @property
    def returning(self) -> torch.cuda.Stream | None:
        """Stream of the gradients; None on CPUs."""
        return self._returning.stream

    def check(self) -> None:
        """Raise what has gone wrong in passes that are over; call it where the host waits for the device anyway.

        Raises:
            MissedPassError: a rank did not come in time.
        """
        if missed := int(self._failed):
            raise MissedPassError(
                f"rank {missed - 1} has not come in time to where experts are gathered. Every rank of the group calls "
                "every layer as often as the others do, also with no tokens"
            )

    def require(self, elements: int, experts: int) -> None:
        """Raise unless a layer of such experts can use this memory.

        Raises:
            ValueError: it was made for others.
        """
        for name, own, other in (("elements", self.elements, elements), ("experts", self.experts, experts)):
            if own != other:
                raise ValueError(f"{name} = {other}: the memory was made for {own}")

    def require_room(self, slots: Int32, spare: Int32 | int = 0) -> None:
        """Raise unless there is room for the gradients of a layout int32[ranks, width], -1 for an empty slot.

        Args:
            slots: Of the layout.
            spare: int32[ranks], replicas that a rank may be lent beyond it.

        Raises:
            ValueError: there is not.
        """
        if (most := int(((slots >= 0).sum(axis=1) + spare).max())) > self.slots:
            raise ValueError(
                f"layout has up to {most} slots on a rank, with those that are lent: the memory was made for "
                f"{self.slots}; write ShardMemory(..., slots={most})"
            )

    def open(self) -> PublishedShard:
        """Memory for the shards of one layer. All ranks call it at the same time."""
        shape = (self.experts, self.width)
        memory = self._make(self._ranks, self.experts * self.width * self.dtype.itemsize, self.device)
        return PublishedShard(memory.view(0, shape, self.dtype), _addresses(memory), memory)

    def show_and_gather(
        self,
        published: PublishedShard,
        placed: Placed,
        shard: Tensor,
        *,
        room: int | None = None,
        after: torch.cuda.Event | None = None,
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """Show other ranks a shard as it is now, and begin to gather the experts of this rank's slots.

        All ranks call it.

        Args:
            published: Of the layer.
            placed: Whose experts.
            shard: [experts, width], this rank's part of every expert.
            room: Rows of memory behind the weights, for what this rank is lent beyond the layout and gathers later;
                None if no rank is lent any.
            after: Behind what to begin, beside a product that has been launched since, which keeps its processors: a
                meeting goes ahead, during which it begins. By default behind all that has been launched.

        Returns:
            [slots + room, N * width], new memory, and when the slots are whole; see `wait`.
        """
        line, slots = self._gathering, len(placed.experts)
        with on_stream(line.stream, after):
            # On this stream, so that memory is reused in its order.
            flat = self._weights(slots + (room or 0))
            wanted = placed.elsewhere if room is None else self._all_wanted
            self._hold(placed.slot, wanted)
            if after is not None or published.read == line.meetings:  # others may be reading what was there before
                line.meet()
            part = aligned(shard.detach())
            self._show((self._blocks, 1, 1), part, published.rows, flat, placed.slot, wanted, self.group.rank)
            line.meet()
            self._copy(published, placed, flat)
            # Ranks that have not met shall compute nothing that looks right.
            self._spoil((slots // _SPOILED + 1, 1, 1), flat, self._abort, self._failed, slots)
            return flat, line.mark()

    def gather(
        self,
        published: PublishedShard,
        placed: Filled,
        shard: Tensor,
        *,
        into: tuple[torch.UntypedStorage, int] | None = None,
        room: int | None = None,
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to gather experts as shards were shown last, which are the same still. All ranks call it.

        Args:
            published: Of the layer.
            placed: Whose experts.
            shard: As in `show_and_gather`.
            into: Memory to write, of any size, and the first row there; by default new memory.
            room: As in `show_and_gather`, in new memory.

        Returns:
            As `show_and_gather`.
        """
        line, slots = self._gathering, len(placed.experts)
        with on_stream(line.stream):
            flat = self._weights(slots + (room or 0)) if into is None else self._weights(slots, *into)
            self._hold(placed.slot)
            self._copy(published, placed, flat)
            part, rank = aligned(shard.detach()), self.group.rank
            self._show_own((self._blocks, 1, 1), part, published.rows, flat, placed.slot, self._all_wanted, rank)
            return flat, line.mark()

    def _hold(self, *tables: Tensor) -> None:
        """Keep tables of a layout until the line has read them: the layout may go before, which waits for nothing."""
        if self._gathering.stream is not None:
            for table in tables:
                table.record_stream(self._gathering.stream)

    def _copy(self, published: PublishedShard, placed: Filled, flat: Tensor) -> None:
        """Begin to copy the parts of experts that other ranks own to their places in `flat`."""
        line = self._gathering
        copies, peers = self._gathering_of(placed)
        copies.at(flat.data_ptr(), published.addresses[peers]).start(line.stream)
        published.read = line.meetings

    def _weights(self, rows: int, storage: torch.UntypedStorage | None = None, first: int = 0) -> Tensor:
        """Memory [rows, N * width] for weights, new or from a row of a storage on."""
        width = self.group.size * self.width
        if storage is None:
            return torch.empty(rows, width, dtype=self.dtype, device=self.device)
        size = (first + rows) * width * self.dtype.itemsize
        if storage.nbytes() < size:
            storage.resize_(size)
        flat = torch.empty(0, dtype=self.dtype, device=self.device)
        return flat.set_(storage, first * width, (rows, width), (width, 1))

    def _gathering_of(self, placed: Filled) -> tuple[Copies, Int64]:
        """Copies from shards of other ranks into weights, from addresses of the ranks and to one of the weights on.

        Returns:
            The copies, and int64[copies], the rank of each.
        """
        known = self._gathered.get(placed)
        if known is None:
            size, row = self.group.size, self.width * self.dtype.itemsize
            parts = np.array(stretches(placed.experts), np.int64).reshape(-1, 4)
            peers = self._peers[:-1].repeat(len(parts))
            place, first, step, length = np.tile(parts, (size - 1, 1)).T
            copies = Copies(row, length, row * (size * place + peers), size * row, row * first, row * step)
            known = self._gathered[placed] = copies, peers
        return known

    def room_for(self, shard: Tensor) -> Tensor:
        """Memory like a shard for its gradient, that products may write parts of which are whole, for `give_back`."""
        room = self._like(shard)
        if self.returning is not None:
            # That stream may still read what was there before, which autograd has let go: it adds to earlier gradients.
            torch.cuda.current_stream(self.device).wait_stream(self.returning)
        return room

    def _like(self, shard: Tensor) -> Tensor:
        """Memory for the gradient of a shard, of the stream that adds it up."""
        with switched_to(self.returning):
            return torch.empty_like(shard, requires_grad=False)

    def give_back(
        self, gradients: Sequence[Tensor], placed: Placed, like: Tensor, scale: float = 1.0, total: Tensor | None = None
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to send gradients of this rank's slots to the owners of the parts, which add up those of an expert.

        The sum is taken in float32 (float64 for double parameters) in the order of ranks and slots.

        Args:
            gradients: [slots, columns], the first and the others of N * width columns; or all of them in one.
            placed: The layout that the slots were gathered by.
            like: [experts, width], the shard.
            scale: What sums are multiplied by.
            total: Of `room_for`, with what needs no sum: this rank's part of the experts that are in its slots alone.

        Returns:
            [experts, width] in the dtype of `like`, and when it is whole; see `wait`.
        """
        line = self._returning
        gradients = [part if part.stride(1) == 1 else part.contiguous() for part in gradients]
        first, last = gradients[0], gradients[-1]
        arrived, addresses = self._rooms[self._returns % _ROOMS]
        self.release()
        added = self._all_experts if total is None else placed.shared
        total = self._like(like) if total is None else total
        with on_stream(line.stream):
            self._sending(addresses, placed.begin, gradients).start(line.stream)
            # Before it, all ranks have added up what was in the other room, so that they may write there afterwards.
            line.meet()
            self._adding(like.dtype, first.shape[1], first.stride(0), last.stride(0), scale)(
                (self._blocks, 1, 1), arrived, first, last, placed.order, placed.start, added, total, self._abort,
                self._failed, self.group.rank, placed.begin, placed.begin + len(first), len(added),
            )  # fmt: skip
            arrival = line.mark()
        self._returns += 1
        self._held = gradients, arrival
        torch.autograd.Variable._execution_engine.queue_callback(self.release)
        return total, arrival

    def _sending(self, addresses: Int64, begin: int, gradients: Sequence[Tensor]) -> Copies:
        """Copies of gradients into a room of the ranks that own them, from replica `begin` on."""
        width, item = self.width, self.dtype.itemsize
        sent = []
        for peer in self._peers[:-1].tolist():  # what this rank owns itself is read where it is
            left = 0  # column of the first of these gradients
            for part in gradients:
                start, end = max(peer * width, left), min((peer + 1) * width, left + part.shape[1])
                if start < end and len(part):
                    to = int(addresses[peer]) + item * (begin * width + start - peer * width)
                    origin = part.data_ptr() + item * (start - left)
                    sent.append((item * (end - start), len(part), to, item * width, origin, item * part.stride(0)))
                left += part.shape[1]
        return Copies(*np.array(sent, np.int64).reshape(-1, 6).T)

    def release(self) -> None:
        """Let go of the gradients that are sent, once the current stream waits until they are."""
        if self._held is not None:
            self.wait(self._held[1])
            self._held = None

    def wait(self, arrival: torch.cuda.Event | None) -> None:
        """Make the current stream wait until something is whole."""
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def _adding(self, dtype: torch.dtype, columns: int, stride: int, stride_after: int, scale: float) -> Launch:
        """The kernel that adds up to gradients of this type, of which so many columns are in the first tensor."""
        key = dtype, columns, stride, stride_after, scale
        if key not in self._add:
            self._add[key] = Launch(
                self._add_replicas, 8, EXPERTS=self.experts, RANKS=self.group.size, WIDTH=self.width, FIRST=columns,
                STRIDE=stride, STRIDE_AFTER=stride_after, DOUBLE=dtype == torch.float64, SCALE=scale,
                BLOCKS=self._blocks, PIECE=_PIECE,
            )  # fmt: skip
        return self._add[key]


class _Line:
    """Transfers of one kind, which follow one another on a stream of their own, and meetings of all ranks between."""

    def __init__(self, shared: SymmetricMemory, flags: Tensor, abort: Tensor, rank: int, limit_ns: int) -> None:
        from moeplan.runtime_client.device import signal_kernels  # which needs Triton

        device = flags.device
        # Before others, as few blocks of theirs keep other ranks waiting.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.meetings = 0
        state = torch.zeros(1, dtype=torch.int64, device=device)
        self._signals = (state, flags, abort, shared.peers, rank, limit_ns)
        self._launch = Launch(signal_kernels.meet, 1, RANKS=len(flags), LANES=lanes(len(flags)))

    def meet(self) -> None:
        """All ranks: what their kernels and copies on this line wrote before, all see after."""
        self._launch((1, 1, 1), *self._signals)
        self.meetings += 1

    def mark(self) -> torch.cuda.Event | None:
        """When what is queued on this line will be over; None on CPUs, where it is."""
        return None if self.stream is None else self.stream.record_event()


def _addresses(memory: SymmetricMemory, place: int = 0) -> Int64:
    """int64[ranks]: where what begins `place` bytes into each rank's memory is seen from here."""
    return memory.own.data_ptr() + place + UNIT * memory.peers.cpu().numpy()
