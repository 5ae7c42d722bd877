"""Replicas lent for single passes beyond a layout: what the layout, planned ahead, did not foresee."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Protocol, Self

import numpy as np

from moeplan.runtime_client.layers.dividing import Division, of_rank
from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.solvers import SpillOptions, SpillPlan
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.layout import EMPTY, Layout

__all__ = [
    "MovableSpillPlanner",
    "SpillPlanner",
    "SpilledPass",
    "Spilling",
    "planner_fingerprint",
    "require_movable",
    "require_passes",
    "require_speed",
]


class SpillPlanner(Protocol):
    """A planner of micro-batches: `QuotaPlanner` or `LlepPlanner`, or anything that is as deterministic.

    One whose plans depend on more than options and counts says on what in a tuple `settings`, so that ranks that differ
    in it are refused.
    """

    options: SpillOptions

    def plan(self, counts: Int64) -> SpillPlan:
        """The plan for known counts int64[sources, experts]; the same on every rank."""
        ...


class MovableSpillPlanner(SpillPlanner, Protocol):
    """A planner for experts whose homes move."""

    def with_home(self, home: Int32) -> Self:
        """A planner that differs in the homes only."""
        ...


def require_passes(planner: SpillPlanner, ranks: int) -> None:
    """Refuse a planner that cannot plan the passes of a group of `ranks`.

    Raises:
        ValueError: it was made for another number of devices or sources, or for counts of another type.
    """
    kind, devices = type(planner).__name__, planner.options.devices
    if devices != ranks:
        raise ValueError(f"planner.options.devices = {devices}: the group has {ranks} ranks")
    sources = getattr(planner, "sources", ranks)
    if sources != ranks:
        raise ValueError(
            f"planner.sources = {sources}: the group has {ranks} ranks, which all route tokens; write "
            f"{kind}(options, {ranks})"
        )
    dtype = getattr(planner, "dtype", np.int64)
    if dtype != np.int64:
        raise ValueError(f"planner.dtype = {dtype}: passes count in int64; write {kind}(options, {ranks})")


def require_movable(planner: SpillPlanner) -> None:
    """Refuse a planner whose homes are for ever.

    Raises:
        TypeError: they are.
    """
    if not hasattr(planner, "with_home"):
        raise TypeError(
            f"planner = a {type(planner).__name__}: has no with_home(home), which makes a planner that differs in the "
            "homes only; QuotaPlanner and LlepPlanner have it"
        )


def require_speed(planner: SpillPlanner, cluster: Cluster) -> None:
    """Refuse a planner that takes other ranks to be fast than the cluster by which a layout is planned and divided.

    Raises:
        ValueError: it does.
    """
    own, other = planner.options.speed, cluster.speed
    if not np.allclose(own * other[0], other * own[0], rtol=1e-9, atol=0):
        raise ValueError(
            f"planner.options.speed = {own.tolist()}: layouts are planned, and their tokens divided, for cluster.speed "
            f"= {other.tolist()}. Give the planner the same:\n"
            f"    SpillOptions.uniform(experts, {len(own)}, spare, speed=cluster.speed)\n"
            "or the cluster, to the layer and to PlannerSession(cluster=)"
        )


def planner_fingerprint(planner: SpillPlanner) -> int:
    """Equal on ranks whose planners plan alike, and hardly on others: they would plan other passes."""
    kind = type(planner).__name__, getattr(planner, "settings", ())
    return fingerprint(repr(kind).encode()) ^ _options_fingerprint(planner.options)


@lru_cache(256)
def _options_fingerprint(options: SpillOptions) -> int:
    values = (getattr(options, field.name) for field in fields(options))
    return fingerprint(*(each.tobytes() if isinstance(each, np.ndarray) else repr(each).encode() for each in values))


@dataclass(frozen=True, eq=False)
class SpilledPass:
    """One pass: a layout with what is lent beyond it, and the tokens of one rank.

    Attributes:
        slots: int32[devices, width], slots of the layout, then replicas lent; -1 where a slot is empty.
        send: int64[devices, width], tokens from this rank to each slot.
        receive: int64[sources, width], tokens from each source to the slots of this rank.
        loads: int64[devices], tokens that each rank computes.
    """

    slots: Int32
    send: Int64
    receive: Int64
    loads: Int64


class Spilling:
    """Lends replicas beyond a layout.

    The layout's replicas get their tokens by its division, as without lending. Then each of them is taken for an expert
    at home on its device, with those tokens, and a planner of micro-batches spills from them.

    Args:
        planner: Has the spare slots, domains and prices; its homes are not used.
        layout: Replicas that are there in every pass.
        division: How tokens are divided among them.
    """

    def __init__(self, planner: MovableSpillPlanner, layout: Layout, division: Division) -> None:
        self.planner, self.layout, self.division = planner, layout, division
        hosts = layout.hosts
        self._expert = np.repeat(np.arange(layout.experts), np.diff(hosts.start))
        self._homes = planner.with_home(hosts.device)
        self._slot = np.full((layout.devices, layout.experts), EMPTY, np.int64)
        self._slot[hosts.device, self._expert] = hosts.slot

    def plan(self, counts: Int64, rank: int) -> SpilledPass:
        """The pass of a rank with counts, int64[ranks, experts], which every rank plans alike.

        Raises:
            InfeasibleError: no plan keeps every rank within its token cap.
        """
        plan = self._homes.plan(self.division.sent(self.layout, counts)).require_feasible()
        hosts, (devices, width) = self.layout.hosts, self.layout.slots.shape
        device, expert = plan.device, self._expert[plan.expert]
        slot = self._slot[device, expert]
        # Several replicas may lend to one device what is one expert, or what its layout has there.
        new = slot == EMPTY
        lent, which = np.unique(device[new] * self.layout.experts + expert[new], return_inverse=True)
        to, what = np.divmod(lent, self.layout.experts)
        each = np.bincount(to, minlength=devices)
        place = width + np.arange(len(lent)) - (np.cumsum(each) - each)[to]
        slot[new] = place[which]

        slots = np.full((devices, width + int(each.max(initial=0))), EMPTY, np.int32)
        slots[:, :width] = self.layout.slots
        slots[to, place] = what
        sent = np.concatenate([plan.kept, plan.sent], axis=1)
        devices_of, slots_of = np.concatenate([hosts.device, device]), np.concatenate([hosts.slot, slot])
        send, receive = of_rank(sent, devices_of.astype(np.int32), slots_of.astype(np.int32), slots.shape[1], rank)
        return SpilledPass(slots, send, receive, plan.load.copy())
