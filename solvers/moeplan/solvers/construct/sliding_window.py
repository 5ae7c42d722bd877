"""Perfect balance whenever there is a spare slot for all devices but one: the sliding window.

Theorem. D equal devices of C slots hold E experts in perfect balance, whatever the loads, if E <= D (C - 1) + 1.

Proof, and algorithm. Pad with experts of zero load to E = D (C - 1) + 1, sort upwards, let L = W / D. The C - 1
lightest weigh less than L together, the C heaviest at least L. Slide a window of C experts upwards to the first that
weighs at least L. All but its heaviest weigh less than L: place them whole, fill the device up with a part of the
heaviest, and put its remainder back. C - 1 experts and one device are gone, so the argument repeats. Remainders go to
later devices, so replicas of an expert sit on different devices.

The result is known for video-on-demand servers (Golubchik, Khanna, Khuller, Thurimella, Zhu, SODA 2000; Shachnai and
Tamir, Algorithmica 29, 2001), where devices are disks and experts are movies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["applies", "sliding_window"]

TOLERANCE = 1e-12
"""Part of a device's share of the load that rounding may leave: less counts as nothing."""


def applies(experts: int, capacity: Int32, speed: Float64) -> bool:
    """True if the theorem covers these devices: all equal, and at least one spare slot for all of them but one."""
    devices, slots = len(capacity), int(capacity[0])
    equal = bool((capacity == slots).all() and (speed == speed[0]).all())
    return equal and experts <= devices * (slots - 1) + 1


class _Rest(NamedTuple):
    """Experts still to place, by ascending load, after `zeros` experts of zero load that only pad.

    Attributes:
        expert: int64[experts], of which the first `size` count.
        load: float64[experts], what is left of each.
        size: int64[1].
        zeros: int64[1].
    """

    expert: Int64
    load: Float64
    size: Int64
    zeros: Int64


@kernel
def sliding_window(loads: Float64, members: Int64, devices: int, width: int) -> Int32:
    """Place `members` on `devices` devices of `width` slots so that some split balances them perfectly.

    Args:
        loads: float64[experts].
        members: int64[n], the experts to place, ``n <= devices * (width - 1) + 1``.
        devices: Number of equal devices.
        width: Slots of each.

    Returns:
        int32[devices, width], -1 for slots that were not needed.
    """
    slots = np.full((devices, width), -1, np.int32)
    order = members[np.argsort(loads[members], kind="mergesort")]
    size = len(order)
    rest = _Rest(order.copy(), loads[order], np.array([size]), np.array([devices * (width - 1) + 1 - size]))
    level = rest.load.sum() / devices
    for d in range(devices - 1):
        start = _window(rest, width, level)
        first, last = max(0, start - rest.zeros[0]), start + width - 1 - rest.zeros[0]
        room = level
        for i in range(first, last):
            slots[d, i - first] = rest.expert[i]
            room -= rest.load[i]
        heaviest, left = rest.expert[last], rest.load[last]
        placed = room > TOLERANCE * level or level == 0
        if placed:
            slots[d, last - first] = heaviest
            left -= room
        _remove(rest, first, last + 1)
        rest.zeros[0] -= width - (last - first + 1)
        if placed and left <= TOLERANCE * level:
            rest.zeros[0] += 1
        else:
            _put_back(rest, heaviest, left)
    for i in range(rest.size[0]):
        slots[devices - 1, i] = rest.expert[i]
    return slots


@kernel
def _window(rest: _Rest, width: int, level: float) -> int:
    """Start of the first `width` experts, counted with the padding, that weigh at least `level`, or else the last."""
    size, zeros = rest.size[0], rest.zeros[0]
    start = max(0, zeros - width + 1)
    weight = 0.0
    for i in range(max(start, zeros), start + width):
        weight += rest.load[i - zeros]
    while weight < level and start + width < zeros + size:
        if start >= zeros:
            weight -= rest.load[start - zeros]
        weight += rest.load[start + width - zeros]
        start += 1
    return start


@kernel
def _remove(rest: _Rest, first: int, end: int) -> None:
    """Take out the experts at ``first:end``."""
    size = rest.size[0]
    for i in range(end, size):
        rest.expert[first + i - end] = rest.expert[i]
        rest.load[first + i - end] = rest.load[i]
    rest.size[0] -= end - first


@kernel
def _put_back(rest: _Rest, expert: int, left: float) -> None:
    """Insert what is left of an expert in order; it comes after those with as much."""
    i = rest.size[0]
    while i > 0 and rest.load[i - 1] > left:
        rest.expert[i] = rest.expert[i - 1]
        rest.load[i] = rest.load[i - 1]
        i -= 1
    rest.expert[i] = expert
    rest.load[i] = left
    rest.size[0] += 1
