"""From what a problem says to the arrays of its limits."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.contradictions import check_contradictions
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.limits import NO_LIMIT, Limits

__all__ = ["compile_limits"]


def compile_limits(
    cluster: Cluster,
    capacity: Int32,
    constraints: Constraints,
    *,
    mean_load: Float64,
    groups: int = 1,
    weight_bytes: int = 0,
    current: Layout | None = None,
    max_moves: int | None = None,
) -> Limits:
    """Compile the limits on a layout.

    Args:
        cluster: Devices and nodes.
        capacity: int32[devices], replicas that each device can hold.
        constraints: Limits that the user asked for.
        mean_load: float64[experts], tokens of each expert.
        groups: Groups of consecutive experts.
        weight_bytes: Size of a replica that moves.
        current: Layout in force, from which arrivals count.
        max_moves: Most arrivals in all.

    Raises:
        ProblemError: a constraint names what the problem does not have.
        InfeasibleError: constraints contradict each other or the slots.
    """
    experts = len(mean_load)
    limits = _unlimited(cluster, experts, capacity.tobytes())
    if current is not None:
        held = current.placed
        most = NO_LIMIT if max_moves is None else max_moves
        limits = replace(limits, held=held, far=_far(current, cluster), max_arrivals=most)
    if constraints.names:
        limits = _constrained(limits, cluster, constraints, mean_load)
        unit, region = _units(cluster, constraints, experts, groups)
        to_device = _replicas(constraints, "device_move_bytes", weight_bytes, current)
        to_node = _replicas(constraints, "node_move_bytes", weight_bytes, current)
        limits = replace(
            limits,
            device_arrivals=np.full(cluster.devices, to_device),
            node_arrivals=np.full(cluster.nodes, to_node),
            unit=unit,
            region=region,
        )
    check_contradictions(limits, capacity, lost=current is not None)
    return limits


@lru_cache(maxsize=8)
def _unlimited(cluster: Cluster, experts: int, room: bytes) -> Limits:
    """No limit but that some devices hold nothing. Layers share it: to make it takes as long as a small solve."""
    devices = cluster.devices
    capacity = np.frombuffer(room, np.int32)
    return Limits(
        capacity=capacity,
        may=np.repeat(capacity[:, None] > 0, experts, axis=1),
        must=np.zeros((devices, experts), np.bool_),
        most=np.full(experts, devices, np.int32),
        held=np.zeros((devices, experts), np.bool_),
        node=cluster.node,
        max_arrivals=NO_LIMIT,
        device_arrivals=np.full(devices, NO_LIMIT),
        node_arrivals=np.full(cluster.nodes, NO_LIMIT),
        far=np.ones((devices, experts), np.bool_),
        unit=np.arange(experts, dtype=np.int32),
        region=np.zeros(devices, np.int32),
    )


def _far(current: Layout, cluster: Cluster) -> Bool:
    """bool[devices, experts]: pairs whose node does not hold the expert now."""
    by_node = np.zeros((cluster.nodes, current.experts), np.bool_)
    device, slot = np.nonzero(current.slots != EMPTY)
    by_node[cluster.node[device], current.slots[device, slot]] = True
    far: Bool = ~by_node[cluster.node]
    return far


def _constrained(limits: Limits, cluster: Cluster, constraints: Constraints, mean_load: Float64) -> Limits:
    """`limits` with pairs that are forbidden or pinned, and with replicas that are worth their tokens."""
    devices, experts = limits.may.shape
    may, must, most = limits.may.copy(), limits.must.copy(), limits.most
    for name, table, value in (("forbidden", may, False), ("pinned", must, True)):
        pairs = getattr(constraints, name)
        for i, (expert, device) in enumerate(pairs.tolist()):
            if not 0 <= expert < experts or not 0 <= device < devices:
                raise ProblemError(
                    f"constraints.{name}[{i}]",
                    f"expert {expert}, device {device}",
                    f"must be 0..{experts - 1} and 0..{devices - 1}",
                )
        table[pairs[:, 1], pairs[:, 0]] = value
    if constraints.min_tokens:
        most = np.clip(mean_load // constraints.min_tokens, 1, devices).astype(np.int32)
    return replace(limits, may=may, must=must, most=most)


def _replicas(constraints: Constraints, name: str, weight_bytes: int, current: Layout | None) -> int:
    """A budget of bytes as replicas."""
    budget: int | None = getattr(constraints, name)
    if budget is None:
        return NO_LIMIT
    if current is None:
        raise ProblemError(f"constraints.{name}", budget, "needs `current`, the layout that moves start from")
    if weight_bytes == 0:
        raise ProblemError(f"constraints.{name}", budget, "needs expert.weight_bytes, the size of a replica")
    return int(budget // weight_bytes)


def _units(cluster: Cluster, constraints: Constraints, experts: int, groups: int) -> tuple[Int32, Int32]:
    """`Limits.unit` and `Limits.region`."""
    unit = np.arange(experts, dtype=np.int32)
    region = np.zeros(cluster.devices, np.int32)
    if constraints.domain is not None:
        if len(constraints.domain) != cluster.devices:
            raise ProblemError(
                "constraints.domain",
                f"{len(constraints.domain)} values",
                f"must have one per device ({cluster.devices})",
            )
        region = np.unique(constraints.domain, return_inverse=True)[1].reshape(-1).astype(np.int32)
    if constraints.groups_on_node:
        if groups == 1:
            raise ProblemError("constraints.groups_on_node", True, "needs `groups`, the number of expert groups")
        for node in range(cluster.nodes):
            inside = np.unique(region[cluster.node == node])
            if len(inside) > 1:
                raise ProblemError(
                    "constraints.domain", f"{len(inside)} domains in node {node}", "a node must lie within one domain"
                )
        return (unit // (experts // groups)).astype(np.int32), cluster.node
    return unit, region
