"""A node for every expert by an integer linear program, for small models; with a proof."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int32, Int64

__all__ = ["solve"]


def solve(moves: Int64, weight: Float64, caps: Float64, seats: Int64, seconds: float) -> tuple[Int32 | None, int]:
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
