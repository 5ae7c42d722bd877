"""Who reports for whom, so that thousands of ranks need not each hold a stream to the planner."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from moeplan.runtime_client.errors import AgreementError
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["Aggregation", "Reporting", "leaders"]

LayoutAndRule = tuple[Layout, SplitRule]

RULES = tuple(SplitRule)
"""By the number that they travel as."""

Reporting = Literal["rank", "node", "group"]
"""``rank``: each rank for itself; ``node``: the first rank of each node; ``group``: rank 0 for all."""

STATISTICS, LAYOUTS = 1, 2


def leaders(reporting: Reporting, nodes: Sequence[int]) -> list[int]:
    """The rank that reports for each rank.

    Args:
        reporting: How many streams there are.
        nodes: Node of each rank of the group.

    Raises:
        ProblemError: `reporting` is none of them.
    """
    match reporting:
        case "rank":
            return list(range(len(nodes)))
        case "node":
            return [list(nodes).index(node) for node in nodes]
        case "group":
            return [0] * len(nodes)
    raise ProblemError("reporting", reporting, "must be rank, node or group")


class Aggregation:
    """Counts from members to their leader, a step late so that nobody waits, and agreed layouts back.

    Args:
        leader: The rank that reports for each rank of the group.
        rank: This rank.
        group: gloo group of the ranks; None for a group of one.
        timeout: How long to wait for another rank.
    """

    def __init__(
        self, leader: Sequence[int], rank: int, group: dist.ProcessGroup | None, *, timeout: timedelta
    ) -> None:
        self._leader, self._rank, self._group, self._timeout = leader[rank], rank, group, timeout
        self.members = tuple(member for member, its in enumerate(leader) if its == rank)
        self._followers = [member for member in self.members if member != rank]
        self._works: list[dist.Work] = []
        self._counts: tuple[int, list[torch.Tensor]] | None = None

    @property
    def leads(self) -> bool:
        """True if this rank holds a stream."""
        return self._leader == self._rank

    def exchange(self, step: int, counts: Int64) -> tuple[int, Int64] | None:
        """Hand over a step's counts; every rank calls it in every step.

        Args:
            step: Training step.
            counts: int64[layers, experts], tokens of this rank.

        Returns:
            On a leader, the step before and its counts, int64[layers, members, experts]; None on the others, and at
            first. A leader without followers gets the same step back.

        Raises:
            AgreementError: a rank did not take part in time.
        """
        if self.leads and not self._followers:
            return step, counts[:, np.newaxis]
        before = self._collect()
        own = torch.from_numpy(np.array(counts))  # a copy, as counts may be read-only
        if self.leads:
            table = {member: torch.empty_like(own) for member in self._followers}
            self._works = [self._receive(part, member, STATISTICS) for member, part in table.items()]
            self._counts = step, [(table | {self._rank: own})[member] for member in self.members]
        else:
            self._works = [self._send(own, self._leader, STATISTICS)]
            self._counts = step, [own]  # held until it is sent
        return before

    def share(
        self, plan: Sequence[LayoutAndRule] | None, shape: tuple[int, int, int], experts: int
    ) -> tuple[LayoutAndRule, ...]:
        """Give the agreed plan to those that follow.

        Args:
            plan: One entry per layer on a leader; None on the others.
            shape: (layers, devices, most slots of a device).
            experts: Number of experts.
        """
        layers, devices, width = shape
        # The slots of each layer, then its rule. As wide everywhere: all ranks hold the same tables.
        table = np.full((layers, devices * width + 1), -1, np.int32)
        if plan is None:
            self._finish([self._receive(torch.from_numpy(table), self._leader, LAYOUTS)])
        else:
            for row, (layout, rule) in zip(table, plan, strict=True):
                row[:-1].reshape(devices, width)[:, : layout.slots.shape[1]] = layout.slots
                row[-1] = RULES.index(rule)
            self._finish([self._send(torch.from_numpy(table), member, LAYOUTS) for member in self._followers])
        return tuple((Layout(row[:-1].reshape(devices, width), experts), RULES[row[-1]]) for row in table)

    def finish(self) -> tuple[int, Int64] | None:
        """Wait for what is under way; on a leader, the last step's counts."""
        return self._collect()

    def _collect(self) -> tuple[int, Int64] | None:
        works, self._works = self._works, []
        self._finish(works)
        counts, self._counts = self._counts, None
        if counts is None or not self.leads:
            return None
        step, parts = counts
        return step, torch.stack(parts, dim=1).numpy()

    def _send(self, tensor: torch.Tensor, rank: int, tag: int) -> dist.Work:
        work = dist.isend(tensor, group=self._group, group_dst=rank, tag=tag)
        assert work is not None
        return work

    def _receive(self, tensor: torch.Tensor, rank: int, tag: int) -> dist.Work:
        work = dist.irecv(tensor, group=self._group, group_src=rank, tag=tag)
        assert work is not None
        return work

    def _finish(self, works: Sequence[dist.Work]) -> None:
        for work in works:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                limit = self._timeout.total_seconds()
                raise AgreementError(f"statistics or layouts did not pass within {limit:.0f} s: {error}") from error
