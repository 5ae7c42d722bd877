"""Exchanges of samples between micro-batches, while the slowest pools of the micro-batches become faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.homes.exchanges import pool_time
from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["Dealing", "Samples", "reorder"]

_PARTNERS = 512
"""Samples that one is tried to be exchanged with in a sweep: it bounds the time of a sweep of very many."""

_SWEEPS = 20
"""Sweeps at most; most steps need five."""


class Samples(NamedTuple):
    """What is dealt.

    Attributes:
        load: float64[samples, layers, pools], tokens of each sample that are at home in each pool of devices.
        tokens: int64[samples], length.
        rate: float64[pools], speed of a pool's devices together.
        cap: float64[pools], tokens that a pool has memory for.
    """

    load: Float64
    tokens: Int64
    rate: Float64
    cap: Float64


class Dealing(NamedTuple):
    """Where a sample at a position is computed.

    Attributes:
        micro_batch: int64[positions].
        source: int64[positions].
        sources: Number of ranks.
    """

    micro_batch: Int64
    source: Int64
    sources: int


@kernel
def _slowest(samples: Samples, load: Float64, leaves: int, enters: int) -> float:
    """Time of a micro-batch's slowest pools, summed over layers, once one sample has taken the place of another."""
    time = 0.0
    for layer in range(len(load)):
        worst = 0.0
        for p in range(len(samples.rate)):
            after = load[layer, p] - samples.load[leaves, layer, p] + samples.load[enters, layer, p]
            worst = max(worst, pool_time(after, samples.rate[p], samples.cap[p]))
        time += worst
    return time


@kernel
def reorder(samples: Samples, dealing: Dealing, order: Int64) -> None:
    """Exchange samples of different micro-batches until no exchange gains; `order` is changed.

    No exchange makes the longest rank of a micro-batch longer than it was at the start, so neither memory nor what
    takes time with the number of tokens, as attention's products do, can become worse.

    Args:
        samples: What is dealt.
        dealing: Where.
        order: int64[positions], the sample at each.
    """
    n, batch = len(order), dealing.micro_batch
    count = batch.max() + 1
    load = np.zeros((count, *samples.load.shape[1:]))
    length = np.zeros((count, dealing.sources), np.int64)
    for i in range(n):
        load[batch[i]] += samples.load[order[i]]
        length[batch[i], dealing.source[i]] += samples.tokens[order[i]]
    longest = np.zeros(count, np.int64)
    time = np.zeros(count)
    for m in range(count):
        longest[m] = length[m].max()
        time[m] = _slowest(samples, load[m], 0, 0)
    least = 1e-9 * time.sum()
    stride = -(-(n - 1) // _PARTNERS)
    for sweep in range(_SWEEPS):
        gained = False
        for a in range(n):
            best, gain = -1, least
            for b in range(a + 1 + sweep % max(stride, 1), a + n, max(stride, 1)):
                other = b % n
                if not _fits(samples, dealing, length, longest, order, a, other):
                    continue
                p, q = batch[a], batch[other]
                saved = time[p] - _slowest(samples, load[p], order[a], order[other])
                if saved + time[q] <= gain:
                    continue
                saved += time[q] - _slowest(samples, load[q], order[other], order[a])
                if saved > gain:
                    best, gain = other, saved
            if best >= 0:
                gained = True
                for here, there in ((a, best), (best, a)):
                    m = batch[here]
                    change = samples.tokens[order[there]] - samples.tokens[order[here]]
                    length[m, dealing.source[here]] += change
                    time[m] = _slowest(samples, load[m], order[here], order[there])
                    load[m] += samples.load[order[there]] - samples.load[order[here]]
                order[a], order[best] = order[best], order[a]
        if not gained:
            break


@kernel
def _fits(samples: Samples, dealing: Dealing, length: Int64, longest: Int64, order: Int64, a: int, b: int) -> bool:
    """Whether two positions are of different micro-batches whose ranks may exchange their samples."""
    p, q = dealing.micro_batch[a], dealing.micro_batch[b]
    change = samples.tokens[order[b]] - samples.tokens[order[a]]
    return (
        p != q
        and length[p, dealing.source[a]] + change <= longest[p]
        and length[q, dealing.source[b]] - change <= longest[q]
    )
