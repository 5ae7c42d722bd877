"""Lower bounds on the largest load per speed of any layout and any split, for one scenario.

Proved for arbitrary loads; the LP relaxation of the placement problem never exceeds the first of them. Notation: loads
w_e sorted downwards, devices of speed v_d, S slots in all, R = S - E spare slots.

    average     W / sum of speeds
    adams       every expert e needs enough replicas that its share fits the fastest devices, and replicas are limited;
                for equal speeds min over r of max w_e / r_e, which Adams' divisor method attains
    exclusive   the k hottest experts sit on b devices; the others cannot touch all experts, so the coldest of the rest
                live only on those b devices as well
    pigeonhole  at most R experts are split, so among the j D + 1 + R hottest j D + 1 are whole and j + 1 of them meet
    crowding    the same for any number of whole experts, by what each device could compute of them, beside the coldest
                ones that its other slots must hold
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = [
    "COUNTS",
    "adams",
    "average",
    "bound_of",
    "crowding",
    "exclusive",
    "in_whole_tokens",
    "lower_bound",
    "pigeonhole",
    "room_for",
]


@kernel
def average(hot: Float64, speed: Float64) -> float:
    """LB1: all loads over all speeds. `hot` float64[experts] descending, `speed` float64[devices] descending."""
    return hot.sum() / speed.sum()


@kernel
def adams(hot: Float64, together: Float64, slots: int) -> float:
    """LB2: the least M at which the experts' replica needs fit into `slots`.

    At M an expert needs the fewest r whose speed together, times M, is its load, at most one replica per device. The
    least M is some ``w_e / together_r``; a greedy finds it by giving the next slot to the expert with the largest one.

    Args:
        hot: float64[experts] descending.
        together: float64[most replicas], the most speed of 1.. devices together, never falling.
        slots: Replicas in all.
    """
    experts, most = len(hot), len(together)
    share = hot / together[0]
    replicas = np.ones(experts, np.int64)
    # Hottest experts come first, and an expert's share only falls: a heap, kept implicit by a bounded scan.
    reach = 1
    for _ in range(slots - experts):
        top = 0
        for e in range(1, reach):
            if share[e] > share[top]:
                top = e
        if replicas[top] == most:
            break
        share[top] = hot[top] / together[replicas[top]]
        replicas[top] += 1
        if top == reach - 1 and reach < experts:
            reach += 1
    return share[:reach].max()


@kernel
def exclusive(hot: Float64, speed: Float64, capacity: Int64) -> float:
    """LB3: the hottest experts and those that no other device can reach. `capacity` int64[devices] descending."""
    experts, devices = len(hot), len(speed)
    spare = capacity.sum() - experts
    fastest = np.cumsum(speed)
    reachable = np.zeros(devices + 1, np.int64)  # experts that the devices outside a set of b can touch at most
    for n in range(devices):
        reachable[n + 1] = reachable[n] + capacity[n]
    heat = np.zeros(experts + 1)
    for e in range(experts):
        heat[e + 1] = heat[e] + hot[e]
    best = 0.0
    for k in range(1, min(experts, devices) + 1):
        weakest = np.inf
        for b in range(1, min(devices, k + spare) + 1):
            stranded = min(experts, max(0, experts - reachable[devices - b]))
            extra = max(0, stranded - k)
            bound = (heat[k] + heat[experts] - heat[experts - extra]) / fastest[b - 1]
            weakest = min(weakest, bound)
            if weakest <= best:
                break
        best = max(best, weakest)
    return best


@kernel
def pigeonhole(hot: Float64, speed: Float64, slots: int) -> float:
    """LB4: whole experts that must share a device."""
    experts, devices = len(hot), len(speed)
    spare = slots - experts
    best = 0.0
    j = 0
    while j * devices + spare < experts:
        last = j * devices + spare
        together = 0.0
        for e in range(last - j, last + 1):
            together += hot[e]
        best = max(best, together / speed[0])
        j += 1
    return best


COUNTS = 16
"""Numbers of whole experts that `crowding` looks at, at most."""


@kernel
def crowding(hot: Float64, speed: Float64, capacity: Int32) -> float:
    """LB5: whole experts that must find a place on devices, each with what else its slots hold.

    At least K of the K + R hottest experts are whole. A device with i of them has at least the i lightest of these, and
    beside them, as at most 2 R slots hold no whole expert, the lightest of the others. So at M it has room for so many
    of them at most, and all devices together must have room for K. `capacity` int32[devices], in the order of `speed`.
    """
    experts, room = len(hot), capacity.astype(np.int64)
    spare = room.sum() - experts
    cold = np.zeros(experts + 1)
    for n in range(experts):
        cold[n + 1] = cold[n] + hot[experts - 1 - n]
    best = 0.0
    step = max(1, (experts - spare) // COUNTS)
    for whole in range(experts - spare, 0, -step):
        best = max(best, room_for(cold, whole, whole + spare, speed, room, room - 2 * spare))
    return best


@kernel
def room_for(light: Float64, placed: int, several: int, speed: Float64, most: Int64, least: Int64) -> float:
    """The least level at which bins have room for `placed` of the `several` heaviest items, whichever these are.

    A bin with i of them has at least the i lightest, and beside them the lightest of all others as far as it must take
    more.

    Args:
        light: float64[items + 1], what 0, 1, ... of the lightest items weigh together.
        placed: Items that must find a place.
        several: Heaviest items, of which those are some.
        speed: float64[bins].
        most: Most items of each bin.
        least: Items that each must take.
    """
    others = len(light) - 1 - several
    level = np.full(most.sum(), np.inf)
    n = 0
    for b in range(len(speed)):
        for i in range(1, most[b] + 1):
            if i <= several:
                beside = min(others, max(0, least[b] - i))
                level[n] = (light[others + i] - light[others] + light[beside]) / speed[b]
            n += 1
    return np.partition(level, placed - 1)[placed - 1]


@kernel
def bound_of(loads: Int64, speed: Float64, capacity: Int32) -> float:
    """The best of these bounds for one scenario; see `lower_bound` for the arguments."""
    hot = np.sort(loads.astype(np.float64))[::-1].copy()
    fast = np.sort(speed)[::-1].copy()
    room = np.sort(capacity.astype(np.int64))[::-1].copy()
    slots = room.sum()
    proven = max(average(hot, fast), adams(hot, np.cumsum(fast), slots))
    proven = max(proven, exclusive(hot, fast, room), pigeonhole(hot, fast, slots))
    if slots - len(hot) < len(fast):  # with a spare slot for each device, hardly an expert need be whole
        proven = max(proven, crowding(hot, speed, capacity))
    return proven


@kernel
def in_whole_tokens(bound: Float64, speed: Float64) -> Float64:
    """Bounds, float64[scenarios], rounded up where devices are equal: tokens are whole, so the largest load is too."""
    if (speed == speed[0]).all():
        return np.ceil(bound * speed[0] * (1 - 1e-14)) / speed[0]
    return bound


@kernel
def lower_bound(tokens: Int64, speed: Float64, capacity: Int32) -> Float64:
    """The best bound of each scenario.

    Args:
        tokens: int64[scenarios, experts].
        speed: float64[devices].
        capacity: int32[devices], replicas that each device can hold; together at least one per expert.

    Returns:
        float64[scenarios], tokens per unit of speed.
    """
    best = np.empty(len(tokens))
    devices = len(speed)
    alike = (speed == speed[0]).all() and (capacity == capacity[0]).all()
    # With this many spare slots the average is attainable (see `sliding_window`), so no bound exceeds it.
    perfect = alike and tokens.shape[1] <= devices * (capacity[0] - 1) + 1
    for s in range(len(tokens)):
        best[s] = tokens[s].sum() / speed.sum() if perfect else bound_of(tokens[s], speed, capacity)
    return in_whole_tokens(best, speed)
