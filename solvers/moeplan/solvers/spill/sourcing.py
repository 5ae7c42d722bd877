"""Which source sends its tokens to which replica, given how many tokens each replica computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["Places", "Quotas", "Scratch", "source_tokens"]


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
        node: int64[devices].
        by_device: int64[sources], sources sorted by device; those of d are ``of_device[d]:of_device[d + 1]``.
        of_device: int64[devices + 1].
        by_node: int64[sources], sources sorted by node; those of n are ``of_node[n]:of_node[n + 1]``.
        of_node: int64[nodes + 1].
    """

    home: Int64
    node: Int64
    by_device: Int64
    of_device: Int64
    by_node: Int64
    of_node: Int64


class Scratch(NamedTuple):
    """Workspace of `source_tokens`.

    Attributes:
        head: int64[experts], all -1 before and after: an expert's first replica.
        following: int64[slots], the next replica of the same expert.
        supply: int64[sources].
        need: int64[slots].
    """

    head: Int64
    following: Int64
    supply: Int64
    need: Int64


@kernel
def serve(
    replica: int,
    expert: int,
    sources: Int64,
    supply: Int64,
    need: Int64,
    sent: npt.NDArray[Any],
    kept: npt.NDArray[Any],
) -> None:
    """Send tokens of these sources to a transient replica until either side has none left."""
    for s in sources:
        if need[replica] == 0:
            return
        tokens = min(supply[s], need[replica])
        supply[s] -= tokens
        need[replica] -= tokens
        sent[replica, s] += tokens
        kept[s, expert] -= tokens


@kernel
def stay(need: int, sources: Int64, supply: Int64) -> int:
    """Reserve tokens of these sources for the home, where all tokens are to begin with; what it still needs."""
    for s in sources:
        tokens = min(supply[s], need)
        supply[s] -= tokens
        need -= tokens
    return need


@kernel
def source_tokens(
    counts: npt.NDArray[Any],
    replicas: int,
    quotas: Quotas,
    places: Places,
    scratch: Scratch,
    sent: npt.NDArray[Any],
    kept: npt.NDArray[Any],
) -> None:
    """Serve every replica from its own device first, then from its node, then from anywhere.

    Distances are nested (same device inside same node inside all), so serving nearer pairs first, in any order within
    a level, moves the fewest tokens over every level for the given quotas. Only replicated experts need a decision.

    Args:
        counts: int[sources, experts].
        replicas: Number of transient replicas.
        quotas: Who computes how many tokens.
        places: Where experts and sources are.
        scratch: Workspace.
        sent: int[slots, sources], out.
        kept: int[sources, experts], all counts before, what goes to the homes after.
    """
    expert, device, quota, home_quota = quotas.expert, quotas.device, quotas.quota, quotas.home_quota
    home, node, by_device, by_node = places.home, places.node, places.by_device, places.by_node
    of_device, of_node = places.of_device, places.of_node
    head, following, supply, need = scratch.head, scratch.following, scratch.supply, scratch.need
    sources = len(counts)
    for r in range(replicas - 1, -1, -1):
        for s in range(sources):
            sent[r, s] = 0
        need[r] = quota[r]
        following[r] = head[expert[r]]
        head[expert[r]] = r
    several_nodes = len(of_node) > 2
    for anchor in range(replicas):
        e = expert[anchor]
        if head[e] < 0:
            continue
        for s in range(sources):
            supply[s] = counts[s, e]
        d = home[e]
        at_home = stay(home_quota[e], by_device[of_device[d] : of_device[d + 1]], supply)
        r = head[e]
        while r >= 0:
            d = device[r]
            serve(r, e, by_device[of_device[d] : of_device[d + 1]], supply, need, sent, kept)
            r = following[r]
        if several_nodes:
            n = node[home[e]]
            stay(at_home, by_node[of_node[n] : of_node[n + 1]], supply)
            r = head[e]
            while r >= 0:
                n = node[device[r]]
                serve(r, e, by_node[of_node[n] : of_node[n + 1]], supply, need, sent, kept)
                r = following[r]
        r = head[e]
        while r >= 0:
            serve(r, e, by_device, supply, need, sent, kept)
            r = following[r]
        head[e] = -1
