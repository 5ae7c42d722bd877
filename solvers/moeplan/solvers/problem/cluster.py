"""The machines: devices, their slots, speeds, memories and links."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int32, Int64, any_array, floats, integers
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.scalars import integer, number

__all__ = ["Cluster", "Link", "source_devices"]

MAX_DEVICES = 65_536
MAX_SLOTS = 65_536
MIN_SPEED, MAX_SPEED = 1e-30, 1e30
"""Beyond them sums of speeds, or times of 2^53 tokens, may be no doubles."""
MIN_BYTES_PER_S, MAX_LATENCY_S = 1e-30, 1e30
"""Beyond them times of messages may be no doubles."""
MAX_SPEED_RATIO = 1e6
"""Of the fastest device to the slowest: exact solvers count in whole numbers, in which the share of a device that is
slower by much more is lost."""


@dataclass(frozen=True, slots=True)
class Link:
    """One class of links, in the alpha-beta model: a message of n bytes takes ``latency_s + n / bytes_per_s``.

    Attributes:
        bytes_per_s: Bandwidth in one direction, at least 1e-30; infinity makes the link free.
        latency_s: Time of an empty message, at most 1e30.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not number("link.bytes_per_s", self.bytes_per_s) >= MIN_BYTES_PER_S:
            raise ProblemError(
                "link.bytes_per_s", self.bytes_per_s, f"must be at least {MIN_BYTES_PER_S:g} (infinity is allowed)"
            )
        if not 0 <= number("link.latency_s", self.latency_s) <= MAX_LATENCY_S:
            raise ProblemError("link.latency_s", self.latency_s, f"must be 0 to {MAX_LATENCY_S:g}; give seconds")


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """Devices that host expert replicas. Device indices are the ranks of the expert-parallel group.

    Attributes:
        slots: int32[devices], replicas that each device can hold; may differ between devices, may be 0.
        node: int32[devices], node of each device, 0..nodes-1.
        speed: float64[devices], relative tokens per second, 1e-30 to 1e30 and within a factor of 1e6 of each other;
            1.0 is a device that runs at ``ExpertSpec.seconds_per_token``.
        memory_bytes: int64[devices] available for experts, or None where memory is no limit.
        intra_node: Link between two devices of one node.
        inter_node: Link between two devices of different nodes.

    Raises:
        ProblemError: a field is out of range, or the arrays differ in length.
    """

    slots: Int32
    node: Int32
    speed: Float64
    memory_bytes: Int64 | None = None
    intra_node: Link = field(default=Link(400e9))
    inter_node: Link = field(default=Link(50e9))

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(
            self,
            "slots",
            integers("cluster.slots", self.slots, ndim=1, dtype=np.int32, low=0, high=MAX_SLOTS),
        )
        if not 1 <= self.devices <= MAX_DEVICES:
            raise ProblemError("cluster.devices", self.devices, f"must be 1 to {MAX_DEVICES}")
        set_(self, "node", integers("cluster.node", self.node, ndim=1, dtype=np.int32, low=0))
        set_(self, "speed", floats("cluster.speed", self.speed, ndim=1, positive=True))
        if self.memory_bytes is not None:
            set_(self, "memory_bytes", integers("cluster.memory_bytes", self.memory_bytes, ndim=1, low=0))
        for name in ("node", "speed", "memory_bytes"):
            values = getattr(self, name)
            if values is not None and len(values) != self.devices:
                raise ProblemError(
                    f"cluster.{name}", f"{len(values)} values", f"must have one per device ({self.devices})"
                )
        if len(np.unique(self.node)) != self.nodes:
            raise ProblemError("cluster.node", np.unique(self.node).tolist(), "must use every number from 0 upward")
        _check_speeds(self.speed)

    @classmethod
    def uniform(
        cls,
        devices: int,
        slots: int,
        *,
        nodes: int = 1,
        speed: npt.ArrayLike | None = None,
        memory_bytes: int | npt.ArrayLike | None = None,
        intra_node: Link = Link(400e9),
        inter_node: Link = Link(50e9),
    ) -> Cluster:
        """`devices` devices of `slots` slots each, in `nodes` contiguous blocks as equal as possible.

        Args:
            devices: Number of devices.
            slots: Slots per device.
            nodes: Number of nodes; `devices` need not be a multiple of it.
            speed: One value per device; 1.0 each by default.
            memory_bytes: One value for all devices or one per device; unlimited by default.
            intra_node: Link inside a node.
            inter_node: Link between nodes.

        Raises:
            ProblemError: a value is out of range.
        """
        devices = integer("cluster.devices", devices, 1, MAX_DEVICES)
        slots = integer("cluster.slots", slots, 0, MAX_SLOTS)
        if integer("cluster.nodes", nodes, 1) > devices:
            raise ProblemError("cluster.nodes", nodes, f"must be 1 to the number of devices ({devices})")
        memory = None if memory_bytes is None else any_array("cluster.memory_bytes", memory_bytes)
        if memory is not None and memory.ndim == 0:
            memory = np.repeat(memory, devices)
        return cls(
            slots=np.full(devices, slots, np.int32),
            node=np.arange(devices, dtype=np.int64).astype(np.int32) * nodes // devices,
            speed=floats("cluster.speed", np.ones(devices) if speed is None else speed, ndim=1),
            memory_bytes=memory,
            intra_node=intra_node,
            inter_node=inter_node,
        )

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.slots)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return int(self.node.max()) + 1

    @property
    def total_slots(self) -> int:
        """Slots of all devices together."""
        return int(self.slots.sum())

    @property
    def max_slots(self) -> int:
        """Slots of the largest device: the width of a layout."""
        return int(self.slots.max())


def _check_speeds(speed: Float64) -> None:
    slowest, fastest = int(speed.argmin()), int(speed.argmax())
    for device in (slowest, fastest):
        if not MIN_SPEED <= speed[device] <= MAX_SPEED:
            raise ProblemError(
                f"cluster.speed[{device}]",
                float(speed[device]),
                f"must be {MIN_SPEED:g} to {MAX_SPEED:g}; give speeds relative to a usual device's, which has 1",
            )
    if speed[fastest] > MAX_SPEED_RATIO * speed[slowest]:
        raise ProblemError(
            f"cluster.speed[{slowest}]",
            float(speed[slowest]),
            f"must be at least 1 / {MAX_SPEED_RATIO:g} of the fastest device's ({speed[fastest]:g}, of device "
            f"{fastest}); give one that shall get nothing no slots",
        )


def source_devices(sources: int, devices: int) -> Int64:
    """int64[sources]: device whose tokens a source holds: itself, or contiguous blocks where the numbers differ."""
    return np.arange(sources, dtype=np.int64) * devices // sources
