"""Which expert sits in which slot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Bool, Int32, integers
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import integer

__all__ = ["EMPTY", "Hosts", "Layout", "check_layout", "placed_in"]

EMPTY = -1
"""Content of a slot that holds no replica."""


@dataclass(frozen=True, slots=True, eq=False)
class Hosts:
    """The replicas of a layout, expert by expert (compressed rows).

    Attributes:
        start: int32[experts + 1]; the replicas of expert e are ``start[e]:start[e + 1]``.
        device: int32[replicas], ascending within an expert.
        slot: int32[replicas], slot of the replica on its device.
    """

    start: Int32
    device: Int32
    slot: Int32


@dataclass(frozen=True, eq=False)
class Layout:
    """An assignment of experts to slots.

    Attributes:
        slots: int32[devices, width], expert in each slot, -1 for an empty one.
        experts: Number of experts; each has at least one replica.

    Raises:
        ProblemError: an id is out of range, an expert has no replica, or a device holds two replicas of one expert.
    """

    slots: Int32
    experts: int

    def __post_init__(self) -> None:
        slots = integers("layout.slots", self.slots, ndim=2, dtype=np.int32)
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "experts", integer("layout.experts", self.experts, 0))
        if self.experts > slots.size:  # said before memory is taken for each: a wrong number may be huge
            raise ProblemError("layout.experts", self.experts, f"must be at most the number of slots ({slots.size})")
        missing = _check_table(slots, self.experts)
        if missing is not None:
            raise ProblemError("layout.slots", f"no slot with expert {missing}", "every expert needs a replica")

    @classmethod
    def contiguous(cls, experts: int, slots: npt.ArrayLike) -> Layout:
        """Experts in order over devices of `slots` slots each, as evenly as the slots allow: expert parallelism.

        With equal devices and `experts` a multiple of them this is ``expert // (experts / devices)``.

        Args:
            experts: Number of experts.
            slots: int32[devices], slots per device.

        Raises:
            ProblemError: there are fewer slots than experts.
        """
        capacity = integers("cluster.slots", slots, ndim=1, dtype=np.int32, low=0)
        experts = integer("layout.experts", experts, 0)
        if experts > capacity.sum():
            raise ProblemError("layout.experts", experts, f"must be at most the number of slots ({capacity.sum()})")
        shares = even_shares(experts, capacity)
        width = max(1, int(capacity.max()))
        table = np.full((len(capacity), width), EMPTY, np.int32)
        start = 0
        for device, share in enumerate(shares):
            table[device, :share] = np.arange(start, start + share)
            start += share
        return cls.trusted(table, experts)

    @classmethod
    def partial(cls, slots: npt.ArrayLike, experts: int) -> Layout:
        """A layout in force that may lack experts, which were lost with their devices.

        Args:
            slots: int32[devices, width], expert in each slot, -1 for an empty one.
            experts: Number of experts.

        Raises:
            ProblemError: an id is out of range, or a device holds two replicas of one expert.
        """
        table = integers("layout.slots", slots, ndim=2, dtype=np.int32)
        experts = integer("layout.experts", experts, 0)
        _check_table(table, experts)
        return cls.trusted(table, experts)

    @classmethod
    def trusted(cls, slots: Int32, experts: int) -> Layout:
        """A layout that is not checked: correct by construction, or checked before it was stored."""
        layout = object.__new__(cls)
        frozen = np.array(slots, np.int32, order="C")
        frozen.flags.writeable = False
        object.__setattr__(layout, "slots", frozen)
        object.__setattr__(layout, "experts", experts)
        return layout

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.slots.shape[0]

    @cached_property
    def hosts(self) -> Hosts:
        """The replicas, expert by expert."""
        from moeplan.solvers.problem.layout_kernels import hosts

        return Hosts(*hosts(self.slots, self.experts))

    @cached_property
    def replicas(self) -> Int32:
        """int32[experts]: number of replicas of each expert."""
        counts: Int32 = np.diff(self.hosts.start)
        return counts

    @cached_property
    def placed(self) -> Bool:
        """bool[devices, experts]: whether a device holds a replica of an expert."""
        return placed_in(self.slots, self.experts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.experts == other.experts and np.array_equal(self.slots, other.slots)

    def __hash__(self) -> int:
        return hash((self.experts, self.slots.tobytes()))


def check_layout(field: str, layout: Layout, experts: int, slots: Int32) -> None:
    """Check that a layout suits its experts and devices.

    Args:
        field: What errors call it.
        layout: The layout.
        experts: Experts that it must be of.
        slots: int32[devices], replicas that each device can hold.

    Raises:
        ProblemError: it is of other experts or devices, or a device holds more replicas than it has slots.
    """
    if layout.experts != experts:
        raise ProblemError(f"{field}.experts", layout.experts, f"must be {experts}")
    if layout.devices != len(slots):
        raise ProblemError(f"{field}.devices", layout.devices, f"the cluster has {len(slots)} devices")
    used = (layout.slots != EMPTY).sum(axis=1)
    over = np.flatnonzero(used > slots)
    if len(over):
        device = int(over[0])
        raise ProblemError(f"{field}.slots[{device}]", f"{used[device]} replicas", f"has {slots[device]} slots")


def _check_table(slots: Int32, experts: int) -> int | None:
    """The first expert without a slot, None if every one has one; refuses what no table may hold."""
    from moeplan.solvers.problem.layout_kernels import (  # the compiler loads slowly
        MISSING,
        RANGE,
        TWICE,
        first_fault,
    )

    fault, where = first_fault(slots, experts)
    if fault in (RANGE, TWICE):
        device, slot = divmod(where, slots.shape[1])
        if fault == RANGE:
            raise ProblemError(
                f"layout.slots[{device}, {slot}]", int(slots[device, slot]), f"must be -1 or 0..{experts - 1}"
            )
        raise ProblemError(
            f"layout.slots[{device}]", slots[device].tolist(), f"holds expert {slots[device, slot]} twice"
        )
    return where if fault == MISSING else None


def placed_in(slots: Int32, experts: int) -> Bool:
    """bool[devices, experts]: what a table, int32[devices, width], holds where; it need not be a valid layout."""
    placed = np.zeros((len(slots), experts), np.bool_)
    device, slot = np.nonzero(slots != EMPTY)
    placed[device, slots[device, slot]] = True
    return placed


def even_shares(experts: int, capacity: Int32) -> Int32:
    """int32[devices]: how many of `experts` items each device gets, as even as `capacity` allows.

    Earlier devices get the larger shares. The caller ensures ``experts <= capacity.sum()``.
    """
    shares = np.zeros(len(capacity), np.int32)
    left = experts
    while left:
        open_devices = np.flatnonzero(shares < capacity)
        each, extra = divmod(left, len(open_devices))
        grant = np.minimum(each + (np.arange(len(open_devices)) < extra), capacity[open_devices] - shares[open_devices])
        shares[open_devices] += grant.astype(np.int32)
        left -= int(grant.sum())
    return shares
