"""Placing the experts of all layers so that tokens meet their next expert where they are.

Where tokens are not sent home between layers, what counts is how many go from an expert of one layer to an expert of
the next on another node (ExFlow, arXiv 2401.08383; MoETuner, arXiv 2502.06643). Every expert has one replica, and
every layer spreads its experts evenly over the devices.

- **Local search**, for any size. With its neighbours fixed, a layer is a linear assignment of experts to the seats of
  the nodes, solved exactly; layers are swept forth and back until none improves, from several starts. Exchanges of
  two experts of a layer then keep each node's load within the limit.
- **ILP**, for small models: the same objective with a variable per pair of experts and node, by HiGHS. It proves the
  optimum where it ends in time, and otherwise a bound.

Without an ILP the bound is combinatorial: at most as many partners of an expert sit on its node as a node has seats, so
what stays is at most the sum of that many largest pairs of every expert, seen from either layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeplan.solvers.construct.packing import pack, swap
from moeplan.solvers.problem.arrays import Float64, Int32, Int64, floats, integers
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import Layout, even_shares

__all__ = ["AffinityPlan", "crossings", "place_by_affinity"]

STARTS = 8
"""Random starts of the sweeps, beside the layout in expert order."""
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
    total, most = int(moves.sum()), _most_kept(moves, int(seats.max()))
    node = _search(moves, weight, caps, seats, seed)
    kept, excess = _kept(moves, node), _excess(weight, caps, node)
    if moves.size * len(seats) <= ILP_SIZE and (kept < most or excess > 0) and ilp_seconds > 0:
        found, proven = _ilp(moves, weight, caps, seats, ilp_seconds)
        most = min(most, proven)
        if found is not None and (_excess(weight, caps, found), -_kept(moves, found)) < (excess, -kept):
            node, kept = found, _kept(moves, found)
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
    return int(pairs.sum()) - _kept(pairs, np.stack([domain[layout.hosts.device] for layout in layouts]))


def _loads_of(moves: Int64) -> Float64:
    """float64[layers, experts]: tokens by what leaves each expert, or what arrives at the last layer's."""
    if not len(moves):
        return np.zeros((1, moves.shape[1]))
    return np.concatenate([moves.sum(axis=2), moves[-1:].sum(axis=1)]).astype(np.float64)


def _most_kept(moves: Int64, seats: int) -> int:
    """The most transitions that any placement keeps on their node."""
    most = 0
    for layer in moves:
        by_row = np.sort(layer, axis=1)[:, -seats:].sum()
        by_column = np.sort(layer, axis=0)[-seats:].sum()
        most += int(min(by_row, by_column))
    return most


def _kept(moves: Int64, node: Int32) -> int:
    """Transitions that stay on their node. `node` is int32[layers, experts]."""
    return sum(
        int(layer[here[:, None] == there].sum()) for layer, here, there in zip(moves, node, node[1:], strict=False)
    )


def _excess(weight: Float64, caps: Float64, node: Int32) -> float:
    """Load beyond the caps of the nodes, all layers together."""
    loads = np.stack([np.bincount(here, w, minlength=caps.shape[1]) for here, w in zip(node, weight, strict=True)])
    return float(np.maximum(loads - caps * (1 + 1e-12), 0.0).sum())


def _search(moves: Int64, weight: Float64, caps: Float64, seats: Int64, seed: int) -> Int32:
    """int32[layers, experts]: the node of each expert."""
    rng = np.random.default_rng(seed)
    layers = len(weight)
    in_order = np.repeat(np.arange(len(seats), dtype=np.int32), seats)
    best, best_score = np.tile(in_order, (layers, 1)), (np.inf, 0)
    for start in range(1 + STARTS):
        node = np.tile(in_order, (layers, 1)) if start == 0 else np.stack([rng.permutation(in_order)] * layers)
        _sweep(moves, node, in_order, forward_first=start > 0)
        _exchange(moves, weight, caps, node)
        score = (_excess(weight, caps, node), -_kept(moves, node))
        if score < best_score:
            best, best_score = node, score
    return best


def _sweep(moves: Int64, node: Int32, seat_node: Int32, *, forward_first: bool) -> None:
    """Solve layer after layer as a linear assignment until none improves; in place.

    Args:
        moves: int64[layers - 1, experts, experts].
        node: int32[layers, experts], changed.
        seat_node: int32[experts], node of each seat.
        forward_first: Whether the first sweep looks back only, as the layers after are not placed yet.
    """
    from scipy.optimize import linear_sum_assignment  # takes half a second to import

    layers = len(node)
    member = np.eye(int(seat_node.max()) + 1, dtype=np.float64)
    kept = -1
    forward = True
    first = forward_first
    while (now := _kept(moves, node)) > kept or first:
        kept = now
        for layer in range(layers) if forward else reversed(range(layers)):
            gain = np.zeros((node.shape[1], len(member)))
            if layer:
                gain += moves[layer - 1].T @ member[node[layer - 1]]
            if layer + 1 < layers and not first:
                gain += moves[layer] @ member[node[layer + 1]]
            if first and not layer:
                continue
            _, seat = linear_sum_assignment(gain[:, seat_node], maximize=True)
            node[layer] = seat_node[seat]
        forward = not forward
        if first:
            kept, first = -1, False


@kernel
def _exchange(moves: Int64, weight: Float64, caps: Float64, node: Int32) -> None:
    """Exchange two experts of a layer while that lowers the load beyond the caps, or keeps more without raising it."""
    layers, experts = weight.shape
    nodes = caps.shape[1]
    load = np.zeros((layers, nodes))
    for layer in range(layers):
        for e in range(experts):
            load[layer, node[layer, e]] += weight[layer, e]
    gain = np.zeros((experts, nodes))
    improved = True
    rounds = 0
    while improved and rounds < 4 * experts:
        improved = False
        rounds += 1
        for layer in range(layers):
            gain[:] = 0.0
            for e in range(experts):
                for f in range(experts):
                    if layer:
                        gain[e, node[layer - 1, f]] += moves[layer - 1, f, e]
                    if layer + 1 < layers:
                        gain[e, node[layer + 1, f]] += moves[layer, e, f]
            for a in range(experts):
                for b in range(a + 1, experts):
                    here, there = node[layer, a], node[layer, b]
                    if here == there:
                        continue
                    change = weight[layer, b] - weight[layer, a]
                    before = max(0.0, load[layer, here] - caps[layer, here])
                    before += max(0.0, load[layer, there] - caps[layer, there])
                    after = max(0.0, load[layer, here] + change - caps[layer, here])
                    after += max(0.0, load[layer, there] - change - caps[layer, there])
                    more = gain[a, there] + gain[b, here] - gain[a, here] - gain[b, there]
                    scale = 1e-9 * caps[layer, here]
                    if after < before - scale or (after <= before + scale and more > 0):
                        node[layer, a], node[layer, b] = there, here
                        load[layer, here] += change
                        load[layer, there] -= change
                        improved = True


def _ilp(moves: Int64, weight: Float64, caps: Float64, seats: Int64, seconds: float) -> tuple[Int32 | None, int]:
    """The placement of most kept transitions within the caps, and a bound on them that ignores no constraint.

    Variables: x[layer, expert, node] binary, then z[layer, expert, next expert, node] <= both of its x.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    layers, experts = weight.shape
    nodes = len(seats)
    x = np.arange(layers * experts * nodes).reshape(layers, experts, nodes)
    z = x.size + np.arange(moves.size * nodes).reshape(*moves.shape, nodes)
    size = x.size + z.size
    blocks: list[tuple[Int64, Int64, Float64, Float64, Float64]] = []

    def add(columns: Int64, values: Float64, low: npt.ArrayLike, high: npt.ArrayLike) -> None:
        rows = np.repeat(np.arange(len(columns)), columns.shape[1])
        lows, highs = (np.broadcast_to(np.asarray(limit, np.float64), (len(columns),)) for limit in (low, high))
        blocks.append((rows, columns.reshape(-1), np.broadcast_to(values, columns.shape).reshape(-1), lows, highs))

    one = np.ones(1)
    add(x.reshape(-1, nodes), one, 1, 1)
    by_node = x.transpose(0, 2, 1).reshape(-1, experts)
    add(by_node, one, np.tile(seats, layers), np.tile(seats, layers))
    add(by_node, np.repeat(weight, nodes, axis=0), -np.inf, caps.reshape(-1))
    for ends, together in ((x[:-1], z.transpose(0, 1, 3, 2)), (x[1:], z.transpose(0, 2, 3, 1))):
        # A node's seats are all taken: an expert there has exactly that many partners, elsewhere none.
        partners = np.concatenate([together.reshape(-1, experts), ends.reshape(-1, 1)], axis=1)
        share = np.concatenate([np.ones((nodes, experts)), -seats[:, None]], axis=1)
        add(partners, np.tile(share, (len(partners) // nodes, 1)), 0, 0)
        either = np.stack([together.reshape(-1), np.repeat(ends.reshape(-1), experts)], axis=1)
        add(either, np.array([1.0, -1.0]), -np.inf, 0)
    offsets = np.cumsum([0, *(len(low) for *_, low, _ in blocks)])
    row = np.concatenate([rows + offset for (rows, *_), offset in zip(blocks, offsets, strict=False)])
    column, value, low, high = (np.concatenate([block[k] for block in blocks]) for k in range(1, 5))
    matrix = coo_array((value, (row, column)), shape=(int(offsets[-1]), size)).tocsr()
    profit = np.zeros(size)
    profit[z] = moves[..., None]
    integral = np.zeros(size, np.int64)
    integral[: x.size] = 1
    answer = milp(
        -profit,
        integrality=integral,
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": seconds},
    )
    bound = getattr(answer, "mip_dual_bound", None)
    proven = int(moves.sum()) if bound is None or not np.isfinite(bound) else int(np.floor(-bound + 1e-6))
    if answer.x is None:
        return None, int(moves.sum())
    return answer.x[: x.size].reshape(x.shape).argmax(axis=2).astype(np.int32), proven


def _on_devices(weight: Float64, node: Int32, domain: Int32, share: Int32, cluster: Cluster) -> Layout:
    """A layer's layout: the experts of each node over its devices, heaviest first, then exchanges."""
    slots = np.full((cluster.devices, max(1, cluster.max_slots)), -1, np.int32)
    for n in range(int(domain.max()) + 1):
        devices, members = np.flatnonzero(domain == n), np.flatnonzero(node == n)
        if not len(members):
            continue
        loads, speed = weight[members], cluster.speed[devices]
        placed = pack(loads, np.ones(len(members), np.int32), share[devices], speed)
        swap(placed, loads, speed, ROUNDS)
        slots[devices, : placed.shape[1]] = np.where(placed < 0, -1, members[placed])
    return Layout(slots, len(weight))
