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

__all__ = ["Sources", "serve_replicas", "sort_sources", "source_tokens"]


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


def sort_sources(source_device: Int32, node: Int32) -> Sources:
    """The sources by where they are.

    Args:
        source_device: int32[sources], device of each source.
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


@kernel
def _serve(replica: int, near: Int64, supply: Int64, need: Int64, sent: npt.NDArray[Any]) -> None:
    """Send tokens of the sources `near` to a replica until either side has none left."""
    for s in near:
        if need[replica] == 0:
            return
        tokens = min(supply[s], need[replica])
        supply[s] -= tokens
        need[replica] -= tokens
        sent[s, replica] += tokens


@kernel
def serve_replicas(sources: Sources, device: Int32, supply: Int64, need: Int64, sent: npt.NDArray[Any]) -> None:
    """Serve the replicas of one expert: all from their own device first, then from their node, then from anywhere.

    Args:
        sources: Where the sources are.
        device: int[replicas], device of each replica, in the order of service.
        supply: int64[sources], the expert's tokens of each source; what nobody needed is left.
        need: int64[replicas], quota of each replica; 0 after, if there are enough tokens.
        sent: int[sources, replicas], added to.
    """
    replicas = len(need)
    for r in range(replicas):
        d = device[r]
        _serve(r, sources.by_device[sources.of_device[d] : sources.of_device[d + 1]], supply, need, sent)
    if len(sources.of_node) > 2:
        for r in range(replicas):
            n = sources.node[device[r]]
            _serve(r, sources.by_node[sources.of_node[n] : sources.of_node[n + 1]], supply, need, sent)
    for r in range(replicas):
        _serve(r, sources.by_device, supply, need, sent)


@kernel
def source_tokens(sources: Sources, tokens: Int64, quota: Int64, start: Int32, device: Int32) -> Int64:
    """int64[scenarios, sources, replicas]: tokens from each source to each replica of a layout.

    Args:
        sources: Where the sources are.
        tokens: int64[scenarios, sources, experts].
        quota: int64[scenarios, replicas], in the order of `Layout.hosts`.
        start: int32[experts + 1], see `Hosts`.
        device: int32[replicas], see `Hosts`.
    """
    scenarios, count, experts = tokens.shape
    sent = np.zeros((scenarios, count, len(device)), np.int64)
    supply = np.empty(count, np.int64)
    for s in range(scenarios):
        need = quota[s].copy()
        for e in range(experts):
            first, last = start[e], start[e + 1]
            for i in range(count):
                supply[i] = tokens[s, i, e]
            if last - first == 1:
                sent[s, :, first] = supply
            else:
                serve_replicas(sources, device[first:last], supply, need[first:last], sent[s, :, first:last])
    return sent
