"""The split that minimises the largest load, for a given layout: water-filling, then augmenting paths.

With devices d of speed v_d and experts e hosted on N(e), tokens may be divided freely over N(e). The least
``M = max_d load_d / v_d`` equals the largest ``w({e : N(e) inside B}) / v(B)`` over device sets B (Hall, Gale): a
max-density sub-hypergraph, or the min cut of a transportation network. The set B that attains it is the **tight set**:
no split lowers its load, and only a replica that connects it to the outside can.

Everything here counts whole tokens. Water-filling re-pours one expert at a time over its hosts, which is coordinate
descent on the sum of squared loads (decreasing-minimal flows, Frank & Murota, arXiv 1907.02673) and lands at or near
the optimum in a few sweeps; augmenting paths from the most loaded device then close the rest exactly.

The kernels share one representation of a layout, which a local search can edit in place:

    host   int32[experts, most replicas]  positions ``device * width + slot`` of each expert's replicas
    count  int32[experts]                 number of replicas of each expert
    slots  int32[devices * width]         expert at each position, -1 if empty
    quota  int64[devices * width]         tokens that each position computes
    load   int64[devices]                 tokens that each device computes
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import inner_kernel, kernel

__all__ = ["augment", "host_table", "most_loaded", "optimal_quota", "pour", "split_all", "waterfill"]

SWEEPS = 4
"""Rounds of water-filling before augmenting paths take over; they finish exactly from any start."""


@kernel
def host_table(slots: Int32, experts: int, most: int) -> tuple[Int32, Int32]:
    """Positions of each expert's replicas: ``host[experts, most]``, undefined beyond ``count[experts]``.

    Args:
        slots: int32[positions], expert at each position or -1.
        experts: Number of experts.
        most: Most replicas that an expert may get.
    """
    host = np.empty((experts, most), np.int32)  # filled, it would be the most memory of large clusters
    count = np.zeros(experts, np.int32)
    for position in range(len(slots)):
        e = slots[position]
        if e >= 0:
            host[e, count[e]] = position
            count[e] += 1
    return host, count


SHORT = 24
"""Hosts up to which insertion sort is the fastest."""


@inner_kernel
def _ascending(hosts: Int32, n: int, width: int, speed: Float64, load: Int64, order: Int32) -> None:
    """Order the hosts by load per speed, ties as they come: ``order[i]`` is the index of the i-th lowest."""
    if n > SHORT:
        for i in range(n):
            order[i] = i
        for root in range(n // 2 - 1, -1, -1):
            _sift_down(root, n, hosts, width, speed, load, order)
        for last in range(n - 1, 0, -1):
            order[0], order[last] = order[last], order[0]
            _sift_down(0, last, hosts, width, speed, load, order)
        return
    for i in range(n):
        j = i
        while j > 0 and _is_higher(order[j - 1], i, hosts, width, speed, load):
            order[j] = order[j - 1]
            j -= 1
        order[j] = i


@inner_kernel
def _sift_down(root: int, n: int, hosts: Int32, width: int, speed: Float64, load: Int64, order: Int32) -> None:
    """Restore the heap of the first `n` hosts, the highest on top, below a `root` that may be too low."""
    while 2 * root + 1 < n:
        child = 2 * root + 1
        if child + 1 < n and _is_higher(order[child + 1], order[child], hosts, width, speed, load):
            child += 1
        if not _is_higher(order[child], order[root], hosts, width, speed, load):
            return
        order[root], order[child] = order[child], order[root]
        root = child


@inner_kernel
def _is_higher(i: int, j: int, hosts: Int32, width: int, speed: Float64, load: Int64) -> bool:
    """True if host `i` comes after host `j` in ascending order."""
    di, dj = hosts[i] // width, hosts[j] // width
    level, other = load[di] / speed[di], load[dj] / speed[dj]
    return level > other or (level == other and i > j)


@inner_kernel
def pour(
    tokens: int, hosts: Int32, n: int, width: int, speed: Float64, quota: Int64, load: Int64, order: Int32
) -> None:
    """Divide an expert's `tokens` over its `n` hosts so that their largest load per speed is least.

    Args:
        tokens: Tokens to divide.
        hosts: int32[>= n], positions of the replicas.
        n: Number of replicas, at least 1.
        width: Slots per device.
        speed: float64[devices].
        quota: int64[positions]; the hosts' entries are overwritten.
        load: int64[devices] without this expert; the hosts' shares are added.
        order: int32[>= n], scratch.
    """
    if n == 1:
        quota[hosts[0]] = tokens
        load[hosts[0] // width] += tokens
        return
    _ascending(hosts, n, width, speed, load, order)
    total = float(tokens)
    capacity = 0.0
    level = 0.0
    used = 0
    while used < n:  # raise the level over the lowest hosts until it meets the next one
        d = hosts[order[used]] // width
        if used and level <= load[d] / speed[d]:
            break
        total += load[d]
        capacity += speed[d]
        level = total / capacity
        used += 1
    left = tokens
    for i in range(n):
        quota[hosts[i]] = 0
    for i in range(used):
        position = hosts[order[i]]
        d = position // width
        share = min(left, max(0, int(level * speed[d]) - load[d]))
        quota[position] = share
        load[d] += share
        left -= share
    while left > 0:  # whole tokens: those left are fewer than the hosts, unless rounding went against us
        for i in range(used):
            if left > 0:
                quota[hosts[order[i]]] += 1
                load[hosts[order[i]] // width] += 1
                left -= 1


@inner_kernel
def most_loaded(load: Int64, speed: Float64) -> int:
    """The device with the largest load per speed; the first of several."""
    best = 0
    highest = load[0] / speed[0]
    for d in range(1, len(load)):
        level = load[d] / speed[d]
        if level > highest:
            best, highest = d, level
    return best


@inner_kernel
def waterfill(
    tokens: Int64,
    host: Int32,
    count: Int32,
    width: int,
    speed: Float64,
    quota: Int64,
    load: Int64,
    order: Int32,
) -> None:
    """Overwrite `quota` and `load` with a split near the optimal one.

    Args:
        tokens: int64[experts].
        host: int32[experts, most], see the module.
        count: int32[experts].
        width: Slots per device.
        speed: float64[devices].
        quota: int64[positions], overwritten.
        load: int64[devices], overwritten.
        order: int32[most], scratch.
    """
    load[:] = 0
    quota[:] = 0
    for e in range(len(tokens)):
        if count[e] == 1:
            pour(tokens[e], host[e], 1, width, speed, quota, load, order)
    for sweep in range(SWEEPS):
        changed = False
        for e in range(len(tokens)):
            n = count[e]
            if n < 2:
                continue
            before = quota[host[e, 0]]
            if sweep:
                for i in range(n):
                    load[host[e, i] // width] -= quota[host[e, i]]
            pour(tokens[e], host[e], n, width, speed, quota, load, order)
            changed |= quota[host[e, 0]] != before
        if not changed and sweep:
            break


@inner_kernel
def _no_room_below(level: float, tokens: int, speed: Float64) -> bool:
    """True if all devices together cannot compute so many tokens with every load per speed below `level`."""
    room = -tokens
    for d in range(len(speed)):
        room += int(np.ceil(level * speed[d])) - 1
    return room < 0


@inner_kernel
def augment(
    slots: Int32,
    host: Int32,
    count: Int32,
    width: int,
    speed: Float64,
    quota: Int64,
    load: Int64,
    parent: Int32,
    seen: Int64,
    tight: Bool,
) -> float:
    """Turn any split into an optimal one, and find its tight set.

    From the most loaded device, tokens flow along paths device -> expert -> device to the least loaded device within
    reach, until none is within reach. Then every token on the reached set has all its hosts there, and the set's
    other devices are within one token of the maximum, so no integral split is better. A search for such a path looks at
    the hosts of an expert once, so it takes no longer than there are replicas.

    Args:
        slots: int32[positions], expert at each position.
        host: int32[experts, most], see the module.
        count: int32[experts].
        width: Slots per device.
        speed: float64[devices].
        quota: int64[positions], updated.
        load: int64[devices], updated.
        parent: int32[3, devices], scratch: the two positions through which a device was reached, and those to visit.
        seen: int64[experts + 1], scratch, zeros at first: the last search that saw each expert, and their number.
        tight: bool[devices], overwritten with the tight set.

    Returns:
        Largest load per speed.
    """
    tokens, able = load.sum(), speed.sum()
    mean = tokens / able
    queue = parent[2]
    while True:
        top = most_loaded(load, speed)
        level = load[top] / speed[top]
        near = level * able - len(speed) <= tokens  # else each could compute a token less
        if near and _no_room_below(level, tokens, speed):
            tight[:] = True
            return level
        seen[-1] += 1
        tight[:] = False
        tight[top] = True
        queue[0] = top
        head, tail = 0, 1
        target = -1
        lowest = level
        while head < tail and lowest > mean:  # below the mean is low enough
            d = queue[head]
            head += 1
            for position in range(d * width, (d + 1) * width):
                e = slots[position]
                if e < 0 or quota[position] == 0 or count[e] < 2 or seen[e] == seen[-1]:
                    continue
                seen[e] = seen[-1]
                for i in range(count[e]):
                    other = host[e, i] // width
                    if tight[other]:
                        continue
                    tight[other] = True
                    parent[0, other] = position
                    parent[1, other] = host[e, i]
                    queue[tail] = other
                    tail += 1
                    after = (load[other] + 1) / speed[other]
                    if after < lowest:
                        lowest = after
                        target = other
        if target < 0:
            return level
        # Bring one end to the mean and so be done with it, or else equalise the two; within what every expert on the
        # path can pass on.
        amount = max(1, int((load[top] * speed[target] - load[target] * speed[top]) / (speed[top] + speed[target])))
        to_mean = min(load[top] - mean * speed[top], mean * speed[target] - load[target])
        if to_mean >= 1:
            amount = min(amount, int(to_mean))
        d = target
        while d != top:
            amount = min(amount, quota[parent[0, d]])
            d = parent[0, d] // width
        d = target
        while d != top:
            quota[parent[0, d]] -= amount
            quota[parent[1, d]] += amount
            d = parent[0, d] // width
        load[top] -= amount
        load[target] += amount


@kernel
def split_all(slots: Int32, tokens: Int64, speed: Float64, quota: Int64, load: Int64, tight: Bool) -> Float64:
    """The optimal split of each scenario.

    Args:
        slots: int32[devices, width], a valid layout.
        tokens: int64[scenarios, experts].
        speed: float64[devices].
        quota: int64[scenarios, devices * width], overwritten.
        load: int64[scenarios, devices], overwritten.
        tight: bool[scenarios, devices], overwritten with each scenario's tight set.

    Returns:
        float64[scenarios], largest load per speed.
    """
    devices, width = slots.shape
    flat = slots.copy().reshape(-1)
    scenarios, experts = tokens.shape
    count = np.zeros(experts, np.int32)
    for position in range(len(flat)):
        if flat[position] >= 0:
            count[flat[position]] += 1
    host, count = host_table(flat, experts, count.max())
    order = np.empty(host.shape[1], np.int32)
    parent, seen = np.empty((3, devices), np.int32), np.zeros(experts + 1, np.int64)
    level = np.empty(scenarios)
    for s in range(scenarios):
        waterfill(tokens[s], host, count, width, speed, quota[s], load[s], order)
        level[s] = augment(flat, host, count, width, speed, quota[s], load[s], parent, seen, tight[s])
    return level


def optimal_quota(slots: Int32, tokens: Int64, speed: Float64) -> tuple[Int64, Bool]:
    """The split of least largest load per speed, exactly, for one scenario or several.

    Args:
        slots: int32[devices, width], a valid layout.
        tokens: int64[scenarios, experts].
        speed: float64[devices], all positive.

    Returns:
        quota int64[scenarios, devices, width], tokens that each slot computes, and tight bool[scenarios, devices], a
        set of devices that no split relieves.
    """
    devices, width = slots.shape
    scenarios = len(tokens)
    quota = np.empty((scenarios, devices * width), np.int64)
    load = np.empty((scenarios, devices), np.int64)
    tight = np.empty((scenarios, devices), np.bool_)
    # Copies are in C order and may be written to, so the kernel is compiled once for all callers.
    split_all(np.array(slots, order="C"), np.array(tokens, order="C"), np.array(speed), quota, load, tight)
    return quota.reshape(scenarios, devices, width), tight
