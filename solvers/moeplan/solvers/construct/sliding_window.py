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

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["applies", "sliding_window"]


def applies(experts: int, capacity: Int32, speed: Float64) -> bool:
    """Whether the theorem covers these devices: all equal, and at least one spare slot for all of them but one."""
    devices, slots = len(capacity), int(capacity[0])
    equal = bool((capacity == slots).all() and (speed == speed[0]).all())
    return equal and experts <= devices * (slots - 1) + 1


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
    n = len(order)
    item = order.copy()  # remaining experts by ascending load, after `zeros` experts of zero load
    left = loads[order]
    level = left.sum() / devices
    zeros = devices * (width - 1) + 1 - n
    for d in range(devices):
        if d == devices - 1:
            for i in range(n):
                slots[d, i] = item[i]
            break
        # First window [k, k + width) of the padded list that weighs at least `level`.
        k = max(0, zeros - width + 1)
        weight = 0.0
        for i in range(k, k + width):
            if i >= zeros:
                weight += left[i - zeros]
        while weight < level and k + width < zeros + n:
            if k >= zeros:
                weight -= left[k - zeros]
            weight += left[k + width - zeros]
            k += 1
        first = max(0, k - zeros)
        last = k + width - 1 - zeros  # the heaviest
        rest = level
        used = 0
        for i in range(first, last):
            slots[d, used] = item[i]
            used += 1
            rest -= left[i]
        padding = max(0, zeros - k)
        heaviest = item[last]
        remainder = left[last] - rest
        if rest > 1e-12 * level or level == 0:
            slots[d, used] = heaviest
        else:
            remainder = left[last]
        # Remove the window, put the remainder of the heaviest back in order.
        whole = remainder <= 1e-12 * level and (rest > 1e-12 * level or level == 0)
        gap = last - first + 1
        for i in range(last + 1, n):
            item[i - gap] = item[i]
            left[i - gap] = left[i]
        n -= gap
        zeros -= padding
        if whole:
            zeros += 1
        else:
            i = n
            while i > 0 and left[i - 1] > remainder:
                item[i] = item[i - 1]
                left[i] = left[i - 1]
                i -= 1
            item[i] = heaviest
            left[i] = remainder
            n += 1
    return slots
