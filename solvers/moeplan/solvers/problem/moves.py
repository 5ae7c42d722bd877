"""Replicas to copy from one layout to another, and the renaming of devices that makes them fewest.

Devices of one node with equal slots, speed and memory are interchangeable, and so are nodes of equal devices. Renaming
them changes no load, so the renaming that keeps most replicas in place is a linear assignment: inside each pair of
nodes first, then of nodes to nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.linear_assignment import linear_assignment

__all__ = ["Moves", "keep_slots", "moves", "relabel", "rename"]


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Replicas that a layout needs on devices that do not hold them yet.

    Attributes:
        expert: int32[moves].
        device: int32[moves], where the replica is needed, ascending.
        source: int32[moves], a device that holds the expert now: in the same node if one does, and among equals the
            one that has been asked least.
    """

    expert: Int32
    device: Int32
    source: Int32

    def __len__(self) -> int:
        return len(self.expert)


def moves(current: Layout, new: Layout, cluster: Cluster) -> Moves:
    """The replicas to copy for going from `current` to `new`."""
    device, expert = np.nonzero(new.placed & ~current.placed)
    experts, devices = expert.astype(np.int32), device.astype(np.int32)
    hosts = current.hosts
    return Moves(experts, devices, _nearest_holder(experts, devices, hosts.start, hosts.device, cluster.node))


@kernel
def _nearest_holder(expert: Int32, device: Int32, start: Int32, holder: Int32, node: Int32) -> Int32:
    source = np.empty(len(expert), np.int32)
    asked = np.zeros(len(node), np.int64)
    for i in range(len(expert)):
        best = -1
        best_far = True
        for j in range(start[expert[i]], start[expert[i] + 1]):
            d = holder[j]
            far = node[d] != node[device[i]]
            if best < 0 or (best_far and not far) or (far == best_far and asked[d] < asked[best]):
                best, best_far = d, far
        source[i] = best
        asked[best] += 1
    return source


def relabel(current: Layout, slots: Int32, capacity: Int32, cluster: Cluster) -> Int32:
    """Rename interchangeable devices of a new layout so that the fewest replicas move.

    Args:
        current: Layout in force.
        slots: int32[devices, width], the new layout.
        capacity: int32[devices], replicas that each device can hold.
        cluster: The devices.

    Returns:
        int32[devices, width]: the rows of `slots`, permuted.
    """
    return rename(slots, _shared(slots, current.placed), capacity, cluster)


@kernel
def _shared(slots: Int32, placed: Bool) -> Float64:
    """float64[devices, devices]: replicas that rows of `slots` share with devices of bool[devices, experts]."""
    shared = np.zeros((len(slots), len(placed)))
    for d in range(len(slots)):
        for e in slots[d]:
            if e >= 0:
                for held in range(len(placed)):
                    shared[d, held] += placed[held, e]
    return shared


def rename(slots: Int32, gain: Float64, capacity: Int32, cluster: Cluster) -> Int32:
    """Rename interchangeable devices for the largest sum of gains, by linear assignment.

    Args:
        slots: int32[devices, width], a layout.
        gain: float64[devices, devices], what it is worth to give a row of `slots` (first axis) to a device (second).
        capacity: int32[devices], replicas that each device can hold.
        cluster: The devices.

    Returns:
        int32[devices, width]: the rows of `slots`, permuted.
    """
    impossible = -1e9 * (1 + np.abs(gain).max())
    kind = _kinds(capacity, cluster)
    nodes = [np.flatnonzero(cluster.node == n) for n in range(cluster.nodes)]
    kinds = [np.sort(kind[devices]).tobytes() for devices in nodes]
    allowed = np.where(kind[:, None] == kind, gain, impossible)
    total = np.full((len(nodes), len(nodes)), impossible)
    inner: dict[tuple[int, int], Int64] = {}
    for a, new in enumerate(nodes):
        of_new = allowed[new]
        for b, old in enumerate(nodes):
            if kinds[a] == kinds[b]:
                block = of_new[:, old]
                rows, columns = linear_assignment(block, maximize=True)
                total[a, b] = block[rows, columns].sum()
                inner[a, b] = old[columns]
    target = np.empty(cluster.devices, np.int64)
    for new_node, old_node in zip(*linear_assignment(total, maximize=True), strict=True):
        target[nodes[new_node]] = inner[int(new_node), int(old_node)]
    renamed = np.empty_like(slots)
    renamed[target] = slots
    return renamed


def _kinds(capacity: Int32, cluster: Cluster) -> Int64:
    """int64[devices]: devices of equal number are interchangeable inside a node."""
    memory = np.zeros(cluster.devices) if cluster.memory_bytes is None else cluster.memory_bytes
    properties = np.stack([capacity, cluster.slots, cluster.speed, memory], axis=1)
    kinds: Int64 = np.unique(properties, axis=0, return_inverse=True)[1].reshape(-1)
    return kinds


@kernel
def keep_slots(current: Int32, slots: Int32) -> None:
    """Reorder each device's slots in place, so that a replica that stays on its device keeps its slot."""
    devices, width = slots.shape
    for d in range(devices):
        for c in range(min(width, current.shape[1])):
            e = current[d, c]
            if e == EMPTY or slots[d, c] == e:
                continue
            for k in range(width):
                if slots[d, k] == e:
                    slots[d, k] = slots[d, c]
                    slots[d, c] = e
                    break
