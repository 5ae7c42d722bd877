"""Which source sends how many of its tokens to which replica, when each replica's quota is known.

Distances are nested: same device, same node, anywhere. So serving nearer pairs first, in any order within a distance,
moves the fewest tokens over every distance for the given quotas. There is one kernel, for cost model, spilling and
ranks alike, so that what a plan is judged by is what ranks do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["Groups", "Sources", "add_up", "device_tokens", "serve_replicas", "sort_sources", "source_tokens"]


class Sources(NamedTuple):
    """The sources by where they are. Those of device d are ``by_device[of_device[d]:of_device[d + 1]]``.

    Attributes:
        node: int64[devices], node of each device.
        by_device: int64[sources], sources in the order of their devices.
        of_device: int64[devices + 1].
        by_node: int64[sources], sources in the order of their nodes.
        of_node: int64[nodes + 1].
    """

    node: Int64
    by_device: Int64
    of_device: Int64
    by_node: Int64
    of_node: Int64


def sort_sources(source_device: Int32 | Int64, node: Int32) -> Sources:
    """The sources by where they are.

    Args:
        source_device: int[sources], device of each source.
        node: int32[devices], node of each device.
    """
    device = np.asarray(source_device, np.int64)
    of_node = np.asarray(node, np.int64)[device]
    nodes = int(node.max()) + 1
    return Sources(
        np.asarray(node, np.int64),
        np.argsort(device, kind="stable"),
        np.concatenate([[0], np.cumsum(np.bincount(device, minlength=len(node)))]).astype(np.int64),
        np.argsort(of_node, kind="stable"),
        np.concatenate([[0], np.cumsum(np.bincount(of_node, minlength=nodes))]).astype(np.int64),
    )


class Groups(NamedTuple):
    """Replicas by expert, for the experts that need a decision.

    Attributes:
        experts: int64[groups], the experts.
        start: int64[groups + 1]; the replicas of group g are ``order[start[g]:start[g + 1]]``.
        order: int64[replicas], in the order of service.
    """

    experts: Int64
    start: Int64
    order: Int64


@kernel
def _serve(
    replica: int,
    near: Int64,
    supply: Int64,
    need: Int64,
    sent: npt.NDArray[Any],
    left: npt.NDArray[Any],
) -> None:
    """Send tokens of the sources `near` to a replica until either side has none left."""
    for s in near:
        if need[replica] == 0:
            return
        tokens = min(supply[s], need[replica])
        supply[s] -= tokens
        need[replica] -= tokens
        sent[replica, s] += tokens
        left[s] -= tokens


@kernel
def _keep(need: int, near: Int64, supply: Int64) -> int:
    """Set tokens of the sources `near` aside for a home; what it still needs."""
    for s in near:
        if need == 0:
            return 0
        tokens = min(supply[s], need)
        supply[s] -= tokens
        need -= tokens
    return need


@kernel
def serve_replicas(
    sources: Sources,
    groups: Groups,
    device: npt.NDArray[Any],
    home: Int64,
    at_home: Int64,
    counts: npt.NDArray[Any],
    supply: Int64,
    need: Int64,
    sent: npt.NDArray[Any],
    left: npt.NDArray[Any],
) -> None:
    """Serve the replicas of each expert: all from their own device first, then from their node, then from anywhere.

    Args:
        sources: Where the sources are.
        groups: The experts, and their replicas.
        device: int[replicas], device of each replica.
        home: int64[experts], a device that keeps `at_home` of the tokens before replicas as near, and is not served.
        at_home: int64[experts], those tokens; 0 where there is no such device.
        counts: int[sources, experts].
        supply: int64[sources], scratch.
        need: int64[replicas], quota of each replica; 0 after, if there are enough tokens.
        sent: int[replicas, sources], added to.
        left: int[sources, experts], all counts before; what was not sent after.
    """
    by_device, of_device, by_node, of_node, node = (
        sources.by_device, sources.of_device, sources.by_node, sources.of_node, sources.node,
    )  # fmt: skip
    experts, start, order = groups.experts, groups.start, groups.order
    several_nodes = len(of_node) > 2
    for g in range(len(start) - 1):
        e = experts[g]
        column = left[:, e]
        for s in range(len(supply)):
            supply[s] = counts[s, e]
        d = home[e]
        rest = _keep(at_home[e], by_device[of_device[d] : of_device[d + 1]], supply)
        for i in range(start[g], start[g + 1]):
            d = device[order[i]]
            _serve(order[i], by_device[of_device[d] : of_device[d + 1]], supply, need, sent, column)
        if several_nodes:
            n = node[home[e]]
            _keep(rest, by_node[of_node[n] : of_node[n + 1]], supply)
            for i in range(start[g], start[g + 1]):
                n = node[device[order[i]]]
                _serve(order[i], by_node[of_node[n] : of_node[n + 1]], supply, need, sent, column)
        for i in range(start[g], start[g + 1]):
            _serve(order[i], by_device, supply, need, sent, column)


@kernel
def source_tokens(sources: Sources, tokens: Int64, quota: Int64, start: Int32, device: Int32) -> Int64:
    """int64[scenarios, replicas, sources]: tokens that each replica of a layout gets from each source.

    Args:
        sources: Where the sources are.
        tokens: int64[scenarios, sources, experts].
        quota: int64[scenarios, replicas], in the order of `Layout.hosts`.
        start: int32[experts + 1], see `Hosts`.
        device: int32[replicas], see `Hosts`.
    """
    scenarios, count, _ = tokens.shape
    sent = np.zeros((scenarios, len(device), count), np.int64)
    for s in range(scenarios):
        _serve_all(sources, tokens[s], quota[s], start, device, sent[s])
    return sent


@kernel
def device_tokens(
    sources: Sources, tokens: Int64, quota: Int64, start: Int32, device: Int32, source_device: Int32
) -> Int64:
    """int64[scenarios, devices, devices]: tokens from each device to each; for the arguments see `source_tokens`.

    What each source sends to each replica is known for one scenario at a time: for all, it is the most memory by far.
    """
    scenarios, count, _ = tokens.shape
    between = np.zeros((scenarios, len(sources.node), len(sources.node)), np.int64)
    sent = np.empty((len(device), count), np.int64)
    for s in range(scenarios):
        sent[:] = 0
        _serve_all(sources, tokens[s], quota[s], start, device, sent)
        add_up(sent, source_device, device, between[s])
    return between


@kernel
def add_up(sent: Int64, source_device: Int32, device: Int32, between: Int64) -> None:
    """Add int64[replicas, sources] to int64[devices, devices], tokens from each device to each."""
    for j in range(sent.shape[0]):
        for i in range(sent.shape[1]):
            between[source_device[i], device[j]] += sent[j, i]


@kernel
def _serve_all(sources: Sources, tokens: Int64, quota: Int64, start: Int32, device: Int32, sent: Int64) -> None:
    """`source_tokens` of one scenario, added to `sent`, int64[replicas, sources]."""
    count, experts = tokens.shape
    supply, nowhere = np.empty(count, np.int64), np.zeros(experts, np.int64)
    groups = Groups(np.arange(experts), start.astype(np.int64), np.arange(len(device)))
    serve_replicas(sources, groups, device, nowhere, nowhere, tokens, supply, quota.copy(), sent, tokens.copy())
