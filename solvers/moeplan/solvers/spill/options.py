"""Means of a spill: homes, spare slots, link domains, speeds, memory, and the price of a transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int32, Int64, floats, integers
from moeplan.solvers.problem.cluster import MAX_DEVICES, MAX_SLOTS, Link, source_devices
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["MAX_TOTAL", "NO_CAP", "SpillOptions", "contiguous_home", "transfer_tokens"]

MAX_TOTAL = 2**46
"""Largest total of one layer's tokens: kernels pack a token count and a device number into one 64-bit word."""

MAX_TILE = 2**16
"""Largest tile of a grouped product."""

NO_CAP = MAX_TOTAL
"""Token cap of a device whose memory is no limit."""


@dataclass(frozen=True, slots=True, eq=False)
class SpillOptions:
    """The devices of one expert-parallel group and the limits of a spill. Time is counted in tokens at speed 1.

    Attributes:
        home: int32[experts], device that holds each expert's weights; devices may own different numbers of experts.
        spare: int32[devices], transient replicas that each device has buffers for (K).
        domain: int32[devices]; an expert is replicated only on devices of its home's domain (NVLink domain, node).
        node: int32[devices]; tokens prefer a replica on their own device, then on their own node.
        speed: float64[devices], relative tokens per second.
        token_cap: int64[devices], tokens that fit into the device's memory while it holds no transient replica;
            `NO_CAP` for no limit.
        replica_tokens: Tokens of `token_cap` whose memory one transient replica takes (its weights over the
            activation bytes of a token).
        transfer_tokens: Time that a device spends on receiving one replica, in tokens; see `transfer_tokens`.
        min_tokens: Fewest tokens worth a replica (a grouped GEMM below some size saves no time).
        tolerance: A plan within this fraction of the lower bound is good enough; looser needs fewer replicas.
        threshold: Spill nothing while max load / mean load of the homes is at most this (LLEP's lambda).
        tile_rows: Rows that a grouped product computes at a time. The tokens of an expert on a device count as rows
            rounded up to a multiple of it, in time and in `token_cap`; replicas get whole tiles, or an expert's last.

    Raises:
        ProblemError: a field is out of range, or the arrays differ in length.
    """

    home: Int32
    spare: Int32
    domain: Int32
    node: Int32
    speed: Float64
    token_cap: Int64
    replica_tokens: int = 0
    transfer_tokens: float = 0.0
    min_tokens: int = 1
    tolerance: float = 5e-4
    threshold: float = 1.0
    tile_rows: int = 1

    def __post_init__(self) -> None:
        for name, high in (("spare", MAX_SLOTS), ("domain", MAX_DEVICES), ("node", MAX_DEVICES)):
            values = integers(f"spill.{name}", getattr(self, name), ndim=1, dtype=np.int32, low=0, high=high)
            object.__setattr__(self, name, values)
        if not 1 <= self.devices <= MAX_DEVICES:
            raise ProblemError("spill.devices", self.devices, f"must be 1 to {MAX_DEVICES}")
        home = integers("spill.home", self.home, ndim=1, dtype=np.int32, low=0, high=self.devices - 1)
        object.__setattr__(self, "home", home)
        if self.experts == 0:
            raise ProblemError("spill.home", "no experts", "must name the home of at least one expert")
        object.__setattr__(self, "speed", floats("spill.speed", self.speed, ndim=1, positive=True))
        cap = integers("spill.token_cap", self.token_cap, ndim=1, low=0, high=NO_CAP)
        object.__setattr__(self, "token_cap", cap)
        for name in ("domain", "node", "speed", "token_cap"):
            length = len(getattr(self, name))
            if length != self.devices:
                raise ProblemError(f"spill.{name}", f"{length} values", f"must have one per device ({self.devices})")
        for name, low, limit in (("replica_tokens", 0, NO_CAP), ("min_tokens", 1, NO_CAP), ("tile_rows", 1, MAX_TILE)):
            value = getattr(self, name)
            if not low <= value <= limit:
                raise ProblemError(f"spill.{name}", value, f"must be {low} to {limit}")
        for name, least in (("transfer_tokens", 0.0), ("tolerance", 0.0), ("threshold", 1.0)):
            number = getattr(self, name)
            if not least <= number < float("inf"):
                raise ProblemError(f"spill.{name}", number, f"must be finite and at least {least:g}")

    @classmethod
    def uniform(
        cls,
        experts: int,
        devices: int,
        spare: int,
        *,
        domain: int | None = None,
        node: int | None = None,
        home: npt.ArrayLike | None = None,
        speed: npt.ArrayLike | None = None,
        token_cap: int | npt.ArrayLike = NO_CAP,
        replica_tokens: int = 0,
        transfer_tokens: float = 0.0,
        min_tokens: int = 1,
        tolerance: float = 5e-4,
        threshold: float = 1.0,
        tile_rows: int = 1,
    ) -> SpillOptions:
        """`devices` devices of `spare` spare slots each, with contiguous homes, domains and nodes.

        Args:
            experts: Number of experts; where `devices` does not divide it, earlier devices own one more.
            devices: Number of devices.
            spare: Spare slots of every device (K).
            domain: Devices per domain, the last of which may be smaller; by default all are one domain.
            node: Devices per node; by default the same as `domain`.
            home: int32[experts] if not contiguous.
            speed: One value per device; 1.0 each by default.
            token_cap: One value for all devices or one per device.
            replica_tokens: See the attribute; so are the following.
            transfer_tokens: Time of receiving one replica, in tokens.
            min_tokens: Fewest tokens of a replica.
            tolerance: Accepted distance from the lower bound, as a fraction.
            threshold: Imbalance of the homes up to which nothing is spilled.
            tile_rows: Rows that a grouped product computes at a time.

        Raises:
            ProblemError: a value is out of range.
        """
        for name, value, high in (("experts", experts, 2**31 - 1), ("devices", devices, MAX_DEVICES)):
            if not 1 <= value <= high:
                raise ProblemError(f"spill.{name}", value, f"must be 1 to {high}")
        if not 0 <= spare <= MAX_SLOTS:
            raise ProblemError("spill.spare", spare, f"must be 0 to {MAX_SLOTS}")
        domain = devices if domain is None else domain
        node = domain if node is None else node
        for name, value in (("domain", domain), ("node", node)):
            if not 1 <= value <= devices:
                raise ProblemError(f"spill.{name}", value, f"must be 1 to the number of devices ({devices})")
        every = np.arange(devices, dtype=np.int32)
        return cls(
            home=contiguous_home(experts, devices) if home is None else np.asarray(home),
            spare=np.full(devices, spare, np.int32),
            domain=every // np.int32(domain),
            node=every // np.int32(node),
            speed=np.ones(devices) if speed is None else np.asarray(speed, np.float64),
            token_cap=np.broadcast_to(np.asarray(token_cap), (devices,)),
            replica_tokens=replica_tokens,
            transfer_tokens=transfer_tokens,
            min_tokens=min_tokens,
            tolerance=tolerance,
            threshold=threshold,
            tile_rows=tile_rows,
        )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.home)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.spare)

    def source_device(self, sources: int) -> Int64:
        """int64[sources]: see `cluster.source_devices`."""
        return source_devices(sources, self.devices)


def contiguous_home(experts: int, devices: int) -> Int32:
    """int32[experts]: homes in order, as even as possible, earlier devices first with the larger share."""
    each, extra = divmod(experts, devices)
    home: Int32 = np.repeat(np.arange(devices, dtype=np.int32), each + (np.arange(devices) < extra))
    return home


def transfer_tokens(weight_bytes: int, link: Link, seconds_per_token: float) -> float:
    """Time of sending one expert over `link`, in tokens that a device of speed 1 computes meanwhile.

    Args:
        weight_bytes: Weights of one replica (and its returning gradients, if they are not overlapped).
        link: The link that replicas travel on, within a domain.
        seconds_per_token: Time of one token on a device of speed 1.

    Raises:
        ProblemError: a value is out of range.
    """
    if weight_bytes < 0:
        raise ProblemError("weight_bytes", weight_bytes, "must be at least 0")
    if not 0 < seconds_per_token < float("inf"):
        raise ProblemError("seconds_per_token", seconds_per_token, "must be finite and above 0")
    return (link.latency_s + weight_bytes / link.bytes_per_s) / seconds_per_token
