"""Limits that no layout can respect, found before any search, and said so that one sees what to change."""

from __future__ import annotations

import numpy as np

from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.limits import Limits, few

__all__ = ["check_contradictions"]


def check_contradictions(limits: Limits, capacity: Int32, *, lost: bool) -> None:
    """Refuse limits that contradict each other or the slots.

    Args:
        limits: The limits.
        capacity: int32[devices], replicas that each device can hold.
        lost: Whether there is a layout in force, which may have lost experts with a device.

    Raises:
        InfeasibleError: no layout respects them; the message names the experts or devices, and by how much.
    """
    if not limits.free:
        _check_pins(limits, capacity)
        _check_regions(limits, capacity)
        _check_room(limits, capacity)
    if lost:
        _check_lost(limits)


def _check_pins(limits: Limits, capacity: Int32) -> None:
    both = limits.must & ~limits.may
    if both.any():
        device, expert = (int(i) for i in np.argwhere(both)[0])
        why = "has no slots" if capacity[device] == 0 else "is forbidden there (constraints.forbidden)"
        raise InfeasibleError("constraints.pinned", f"expert {expert} to device {device}", why)
    pins = limits.must.sum(axis=1)
    if (pins > capacity).any():
        device = int(np.argmax(pins > capacity))
        reason = f"has room for {capacity[device]}; unpin some or add slots"
        raise InfeasibleError("constraints.pinned", f"{pins[device]} experts to device {device}", reason)
    replicas = limits.must.sum(axis=0)
    if (replicas > limits.most).any():
        expert = int(np.argmax(replicas > limits.most))
        reason = f"constraints.min_tokens allows {limits.most[expert]} replicas; unpin some or lower it"
        raise InfeasibleError("constraints.pinned", f"expert {expert} to {replicas[expert]} devices", reason)


def _check_regions(limits: Limits, capacity: Int32) -> None:
    if limits.regions == 1:
        return
    units = int(limits.unit.max()) + 1
    size = limits.may.shape[1] // units
    room = np.bincount(limits.region, capacity).astype(np.int64) // size
    if room.sum() < units:
        what = "expert groups" if size > 1 else "experts"
        raise InfeasibleError(
            "constraints.groups_on_node" if size > 1 else "constraints.domain",
            f"{units} {what} of {size} experts in {limits.regions} regions",
            f"these have room for {room.sum()}; add slots, or allow replicas anywhere",
        )
    device, expert = np.nonzero(limits.must)
    home = np.full(units, -1, np.int64)
    for d, e in zip(device, expert, strict=True):
        u = limits.unit[e]
        if home[u] not in (-1, limits.region[d]):
            where = "one node" if size > 1 else "one domain"
            raise InfeasibleError("constraints.pinned", f"expert {e} to device {d}", f"its replicas must be on {where}")
        home[u] = limits.region[d]


def _check_room(limits: Limits, capacity: Int32) -> None:
    """Hall's condition: any set of experts finds as many slots among the devices that it may use."""
    free = capacity - limits.must.sum(axis=1)
    loose = np.flatnonzero(~limits.must.any(axis=0))
    if (free @ limits.may[:, loose] >= len(loose)).all():  # each finds one whatever the others have
        return
    from scipy.sparse import csr_matrix  # takes a while to import
    from scipy.sparse.csgraph import maximum_bipartite_matching

    slot_device = np.repeat(np.arange(limits.may.shape[0]), free)
    open_ = limits.may[slot_device][:, loose]  # [slots, experts]
    slot_of = maximum_bipartite_matching(csr_matrix(open_.T), perm_type="column")
    if (slot_of >= 0).all():
        return
    # From an expert without a slot, alternate to the slots that it may use and the experts that have those.
    owner = np.full(len(slot_device), -1)
    owner[slot_of[slot_of >= 0]] = np.flatnonzero(slot_of >= 0)
    crowd = [int(np.flatnonzero(slot_of < 0)[0])]
    seen_slots = np.zeros(len(slot_device), np.bool_)
    for expert in crowd:
        for slot in np.flatnonzero(open_[:, expert] & ~seen_slots):
            seen_slots[slot] = True
            crowd.append(int(owner[slot]))
    experts = np.sort(loose[crowd]).tolist()
    devices = np.unique(slot_device[seen_slots]).tolist()
    raise InfeasibleError(
        "constraints.forbidden",
        f"experts {few(experts)} only on devices {few(devices)}",
        f"{len(experts)} experts, but {int(seen_slots.sum())} slots are free there; allow more pairs or add slots",
    )


def _check_lost(limits: Limits) -> None:
    lost = int((~np.logical_or.reduce(limits.held)).sum())
    device, expert = np.nonzero(limits.must)
    pins = len(np.unique(expert[~limits.held[device, expert]]))
    needed = max(lost, pins)
    if needed > limits.max_arrivals:
        raise InfeasibleError(
            "max_moves",
            limits.max_arrivals,
            f"{needed} experts must be loaded anew (lost with their device, or pinned); allow at least as many",
        )
