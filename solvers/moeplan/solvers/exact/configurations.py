"""A strong lower bound where spare slots are few: a linear program over configurations, by column generation.

By the theorem of `construct.partition` a layout of equal devices with largest load M is a partition of the experts
into groups, each on t devices of its own, with at most ``t (C - 1) + 1`` experts and at most ``t M`` load. Call such a
pair (t, experts) a configuration. If the cheapest fractional cover of all experts by configurations, where one costs
its t, needs more than D devices, then no layout reaches M. Bisection over M turns that into a bound, which sees what
the bounds of `bounds` miss: how hot and cold experts can be combined.

Pricing is a knapsack of two dimensions, load and number of experts, solved by dynamic programming over loads rounded
down to `GRID` parts of M, which only enlarges the set of configurations. Groups of more devices than the table holds
are bounded by the knapsack's linear relaxation. Any prices are a proof once scaled so that no configuration is worth
more than it costs (Farley, Operations Research 38, 1990), so the search may stop at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeplan.solvers.exact.highs import run_highs, silence
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["applies", "configuration_bounds"]

GRID = 128
"""Parts of M that loads are rounded down to in the knapsack."""

LARGER_GROUPS = 2
"""Devices of a group in the table beyond those that the hottest expert needs."""

MOST_CELLS = 60_000_000
"""Cells of the table beyond which an instance is left to the other bounds: half a second per knapsack."""

STEPS = 48
"""Halvings in search of the price of load."""

ROUNDS = 400
"""Most rounds of column generation for one M."""

EPSILON = 1e-7
"""Relative error that sums of prices may carry."""

TOLERANCE = 1e-3
"""Bisection stops when the bound is within this fraction of what it can reach."""


@kernel
def _best_configurations(
    units: Int64, price: Float64, grid: int, devices: int, width: int, taken: Bool, value: Float64
) -> Float64:
    """Fill the knapsack table for groups of up to `devices` devices.

    Args:
        units: int64[experts], loads in parts of M.
        price: float64[experts].
        grid: Parts of M.
        devices: Most devices of a group.
        width: Slots of a device.
        taken: bool[experts, most experts + 1, most load + 1], overwritten: whether the best set of the first experts
            with this number and load has the last of them.
        value: float64[most experts + 1, most load + 1], overwritten.

    Returns:
        float64[experts, devices]: the most that a group of 1.. devices is worth whose last expert is this one.
    """
    most, room = devices * (width - 1) + 1, devices * grid
    value[:] = 0.0
    last = np.full((len(units), devices), -1.0)
    for e in range(len(units)):
        u = units[e]
        for t in range(1, devices + 1):
            if t * grid >= u:
                last[e, t - 1] = price[e] + value[t * (width - 1), t * grid - u]
        for n in range(most, 0, -1):
            for load in range(room, u - 1, -1):
                with_e = value[n - 1, load - u] + price[e]
                better = with_e > value[n, load]
                taken[e, n, load] = better
                if better:
                    value[n, load] = with_e
            for load in range(min(u, room + 1)):
                taken[e, n, load] = False
    return last


@kernel
def _members(units: Int64, taken: Bool, grid: int, devices: int, width: int, last: int, member: Bool) -> None:
    """The experts of the best group of `devices` devices whose last expert is `last`, into bool[experts]."""
    member[:] = False
    member[last] = True
    n, load = devices * (width - 1), devices * grid - units[last]
    for e in range(last - 1, -1, -1):
        if n and taken[e, n, load]:
            member[e] = True
            n -= 1
            load -= units[e]


@kernel
def _relaxed(load: Float64, price: Float64, devices: int, width: int) -> tuple[float, Float64]:
    """The linear relaxation of the knapsack for a group of `devices` devices, with M = 1.

    For a price of load the best set is the most valuable experts that fit in number; bisection finds the price at which
    its load fits as well.

    Returns:
        An upper bound on the group's worth, and the fractions of the experts in it, which attain it.
    """
    places = devices * (width - 1) + 1
    low, high = 0.0, price.sum()
    part = np.zeros((2, len(price)))
    size = np.zeros(2)
    worth = np.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        net = price - middle * load
        order = np.argsort(-net, kind="mergesort")
        chosen = np.zeros(len(price))
        for e in order[:places]:
            if net[e] <= 0:
                break
            chosen[e] = 1.0
        worth = min(worth, middle * devices + (chosen * net).sum())
        filled = (chosen * load).sum()
        if filled > devices:
            low = middle
            part[0], size[0] = chosen, filled
        else:
            high = middle
            part[1], size[1] = chosen, filled
    mix = (devices - size[1]) / (size[0] - size[1]) if size[0] > devices else 0.0
    return worth, mix * part[0] + (1 - mix) * part[1]


def applies(experts: int, capacity: Int32, speed: Float64) -> bool:
    """True if the theorem covers these devices: all equal, and too few spare slots for perfect balance."""
    width = int(capacity[0])
    equal = bool((capacity == width).all() and (speed == speed[0]).all())
    return equal and experts > len(capacity) * (width - 1) + 1


def configuration_bounds(
    loads: Int64, devices: int, width: int, low: float, high: float, deadline: float | None = None
) -> Iterator[float]:
    """Ever better lower bounds on the largest load of any layout and split of one scenario on equal devices.

    Args:
        loads: int64[experts], ``devices * (width - 1) + 1 < experts <= devices * width``.
        devices: Number of equal devices of speed 1.
        width: Slots of each.
        low: A known lower bound.
        high: A load that some layout reaches.
        deadline: Time on `time.perf_counter` to end at.

    Yields:
        Values in [low, high], after each step of the bisection, until time runs out or no step is left.
    """
    pool = _Pool(np.sort(loads)[::-1].astype(np.float64), devices, width)
    while high > low * (1 + TOLERANCE):
        level = (low + high) / 2
        needed = pool.devices_needed(level, deadline)
        if needed is None:
            return
        if needed > devices * (1 + EPSILON):
            low = level
        else:
            high = level
        yield low


class _Pool:
    """Configurations found so far; they remain useful from one M to the next."""

    def __init__(self, hot: Float64, devices: int, width: int) -> None:
        self.hot, self.devices, self.width = hot, devices, width
        self.groups: list[tuple[int, Bool]] = []

    def devices_needed(self, level: float, deadline: float | None) -> float | None:
        """Devices that a fractional cover needs at least; more than there are is a proof. None if time ran out."""
        experts, devices, width = len(self.hot), self.devices, self.width
        units = np.floor(self.hot / level * GRID).astype(np.int64)
        largest = min(devices, int(np.ceil(self.hot[0] / level)) + LARGER_GROUPS)
        shape = (largest * (width - 1) + 2, largest * GRID + 1)
        if experts * shape[0] * shape[1] > MOST_CELLS:
            return None
        taken, value = np.empty((experts, *shape), np.bool_), np.empty(shape)
        master = self._master(units)
        best, anchor = 0.0, None
        slowest, begun = 0.0, time.perf_counter()
        for _ in range(ROUNDS):
            now = time.perf_counter()
            slowest, begun = max(slowest, now - begun), now
            if deadline is not None and now + slowest > deadline:  # a round is not interrupted
                return None
            run_highs(master)
            if master.getInfo().objective_function_value <= devices:
                return best
            duals = np.maximum(0.0, np.array(master.getSolution().row_dual))
            found = False
            # Prices between the best ones so far and the master's converge in fewer rounds (Wentges 1997).
            for price in (duals,) if anchor is None else ((duals + anchor) / 2, duals):
                last = _best_configurations(units, price, GRID, largest, width, taken, value)
                worth = max(0.0, (last / np.arange(1, largest + 1)).max())
                found = self._add_groups(master, units, duals, last, taken)
                if largest < devices:  # t + 1 devices stand for all larger groups: scaled down, those fit as well
                    relaxed, part = _relaxed(units / GRID, price, largest + 1, width)
                    worth = max(worth, relaxed / (largest + 1))
                    if part @ duals > (largest + 1) * (1 + EPSILON):
                        _add(master, largest + 1, part)
                        found = True
                if price.sum() > best * worth:
                    best, anchor = float(price.sum() / worth), price / worth
                if best > devices * (1 + EPSILON):
                    return best
                if found:
                    break
            if not found:
                break
        return best

    def _master(self, units: Int64) -> Any:
        """The cover by all configurations known to fit, and by every expert alone."""
        import highspy  # only where a proof is asked for

        silence()
        experts = len(units)
        master = highspy.Highs()
        master.setOptionValue("output_flag", False)
        master.setOptionValue("threads", 1)
        master.setOptionValue("simplex_strategy", 4)  # primal: new columns leave the basis feasible
        master.addRows(experts, np.ones(experts), np.full(experts, np.inf), 0, np.zeros(experts, np.int32), [], [])
        for e in range(experts):
            _add(master, max(1, int(np.ceil(units[e] / GRID))), np.eye(1, experts, e)[0])
        # A group may take the next lighter expert in place of one, so prices fall with load; saying so saves rounds.
        for e in range(experts - 1):
            master.addCol(0.0, 0.0, np.inf, 2, np.array([e, e + 1], np.int32), np.array([-1.0, 1.0]))
        for t, member in self.groups:
            if units[member].sum() <= t * GRID:
                _add(master, t, member.astype(np.float64))
        return master

    def _add_groups(self, master: Any, units: Int64, duals: Float64, last: Float64, taken: Bool) -> bool:
        """Add the best group that ends at each expert, where it is worth more than it costs at these duals."""
        found = False
        member = np.zeros(len(units), np.bool_)
        size = np.argmax(last - np.arange(1, last.shape[1] + 1), axis=1) + 1
        for e, t in enumerate(size.tolist()):
            if last[e, t - 1] < 0:
                continue
            _members(units, taken, GRID, t, self.width, e, member)
            if duals[member].sum() > t * (1 + EPSILON):
                self.groups.append((t, member.copy()))
                _add(master, t, member.astype(np.float64))
                found = True
        return found


def _add(master: Any, devices: int, part: Float64) -> None:
    rows = np.flatnonzero(part).astype(np.int32)
    master.addCol(float(devices), 0.0, np.inf, len(rows), rows, part[rows])
