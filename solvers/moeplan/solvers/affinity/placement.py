"""Placing the experts of all layers so that tokens meet their next expert where they are.

Where tokens are not sent home between layers, what counts is how many go from an expert of one layer to an expert of
the next on another node (ExFlow, arXiv 2401.08383; MoETuner, arXiv 2502.06643). Every expert has one replica, and
every layer spreads its experts evenly over the devices.

- **Local search** (see `node_search`), for any size.
- **ILP** (see `node_model`), for small models: the same objective with a variable per pair of experts and node, by
  HiGHS. It proves the optimum where it ends in time, and otherwise a bound.

Without an ILP the bound is combinatorial: at most as many partners of an expert sit on its node as a node has seats, so
what stays is at most the sum of that many largest pairs of every expert, seen from either layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.solvers.affinity import node_model, node_search
from moeplan.solvers.affinity.kept import excess_load, most_kept, tokens_kept
from moeplan.solvers.construct.packing import pack, swap
from moeplan.solvers.problem.arrays import Float64, Int32, Int64, floats, integers
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout, even_shares

__all__ = ["AffinityPlan", "crossings", "place_by_affinity"]

ILP_SIZE = 4_000
"""Pairs of experts times nodes up to which an ILP is tried."""

ROUNDS = 1_000
"""Most exchanges between the devices of a node."""


@dataclass(frozen=True, slots=True, eq=False)
class AffinityPlan:
    """Layouts of all layers.

    Attributes:
        layouts: One layout per layer, one replica per expert.
        crossing: Transitions between consecutive layers that change the node (the device, where there is one node).
        bound: No such layouts have fewer crossings.
        total: All transitions.
    """

    layouts: tuple[Layout, ...]
    crossing: int
    bound: int
    total: int


def place_by_affinity(
    pairs: npt.ArrayLike,
    cluster: Cluster,
    *,
    loads: npt.ArrayLike | None = None,
    tolerance: float = 0.05,
    ilp_seconds: float = 10.0,
    seed: int = 0,
) -> AffinityPlan:
    """Place the experts of consecutive layers for the fewest transitions between nodes.

    Args:
        pairs: int[layers - 1, experts, experts], tokens that went from an expert to one of the next layer.
        cluster: Devices with at least ``experts / devices`` slots, rounded up.
        loads: float[layers, experts], tokens of each expert; those of `pairs` by default.
        tolerance: How far a node's load may exceed its share of the layer, as a fraction. Where even counts alone make
            more, the search lowers the load first and crossings after.
        ilp_seconds: Limit of the ILP on a small model.
        seed: Seed of the starts.

    Raises:
        ProblemError: shapes differ, a count is negative, or the experts do not fit.
    """
    moves = integers("pairs", pairs, ndim=3, low=0)
    layers, experts = len(moves) + 1, moves.shape[1]
    if moves.shape[1] != moves.shape[2] or not experts:
        raise ProblemError("pairs", f"array of shape {moves.shape}", "must be [layers - 1, experts, experts]")
    if experts > cluster.total_slots:
        raise ProblemError("cluster.slots", cluster.total_slots, f"must be at least the number of experts ({experts})")
    if tolerance < 0:
        raise ProblemError("tolerance", tolerance, "must be at least 0")
    weight = _loads_of(moves) if loads is None else floats("loads", loads, ndim=2)
    if weight.shape != (layers, experts):
        raise ProblemError("loads", f"array of shape {weight.shape}", f"must be [{layers} layers, {experts} experts]")
    share = even_shares(experts, cluster.slots)
    domain = cluster.node if cluster.nodes > 1 else np.arange(cluster.devices, dtype=np.int32)
    seats = np.bincount(domain, share).astype(np.int64)
    speed = np.bincount(domain, cluster.speed)
    caps = weight.sum(axis=1)[:, None] * (speed / speed.sum()) * (1 + tolerance)
    total, most = int(moves.sum()), most_kept(moves, int(seats.max()))
    node = node_search.search(moves, weight, caps, seats, seed)
    kept, excess = tokens_kept(moves, node), excess_load(weight, caps, node)
    if moves.size * len(seats) <= ILP_SIZE and (kept < most or excess > 0) and ilp_seconds > 0:
        found, proven = node_model.solve(moves, weight, caps, seats, ilp_seconds)
        most = min(most, proven)
        if found is not None and (excess_load(weight, caps, found), -tokens_kept(moves, found)) < (excess, -kept):
            node, kept = found, tokens_kept(moves, found)
    layouts = tuple(_on_devices(weight[layer], node[layer], domain, share, cluster) for layer in range(layers))
    return AffinityPlan(layouts, total - kept, min(total - most, total - kept), total)


def crossings(pairs: Int64, cluster: Cluster, layouts: Sequence[Layout]) -> int:
    """Transitions that change the node (the device, where there is one node), for layouts of one replica per expert.

    Args:
        pairs: int64[layers - 1, experts, experts].
        cluster: The devices.
        layouts: One per layer.
    """
    domain = cluster.node if cluster.nodes > 1 else np.arange(cluster.devices, dtype=np.int32)
    return int(pairs.sum()) - tokens_kept(pairs, np.stack([domain[layout.hosts.device] for layout in layouts]))


def _loads_of(moves: Int64) -> Float64:
    """float64[layers, experts]: tokens by what leaves each expert, or what arrives at the last layer's."""
    if not len(moves):
        return np.zeros((1, moves.shape[1]))
    return np.concatenate([moves.sum(axis=2), moves[-1:].sum(axis=1)]).astype(np.float64)


def _on_devices(weight: Float64, node: Int32, domain: Int32, share: Int32, cluster: Cluster) -> Layout:
    """A layer's layout: the experts of each node over its devices, heaviest first, then exchanges."""
    slots = np.full((cluster.devices, max(1, cluster.max_slots)), -1, np.int32)
    for n in range(int(domain.max()) + 1):
        devices, members = np.flatnonzero(domain == n), np.flatnonzero(node == n)
        if not len(members):
            continue
        loads, speed = weight[members], cluster.speed[devices]
        placed = pack(loads, np.ones(len(members), np.int32), share[devices], speed, NEVER)
        swap(placed, loads, speed, ROUNDS, NEVER)
        slots[devices, : placed.shape[1]] = np.where(placed < 0, -1, members[placed])
    return Layout(slots, len(weight))
