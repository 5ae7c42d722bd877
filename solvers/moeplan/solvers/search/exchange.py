"""One step of a search, and the way back.

Two replicas change places; or one takes the place of a redundant one, or an empty slot; or a redundant one goes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.solvers.problem.arrays import Bool, Int32, Int64
from moeplan.solvers.problem.kernel import inner_kernel, kernel
from moeplan.solvers.problem.limit_kernels import Arrivals, LimitArrays
from moeplan.solvers.problem.limits import NO_LIMIT
from moeplan.solvers.search.random import next_random
from moeplan.solvers.split.flow import host_table

__all__ = [
    "Change",
    "Draft",
    "Exchange",
    "apply",
    "change_of",
    "draft_of",
    "exchange_of",
    "record",
    "removal_of",
    "undo",
    "within",
]


GIVE_UP = 8
"""One in so many draws of a redundant replica that would arrive gives it up, where arrivals are limited."""


class Draft(NamedTuple):
    """A layout that a search edits in place; see `flow` for the first three.

    Attributes:
        slots: int32[positions], expert at each position ``device * width + slot``.
        host: int32[experts, devices], positions of each expert's replicas.
        replicas: int32[experts], their number.
        on: bool[devices, experts], which device holds which expert.
        used: int64[devices], replicas of each device.
        width: Slots of a device.
    """

    slots: Int32
    host: Int32
    replicas: Int32
    on: Bool
    used: Int64
    width: int


class Exchange(NamedTuple):
    """Expert `a` goes from position `p` to position `q`, and `b` from `q` to `p`.

    Attributes:
        a: Expert at `p`; -1 where `b` only goes.
        b: Expert at `q`; -1 where the slot is empty.
        p: Position on device `dp`; `q` where `b` only goes.
        q: Position on device `dq`.
        dp: Another device than `dq`, but where `b` only goes.
        dq: The device that receives `a`.
        replace: Whether `p` stays as it is, so that `a` gains a replica and `b` loses one.
    """

    a: int
    b: int
    p: int
    q: int
    dp: int
    dq: int
    replace: bool


class Change(NamedTuple):
    """Arrivals that an exchange adds at both devices, and far ones at their nodes.

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
    used = np.zeros(devices, np.int64)
    for position in range(len(flat)):
        if flat[position] >= 0:
            on[position // width, flat[position]] = True
            used[position // width] += 1
    return Draft(flat, host, count, on, used, width)


@inner_kernel
def exchange_of(p: int, q: int, draft: Draft, limits: LimitArrays, state: Int64) -> tuple[bool, Exchange]:
    """The exchange of two positions, and whether pairs and numbers of replicas allow it.

    Where `b` is redundant, or the slot empty, and `a` may have a further replica, a draw says whether `p` keeps `a`.
    Where arrivals are limited, another says whether a redundant `b` that would arrive is given up.
    """
    slots, replicas, on, width = draft.slots, draft.replicas, draft.on, draft.width
    may, must, most = limits.may, limits.must, limits.most
    a, b = 0 + slots[p], 0 + slots[q]  # of the type of -1
    dp, dq = p // width, q // width
    replace = False
    redundant = b < 0 or replicas[b] > 1
    allowed = _may_go(dq, b, redundant, limits) and next_random(state) % GIVE_UP == 0
    if allowed:
        a, p, dp, replace = -1, q, dq, True
    elif a >= 0 and a != b and dp != dq and _may_take(dq, a, b, on, may, must):
        replace = redundant and replicas[a] < most[a] and next_random(state) % 2 == 0
        room = b >= 0 or draft.used[dq] < limits.capacity[dq]
        allowed = room and (replace or (not must[dp, a] if b < 0 else _may_take(dp, b, a, on, may, must)))
    return allowed, Exchange(a, b, p, q, dp, dq, replace)


@inner_kernel
def removal_of(q: int, draft: Draft, limits: LimitArrays) -> tuple[bool, Exchange]:
    """The exchange by which the replica at a position goes, and whether it is redundant and nobody asks for it."""
    b, d = 0 + draft.slots[q], q // draft.width
    allowed = b >= 0 and draft.replicas[b] > 1 and not limits.must[d, b]
    return allowed, Exchange(-1, b, q, q, d, d, True)


@inner_kernel
def _may_go(d: int, e: int, redundant: bool, limits: LimitArrays) -> bool:
    """True if a redundant replica of expert `e` on device `d` takes up a limited arrival, and nobody asks for it."""
    limited = redundant and e >= 0 and limits.max_arrivals < NO_LIMIT
    return limited and not limits.held[d, e] and not limits.must[d, e]


@inner_kernel
def _may_take(d: int, e: int, old: int, on: Bool, may: Bool, must: Bool) -> bool:
    """True if device `d` may hold expert `e` in place of expert `old`, or in an empty slot."""
    return not on[d, e] and may[d, e] and not (old >= 0 and must[d, old])


@inner_kernel
def change_of(x: Exchange, limits: LimitArrays) -> Change:
    """Arrivals that an exchange adds."""
    held, far, node = limits.held, limits.far, limits.node
    at_q = _arrives(x.dq, x.a, held) - _arrives(x.dq, x.b, held)
    far_q = _is_far(x.dq, x.a, far) - _is_far(x.dq, x.b, far)
    at_p, far_p = 0, 0
    if not x.replace:
        at_p = _arrives(x.dp, x.b, held) - _arrives(x.dp, x.a, held)
        far_p = _is_far(x.dp, x.b, far) - _is_far(x.dp, x.a, far)
    if node[x.dp] == node[x.dq]:
        far_q, far_p = far_q + far_p, 0
    return Change(at_p + at_q, at_p, at_q, far_p, far_q)


@inner_kernel
def _arrives(d: int, e: int, held: Bool) -> int:
    """1 where expert `e` would arrive at device `d`; 0 for no expert."""
    return int(e >= 0 and not held[d, e])


@inner_kernel
def _is_far(d: int, e: int, far: Bool) -> int:
    """1 where expert `e` would come to device `d` from another node; 0 for no expert."""
    return int(e >= 0 and far[d, e])


@inner_kernel
def _fits(change: int, now: int, limit: int) -> bool:
    """True if a limit allows a change; what gives arrivals back is always allowed."""
    return change <= 0 or now + change <= limit


@inner_kernel
def within(x: Exchange, change: Change, limits: LimitArrays, arrivals: Arrivals) -> bool:
    """True if an exchange keeps every limit of arrivals."""
    node_p, node_q = limits.node[x.dp], limits.node[x.dq]
    return (
        _fits(change.arrivals, arrivals.total[0], limits.max_arrivals)
        and _fits(change.at_q, arrivals.device[x.dq], limits.device_arrivals[x.dq])
        and _fits(change.at_p, arrivals.device[x.dp], limits.device_arrivals[x.dp])
        and _fits(change.far_q, arrivals.node[node_q], limits.node_arrivals[node_q])
        and _fits(change.far_p, arrivals.node[node_p], limits.node_arrivals[node_p])
    )


@inner_kernel
def record(x: Exchange, change: Change, limits: LimitArrays, arrivals: Arrivals) -> None:
    """Count the arrivals of an exchange that is kept."""
    arrivals.total[0] += change.arrivals
    arrivals.device[x.dq] += change.at_q
    arrivals.device[x.dp] += change.at_p
    arrivals.node[limits.node[x.dq]] += change.far_q
    arrivals.node[limits.node[x.dp]] += change.far_p


@inner_kernel
def apply(x: Exchange, draft: Draft) -> None:
    """Make an exchange."""
    _put(x.a, x.q, x.dq, draft)
    if not x.replace:
        _put(x.b, x.p, x.dp, draft)


@inner_kernel
def undo(x: Exchange, draft: Draft) -> None:
    """Take back the exchange that was made last."""
    _put(x.b, x.q, x.dq, draft)
    if not x.replace:
        _put(x.a, x.p, x.dp, draft)


@inner_kernel
def _put(e: int, position: int, d: int, draft: Draft) -> None:
    """Replace whatever is at `position`, on device `d`, by expert `e`; either may be -1, nothing."""
    old = draft.slots[position]
    if old >= 0:
        last = draft.replicas[old] - 1
        for i in range(last):
            if draft.host[old, i] == position:
                draft.host[old, i] = draft.host[old, last]
                break
        draft.replicas[old] = last
        draft.on[d, old] = False
        draft.used[d] -= 1
    if e >= 0:
        draft.host[e, draft.replicas[e]] = position
        draft.replicas[e] += 1
        draft.on[d, e] = True
        draft.used[d] += 1
    draft.slots[position] = e
