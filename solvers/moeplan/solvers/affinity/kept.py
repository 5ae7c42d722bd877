"""Tokens that a placement keeps on its nodes, at most and as it is, and its excess over their caps of load."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64

__all__ = ["excess_load", "most_kept", "tokens_kept"]


def most_kept(moves: Int64, seats: int) -> int:
    """The most transitions that any placement keeps on their node."""
    most = 0
    for layer in moves:
        by_row = np.sort(layer, axis=1)[:, -seats:].sum()
        by_column = np.sort(layer, axis=0)[-seats:].sum()
        most += int(min(by_row, by_column))
    return most


def tokens_kept(moves: Int64, node: Int32) -> int:
    """Transitions that stay on their node. `node` is int32[layers, experts]."""
    return sum(
        int(layer[here[:, None] == there].sum()) for layer, here, there in zip(moves, node, node[1:], strict=False)
    )


def excess_load(weight: Float64, caps: Float64, node: Int32) -> float:
    """Load beyond the caps of the nodes, all layers together."""
    loads = np.stack([np.bincount(here, w, minlength=caps.shape[1]) for here, w in zip(node, weight, strict=True)])
    return float(np.maximum(loads - caps * (1 + 1e-12), 0.0).sum())
