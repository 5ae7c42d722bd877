"""A node for every expert by local search, for models of any size.

With its neighbours fixed, a layer is a linear assignment of experts to the seats of the nodes, solved exactly; layers
are swept forth and back until none improves, from several starts. Exchanges of two experts of a layer then keep each
node's load within its cap.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.affinity.kept import excess_load, tokens_kept
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.linear_assignment import linear_assignment

__all__ = ["search"]

STARTS = 8
"""Random starts of the sweeps, beside the layout in expert order."""


def search(moves: Int64, weight: Float64, caps: Float64, seats: Int64, seed: int) -> Int32:
    """int32[layers, experts]: the node of each expert."""
    rng = np.random.default_rng(seed)
    layers = len(weight)
    in_order = np.repeat(np.arange(len(seats), dtype=np.int32), seats)
    best, best_score = np.tile(in_order, (layers, 1)), (np.inf, 0)
    for start in range(1 + STARTS):
        node = np.tile(in_order, (layers, 1)) if start == 0 else np.stack([rng.permutation(in_order)] * layers)
        _sweep(moves, node, in_order, forward_first=start > 0)
        _exchange(moves, weight, caps, node)
        score = (excess_load(weight, caps, node), -tokens_kept(moves, node))
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
    layers = len(node)
    member = np.eye(int(seat_node.max()) + 1, dtype=np.float64)
    kept = -1
    forward = True
    first = forward_first
    while (now := tokens_kept(moves, node)) > kept or first:
        kept = now
        for layer in range(layers) if forward else reversed(range(layers)):
            gain = np.zeros((node.shape[1], len(member)))
            if layer:
                gain += moves[layer - 1].T @ member[node[layer - 1]]
            if layer + 1 < layers and not first:
                gain += moves[layer] @ member[node[layer + 1]]
            if first and not layer:
                continue
            _, seat = linear_assignment(gain[:, seat_node], maximize=True)
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
