"""One step of a search: two replicas change places, or one takes the place of a redundant one; and the way back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.limit_kernels import Arrivals, LimitArrays
from moeplan.solvers.search.random import next_random
from moeplan.solvers.split.flow import host_table

__all__ = ["Change", "Draft", "Exchange", "apply", "change_of", "draft_of", "exchange_of", "record", "undo", "within"]


class Draft(NamedTuple):
    """A layout that a search edits in place; see `flow` for the first three.

    Attributes:
        slots: int32[positions], expert at each position ``device * width + slot``.
        host: int32[experts, devices], positions of each expert's replicas.
        replicas: int32[experts], their number.
        on: bool[devices, experts], which device holds which expert.
        width: Slots of a device.
    """

    slots: Int32
    host: Int32
    replicas: Int32
    on: Bool
    width: int


class Exchange(NamedTuple):
    """Expert `a` goes from position `p` to position `q`, and `b` from `q` to `p`.

    Attributes:
        a: Expert at `p`.
        b: Expert at `q`.
        p: Position on device `dp`.
        q: Position on device `dq`.
        dp: Another device than `dq`.
        dq: The device that receives `a`.
        replace: Whether `p` keeps `a`, so that `a` gains a replica and `b` loses one.
    """

    a: int
    b: int
    p: int
    q: int
    dp: int
    dq: int
    replace: bool


class Change(NamedTuple):
    """What an exchange adds to the arrivals at both devices, and to the far ones at their nodes.

    On one node, `far_q` counts both devices.
    """

    arrivals: int
    at_p: int
    at_q: int
    far_p: int
    far_q: int


@kernel
def draft_of(slots: Int32, experts: int) -> Draft:
    """A draft that starts as a layout, int32[devices, width]."""
    devices, width = slots.shape
    flat = slots.copy().reshape(-1)
    host, count = host_table(flat, experts, devices)
    on = np.zeros((devices, experts), np.bool_)
    for position in range(len(flat)):
        if flat[position] >= 0:
            on[position // width, flat[position]] = True
    return Draft(flat, host, count, on, width)


@kernel
def exchange_of(p: int, q: int, draft: Draft, limits: LimitArrays, state: Int64) -> tuple[bool, Exchange]:
    """The exchange of two positions, and whether pairs and numbers of replicas allow it.

    Where `b` is redundant and `a` may have a further replica, a draw says whether `a` replaces `b`.
    """
    slots, replicas, on, width = draft.slots, draft.replicas, draft.on, draft.width
    may, must, most = limits.may, limits.must, limits.most
    a, b = slots[p], slots[q]
    dp, dq = p // width, q // width
    replace = False
    allowed = a >= 0 and b >= 0 and a != b and dp != dq and _may_take(dq, a, b, on, may, must)
    if allowed:
        replace = replicas[b] > 1 and replicas[a] < most[a] and next_random(state) % 2 == 0
        allowed = replace or _may_take(dp, b, a, on, may, must)
    return allowed, Exchange(a, b, p, q, dp, dq, replace)


@kernel
def _may_take(d: int, e: int, old: int, on: Bool, may: Bool, must: Bool) -> bool:
    """Whether device `d` may hold expert `e` in place of expert `old`."""
    return not on[d, e] and may[d, e] and not must[d, old]


@kernel
def change_of(x: Exchange, limits: LimitArrays) -> Change:
    """What an exchange adds to the arrivals."""
    held, far, node = limits.held, limits.far, limits.node
    at_q = int(held[x.dq, x.b]) - int(held[x.dq, x.a])
    far_q = int(far[x.dq, x.a]) - int(far[x.dq, x.b])
    at_p, far_p = 0, 0
    if not x.replace:
        at_p = int(held[x.dp, x.a]) - int(held[x.dp, x.b])
        far_p = int(far[x.dp, x.b]) - int(far[x.dp, x.a])
    if node[x.dp] == node[x.dq]:
        far_q, far_p = far_q + far_p, 0
    return Change(at_p + at_q, at_p, at_q, far_p, far_q)


@kernel
def _fits(change: int, now: int, limit: int) -> bool:
    """Whether a limit allows a change; what gives arrivals back is always allowed."""
    return change <= 0 or now + change <= limit


@kernel
def within(x: Exchange, change: Change, limits: LimitArrays, arrivals: Arrivals) -> bool:
    """Whether an exchange keeps every limit of arrivals."""
    node_p, node_q = limits.node[x.dp], limits.node[x.dq]
    return (
        _fits(change.arrivals, arrivals.total[0], limits.max_arrivals)
        and _fits(change.at_q, arrivals.device[x.dq], limits.device_arrivals[x.dq])
        and _fits(change.at_p, arrivals.device[x.dp], limits.device_arrivals[x.dp])
        and _fits(change.far_q, arrivals.node[node_q], limits.node_arrivals[node_q])
        and _fits(change.far_p, arrivals.node[node_p], limits.node_arrivals[node_p])
    )


@kernel
def record(x: Exchange, change: Change, limits: LimitArrays, arrivals: Arrivals) -> None:
    """Count the arrivals of an exchange that is kept."""
    arrivals.total[0] += change.arrivals
    arrivals.device[x.dq] += change.at_q
    arrivals.device[x.dp] += change.at_p
    arrivals.node[limits.node[x.dq]] += change.far_q
    arrivals.node[limits.node[x.dp]] += change.far_p


@kernel
def apply(x: Exchange, draft: Draft) -> None:
    """Make an exchange."""
    _put(x.a, x.q, x.dq, draft)
    if not x.replace:
        _put(x.b, x.p, x.dp, draft)


@kernel
def undo(x: Exchange, draft: Draft) -> None:
    """Take back the exchange that was made last."""
    _put(x.b, x.q, x.dq, draft)
    if not x.replace:
        _put(x.a, x.p, x.dp, draft)


@kernel
def _put(e: int, position: int, d: int, draft: Draft) -> None:
    """Replace whatever is at `position`, on device `d`, by expert `e`."""
    old = draft.slots[position]
    last = draft.replicas[old] - 1
    for i in range(last):
        if draft.host[old, i] == position:
            draft.host[old, i] = draft.host[old, last]
            break
    draft.replicas[old] = last
    draft.host[e, draft.replicas[e]] = position
    draft.replicas[e] += 1
    draft.slots[position] = e
    draft.on[d, old] = False
    draft.on[d, e] = True
