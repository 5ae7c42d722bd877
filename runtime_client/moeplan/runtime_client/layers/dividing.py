"""Dividing a micro-batch among the replicas of a layout, as the plan says: from exact counts, alike on every rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec
from moeplan.solvers.problem.split_rules import RANK_RULES, SplitRule, split_rule
from moeplan.solvers.split.rules import Fabric, Split, divide, route

__all__ = ["Division", "PlannedLayer", "of_rank"]


class Division:
    """A split rule on a cluster whose device i is rank i. It computes what the planner's cost model assumes.

    Args:
        cluster: The ranks' devices.
        expert: What replicas and tokens occupy, where the memory of the cluster limits a split.
        rule: One of `RANK_RULES`.

    Attributes:
        fingerprint: Equal on ranks that divide alike.

    Raises:
        ProblemError: there is no such rule, or it takes too long for ranks.
    """

    def __init__(self, cluster: Cluster, expert: ExpertSpec, rule: SplitRule | str) -> None:
        self.rule = split_rule("split_rule", rule, RANK_RULES)
        self.cluster, self.expert = cluster, expert
        self._fabric = Fabric(cluster, np.arange(cluster.devices, dtype=np.int32), expert)
        told = (cluster.speed, cluster.node, cluster.memory_bytes)
        occupied = b"" if cluster.memory_bytes is None else repr(expert).encode()
        arrays = (array.tobytes() for array in told if array is not None)
        self.fingerprint = fingerprint(self.rule.encode(), *arrays, occupied)

    def divide(self, layout: Layout, counts: Int64) -> Split:
        """The split of counts, int64[ranks, experts], as of one scenario."""
        return divide(self._fabric, layout, counts[np.newaxis], self.rule)

    def sent(self, layout: Layout, counts: Int64) -> Int64:
        """int64[ranks, replicas]: tokens from each rank to each replica, in the order of ``layout.hosts``."""
        (sent,) = route(self._fabric, layout, counts[np.newaxis], self.divide(layout, counts))
        return sent

    def of_rank(self, layout: Layout, counts: Int64, rank: int) -> tuple[Int64, Int64]:
        """A rank's part of counts, int64[ranks, experts].

        Returns:
            (send, receive): int64[devices, width] tokens from `rank` to each slot, and int64[devices, width] tokens
            from each source to the slots of `rank`.
        """
        sent = self.sent(layout, counts)
        return of_rank(sent, layout.hosts.device, layout.hosts.slot, layout.slots.shape[1], rank)


class PlannedLayer(NamedTuple):
    """One layer of a plan: where replicas live, and how tokens are divided among them."""

    layout: Layout
    division: Division


@kernel
def of_rank(sent: Int64, device: Int32, slot: Int32, width: int, rank: int) -> tuple[Int64, Int64]:
    """Rows that `rank` sends and receives of ``sent[source, replica]``; a replica is in ``slot`` of ``device``.

    What several replicas there get is added up. See `Division.of_rank` for the result.
    """
    send = np.zeros((len(sent), width), np.int64)
    receive = np.zeros((len(sent), width), np.int64)
    for r in range(len(device)):
        send[device[r], slot[r]] += sent[rank, r]
        if device[r] == rank:
            receive[:, slot[r]] += sent[:, r]
    return send, receive
