"""Limits as kernels read them, and the count of arrivals that a search keeps while it edits a layout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Int32, Int64
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.problem.limits import Limits

__all__ = ["Arrivals", "LimitArrays", "arrivals_of", "arrive", "limit_arrays", "may_arrive"]


class LimitArrays(NamedTuple):
    """The attributes of `Limits`, narrowed to one region per unit."""

    capacity: Int32
    may: Bool
    must: Bool
    most: Int32
    held: Bool
    far: Bool
    node: Int32
    max_arrivals: int
    device_arrivals: Int64
    node_arrivals: Int64


class Arrivals(NamedTuple):
    """Arrivals of a layout so far: int64[1] in all, int64[devices], and int64[nodes] far ones."""

    total: Int64
    device: Int64
    node: Int64


def limit_arrays(limits: Limits) -> LimitArrays:
    """Limits as kernels read them, narrowed to one region per unit."""
    return LimitArrays(*(getattr(limits, name) for name in LimitArrays._fields))


@kernel
def arrivals_of(placed: Bool, limits: LimitArrays) -> Arrivals:
    """The arrivals of a layout, bool[devices, experts]."""
    devices, experts = placed.shape
    arrivals = Arrivals(
        np.zeros(1, np.int64), np.zeros(devices, np.int64), np.zeros(len(limits.node_arrivals), np.int64)
    )
    for d in range(devices):
        for e in range(experts):
            if placed[d, e]:
                arrive(d, e, limits, arrivals)
    return arrivals


@inner_kernel
def arrive(d: int, e: int, limits: LimitArrays, arrivals: Arrivals) -> None:
    """Count a replica of expert `e` on device `d`, if it is not there now."""
    if not limits.held[d, e]:
        arrivals.total[0] += 1
        arrivals.device[d] += 1
        arrivals.node[limits.node[d]] += limits.far[d, e]


@inner_kernel
def may_arrive(d: int, e: int, limits: LimitArrays, arrivals: Arrivals) -> bool:
    """True if a further replica of expert `e` on device `d` stays within the limits of arrivals."""
    if limits.held[d, e]:
        return True
    n = limits.node[d]
    return (
        arrivals.total[0] < limits.max_arrivals
        and arrivals.device[d] < limits.device_arrivals[d]
        and arrivals.node[n] + limits.far[d, e] <= limits.node_arrivals[n]
    )
