"""Which source sends its tokens to which transient replica, and which stay with the homes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.split.sources import Groups, Sources, serve_replicas

__all__ = ["Places", "Quotas", "Scratch", "source_spill"]


class Quotas(NamedTuple):
    """Who computes how many tokens.

    Attributes:
        expert: int64[slots], expert of each transient replica.
        device: int64[slots], its device.
        quota: int64[slots], its tokens.
        home_quota: int64[experts], tokens that stay at home.
    """

    expert: Int64
    device: Int64
    quota: Int64
    home_quota: Int64


class Places(NamedTuple):
    """Where experts and sources are.

    Attributes:
        home: int64[experts], device.
        sources: The sources by where they are.
    """

    home: Int64
    sources: Sources


class Scratch(NamedTuple):
    """Workspace of `source_spill`.

    Attributes:
        group: int64[experts], all -1 before and after: an expert's group.
        groups: Arrays of `slots` entries and more, for as many groups.
        cursor: int64[slots], where the next replica of a group goes.
        supply: int64[sources].
        need: int64[slots].
    """

    group: Int64
    groups: Groups
    cursor: Int64
    supply: Int64
    need: Int64


@kernel
def _group(expert: Int64, replicas: int, scratch: Scratch) -> int:
    """Group the transient replicas by expert, in order; the number of groups."""
    group, cursor = scratch.group, scratch.cursor
    experts, start, order = scratch.groups.experts, scratch.groups.start, scratch.groups.order
    count = 0
    for r in range(replicas):
        e = expert[r]
        if group[e] < 0:
            group[e] = count
            experts[count] = e
            cursor[count] = 0
            count += 1
        cursor[group[e]] += 1
    start[0] = 0
    for g in range(count):
        start[g + 1] = start[g] + cursor[g]
        cursor[g] = start[g]
    for r in range(replicas):
        g = group[expert[r]]
        order[cursor[g]] = r
        cursor[g] += 1
    for g in range(count):
        group[experts[g]] = -1
    return count


@kernel
def source_spill(
    counts: npt.NDArray[Any],
    replicas: int,
    quotas: Quotas,
    places: Places,
    scratch: Scratch,
    sent: npt.NDArray[Any],
    kept: npt.NDArray[Any],
) -> None:
    """Serve the transient replicas of every expert that has some; `split.sources` says how.

    Args:
        counts: int[sources, experts].
        replicas: Number of transient replicas.
        quotas: Who computes how many tokens.
        places: Where experts and sources are.
        scratch: Workspace.
        sent: int[slots, sources], out.
        kept: int[sources, experts], all counts before, what goes to the homes after.
    """
    experts, order = scratch.groups.experts, scratch.groups.order
    count = _group(quotas.expert, replicas, scratch)
    groups = Groups(experts, scratch.groups.start[: count + 1], order)
    quota = quotas.quota
    supply, need = scratch.supply, scratch.need
    for r in range(replicas):
        need[r] = quota[r]
        for s in range(len(supply)):  # faster than a slice
            sent[r, s] = 0
    serve_replicas(
        places.sources, groups, quotas.device, places.home, quotas.home_quota, counts, supply, need, sent, kept
    )
