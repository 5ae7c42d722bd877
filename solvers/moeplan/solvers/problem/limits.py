"""A problem's limits on a layout as arrays, which every search and model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Int32, Int64
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["NO_LIMIT", "Limits", "broken", "few"]

NO_LIMIT = 2**53
"""More arrivals than there can be."""


@dataclass(frozen=True, eq=False)
class Limits:
    """Limits of a layout beyond the capacity of its devices.

    An **arrival** is a replica on a device that does not hold it now; it is **far** if no device of its node does. A
    **unit** is a set of experts whose replicas share a **region** of devices.

    Attributes:
        capacity: int32[devices], most replicas on each device.
        may: bool[devices, experts], pairs that are allowed.
        must: bool[devices, experts], pairs that are required.
        most: int32[experts], most replicas of each expert.
        held: bool[devices, experts], replicas of the layout in force.
        node: int32[devices].
        max_arrivals: Most arrivals.
        device_arrivals: int64[devices], most arrivals at each device.
        node_arrivals: int64[nodes], most far arrivals at each node.
        far: bool[devices, experts], pairs whose node does not hold the expert now.
        unit: int32[experts], 0..units-1, each of equal size.
        region: int32[devices], 0..regions-1; all 0 where units may be anywhere.
    """

    capacity: Int32
    may: Bool
    must: Bool
    most: Int32
    held: Bool
    node: Int32
    max_arrivals: int
    device_arrivals: Int64
    node_arrivals: Int64
    far: Bool
    unit: Int32
    region: Int32

    @cached_property
    def regions(self) -> int:
        """Number of regions."""
        return int(self.region.max()) + 1

    @cached_property
    def free(self) -> bool:
        """True if any device may hold any expert, as often as it has slots."""
        everywhere = bool(self.may.all()) and not self.must.any() and self.regions == 1
        return everywhere and bool((self.most >= len(self.may)).all())

    @cached_property
    def simple(self) -> bool:
        """True if `max_moves` is the only limit there may be."""
        return self.free and min(int(self.device_arrivals.min()), int(self.node_arrivals.min())) >= NO_LIMIT

    @cached_property
    def moves_limited(self) -> bool:
        """True if any limit of arrivals is set."""
        least = min(self.max_arrivals, int(self.device_arrivals.min()), int(self.node_arrivals.min()))
        return least < NO_LIMIT

    @cached_property
    def none(self) -> bool:
        """True if nothing but the capacity of its devices limits a layout."""
        return self.free and not self.moves_limited

    def arrival_limits(self) -> Iterator[tuple[int, Bool]]:
        """Each limit of arrivals, and the pairs that count for it, bool[devices, experts]."""
        arriving = ~self.held
        yield self.max_arrivals, arriving
        for d, limit in enumerate(self.device_arrivals.tolist()):
            yield limit, arriving & (np.arange(len(self.may)) == d)[:, None]
        for n, limit in enumerate(self.node_arrivals.tolist()):
            yield limit, self.far & (self.node == n)[:, None]

    def narrowed(self, region: Int32) -> Limits:
        """The same limits with every unit in its given region, int32[units], so that `may` says it all."""
        here = self.region[:, None] == region[self.unit]
        return replace(self, may=self.may & here, region=np.zeros_like(self.region))

    def part(self, devices: Int64, experts: Int32, placed: Bool) -> Limits:
        """The limits for placing some experts on some devices while the others, in `placed`, stay as they are.

        Args:
            devices: int64[few], the devices to place on.
            experts: int32[some], the experts to place there.
            placed: bool[devices, experts], the whole layout.
        """
        outside = placed.copy()
        outside[devices] = False
        arriving = outside & ~self.held
        distant = np.bincount(self.node, (arriving & self.far).sum(axis=1), len(self.node_arrivals)).astype(np.int64)
        block = np.ix_(devices, experts)
        return replace(
            self,
            capacity=self.capacity[devices],
            may=self.may[block],
            must=self.must[block],
            most=(self.most[experts] - outside[:, experts].sum(axis=0)).astype(np.int32),
            held=self.held[block],
            node=self.node[devices],
            max_arrivals=self.max_arrivals - int(arriving.sum()),
            device_arrivals=self.device_arrivals[devices],
            node_arrivals=self.node_arrivals - distant,
            far=self.far[block],  # of the whole nodes: a part of the devices does not show what the rest holds
            unit=np.arange(len(experts), dtype=np.int32),
            region=np.zeros(len(devices), np.int32),
        )


def broken(limits: Limits, placed: Bool) -> ProblemError | None:
    """The first limit that a layout, bool[devices, experts], does not respect; None if it respects all."""
    if limits.none:
        return None
    for table, name, says in (
        (placed & ~limits.may, "forbidden", "may not be there"),
        (limits.must & ~placed, "pinned", "must be there"),
    ):
        if table.any():
            device, expert = (int(i) for i in np.argwhere(table)[0])
            return ProblemError("layout", f"expert {expert} on device {device}", f"{says} (constraints.{name})")
    replicas = placed.sum(axis=0)
    if (replicas > limits.most).any():
        expert = int(np.argmax(replicas > limits.most))
        reason = f"may have {limits.most[expert]} (constraints.min_tokens)"
        return ProblemError("layout", f"{replicas[expert]} replicas of expert {expert}", reason)
    arriving = placed & ~limits.held
    if arriving.sum() > limits.max_arrivals:
        return ProblemError("layout", f"{arriving.sum()} replicas to load", f"max_moves is {limits.max_arrivals}")
    over = arriving.sum(axis=1) > limits.device_arrivals
    if over.any():
        d = int(np.argmax(over))
        reason = f"may receive {limits.device_arrivals[d]} (constraints.device_move_bytes)"
        return ProblemError("layout", f"{arriving[d].sum()} replicas to load on device {d}", reason)
    far = np.bincount(limits.node, (arriving & limits.far).sum(axis=1), len(limits.node_arrivals))
    if (far > limits.node_arrivals).any():
        n = int(np.argmax(far > limits.node_arrivals))
        reason = f"may receive {limits.node_arrivals[n]} (constraints.node_move_bytes)"
        return ProblemError("layout", f"{far[n]:.0f} replicas from other nodes to load on node {n}", reason)
    if limits.regions > 1:
        of_unit = np.zeros((limits.regions, int(limits.unit.max()) + 1), np.bool_)
        for r in range(limits.regions):
            of_unit[r, limits.unit[placed[limits.region == r].any(axis=0)]] = True
        if (of_unit.sum(axis=0) > 1).any():
            u = int(np.argmax(of_unit.sum(axis=0) > 1))
            members = np.flatnonzero(limits.unit == u).tolist()
            reason = "must stay within one (constraints.domain, constraints.groups_on_node)"
            where = np.flatnonzero(of_unit[:, u]).tolist()
            return ProblemError("layout", f"experts {few(members)} in regions {where}", reason)
    return None


def few(numbers: list[int]) -> str:
    """A list for an error message, cut where it is long."""
    return str(numbers) if len(numbers) <= 8 else f"{str(numbers[:8])[:-1]}, ... {len(numbers)} in all]"
