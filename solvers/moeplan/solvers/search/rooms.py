"""Rooms: how many replicas each device holds where memory is tight, and what a search then minimises.

The more replicas a device holds, the fewer tokens fit beside them. Where that is hardly its share, a slot left empty
may be worth more than a replica: so slots are given up one by one where they hurt most, and a search tries several
numbers of them. Beside so many replicas a device whose memory is full is as fast as its memory allows; and where no
layout is found by that, the part of the memory that is taken is the load to balance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, read_only
from moeplan.solvers.problem.problem import Problem
from moeplan.solvers.search.local import Scenarios
from moeplan.solvers.split.memory import token_caps

__all__ = ["Room", "rooms"]

STEPS = 16
"""Slots are given up in so many steps, or one by one."""

AMPLE = 1.25
"""Room for this many times a device's share lets tokens be divided badly."""

ROUNDING = 1e-12
"""What a part of the room may be wrong by; the split in whole tokens is checked."""


class Room(NamedTuple):
    """The room beside so many replicas.

    Attributes:
        slots: int32[devices], most replicas of each device.
        fast: The measure by speed.
        full: The measure by the part of the memory that is taken.
        fits: The objective of `full` up to which a layout fits.
    """

    slots: Int32
    fast: Scenarios
    full: Scenarios
    fits: float


def rooms(problem: Problem) -> Iterator[Room]:
    """The room beside replicas in all slots, and in fewer where some device has hardly room for its share.

    None where memory limits no tokens. Those that are too small for all tokens are left out.
    """
    used, most = problem.capacity.copy(), float(problem.loads.sum(axis=1).max())
    speed = problem.cluster.speed
    step = max(1, problem.spare // STEPS)
    found: list[Room] = []
    while most > 0:
        room = token_caps(problem.cluster, problem.expert, used.astype(np.int64))
        if room is None:
            return
        tokens = np.where(used > 0, room, 0.0)
        level = _level(tokens, speed, most)
        if np.isfinite(level):
            found.append(_room_of(problem, used.copy(), tokens, level, most))
        left = min(step, int(used.sum()) - problem.experts)
        full = (used > 1) & (tokens < AMPLE * speed * level)
        if left <= 0 or not full.any():
            break
        hurts = np.flatnonzero(full)[np.argsort((tokens / speed)[full], kind="stable")]
        used[hurts[:left]] -= 1
    last = len(found) - 1
    yield from (found[i] for i in sorted({0, last // 4, last // 2, last} if found else ()))


def _level(tokens: Float64, speed: Float64, most: float) -> float:
    """The load per speed at which devices with room for `tokens` compute `most` together; infinite if they cannot."""
    order = np.argsort(tokens / speed, kind="stable")
    filled = np.concatenate([[0.0], np.cumsum(tokens[order])])
    faster = np.cumsum(speed[order][::-1])[::-1]
    level = (most - filled[:-1]) / faster  # with the first devices full
    able = level <= (tokens / speed)[order]
    return float(level[np.argmax(able)]) if able.any() else np.inf


def _room_of(problem: Problem, used: Int32, tokens: Float64, level: float, most: float) -> Room:
    speed, count, total = problem.cluster.speed, problem.demand.scenarios, float(tokens.sum())
    none = speed * 1e-6
    slower = np.maximum(np.minimum(speed, tokens / level), none)
    fast = Scenarios.of(problem, speed=slower)
    alike = read_only(np.full(count, 1 / count))  # however little a scenario weighs, it has to fit
    full = Scenarios(problem.loads, alike, 1 / count, read_only(np.maximum(tokens, none)), np.full(count, most / total))
    return Room(used, fast, full, total / most * (1 + ROUNDING))
