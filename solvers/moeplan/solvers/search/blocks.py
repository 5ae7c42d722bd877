"""Many devices as blocks of a few, which are planned apart.

A search over all devices needs more candidates the more there are, and each is split over all of them. Where there is a
spare slot for each device, nearly nothing is lost if experts are divided first: over blocks of some devices, so that no
block has more than its share of the tokens in any scenario. Sums of many experts are easily made alike by exchanging
them; every block is then a small problem of its own, with spare slots enough for near perfect balance.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.clock import time_now
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.search.random import next_random, seeded

__all__ = ["blocks_of", "divisible"]

BLOCK = 16
"""Devices of a block: with fewer, blocks are harder to make alike; with more, each is harder to plan."""

EXCHANGES = 50
"""Exchanges of experts between blocks that are tried, for each expert."""

LOOK = 1_000
"""Exchanges between two looks at the clock."""

LARGEST = 0.5
"""Part of a block's share of the tokens that no expert may exceed in any scenario."""


def divisible(problem: Problem) -> bool:
    """True if there are devices for two blocks or more, and spare slots for their replicas."""
    devices = int((problem.capacity > 0).sum())
    return devices >= 2 * BLOCK and problem.spare >= devices - 1


def blocks_of(problem: Problem, end: float) -> list[tuple[Int64, Int64]]:
    """Devices and experts of each block; none where devices or spare slots are too few, or an expert is too large.

    At `end`, a time on the clock of kernels, they stay as far apart as they are by then.
    """
    if not divisible(problem):
        return []
    devices = np.flatnonzero(problem.capacity > 0)
    count = len(devices) // BLOCK
    fastest = devices[np.lexsort((-problem.capacity[devices], -problem.cluster.speed[devices]))]
    turn = np.arange(len(devices)) % (2 * count)
    block = np.minimum(turn, 2 * count - 1 - turn)  # dealt there and back, so that blocks are alike
    speed = np.bincount(block, problem.cluster.speed[fastest]).astype(np.float64)
    # One block is like another in spare slots.
    room = np.bincount(block, problem.capacity[fastest] - problem.spare / len(devices))
    ends = np.rint(np.cumsum(room)).astype(np.int64)
    most = ends - np.concatenate([[0], ends[:-1]])
    part = problem.loads / np.where(problem.mean_level > 0, problem.mean_level, np.inf)[:, np.newaxis]
    if most.min() < 1 or part.max() > LARGEST * speed.min():
        return []
    weighted = part * np.sqrt(problem.demand.weights)[:, np.newaxis]
    home = _divide(weighted, speed, most, end)
    return [(fastest[block == b], np.flatnonzero(home == b)) for b in range(count)]


@kernel
def _divide(part: Float64, speed: Float64, most: Int64, end: float) -> Int64:
    """Divide experts over blocks so that each has tokens by its speed in all scenarios.

    Args:
        part: float64[scenarios, experts], tokens, such that squares of what a block has too many of may be added up.
        speed: float64[blocks].
        most: int64[blocks], number of experts of each, together all.
        end: Time on the clock of kernels after which no exchange is tried.

    Returns:
        int64[experts], the block of each.
    """
    scenarios, experts = part.shape
    blocks = len(speed)
    home = np.empty(experts, np.int64)
    number = np.zeros(blocks, np.int64)
    over = np.empty((blocks, scenarios))  # what a block has beyond its share
    heat = np.zeros(blocks)
    mean = part.sum(axis=0)
    for s in range(scenarios):
        over[:, s] = -speed * (part[s].sum() / speed.sum())
    for e in np.argsort(-mean, kind="mergesort"):
        best = -1
        for b in range(blocks):
            if number[b] < most[b] and (best < 0 or heat[b] / speed[b] < heat[best] / speed[best]):
                best = b
        home[e] = best
        number[best] += 1
        heat[best] += mean[e]
        for s in range(scenarios):
            over[best, s] += part[s, e]
    state = seeded(0)
    for i in range(EXCHANGES * experts):
        if i % LOOK == 0 and time_now() >= end:
            break
        a, b = next_random(state) % experts, next_random(state) % experts
        x, y = home[a], home[b]
        if x == y:
            continue
        change = 0.0
        for s in range(scenarios):
            more = part[s, b] - part[s, a]
            change += more * (over[x, s] - over[y, s] + more)
        if change < 0:
            home[a], home[b] = y, x
            for s in range(scenarios):
                more = part[s, b] - part[s, a]
                over[x, s] += more
                over[y, s] -= more
    return home
