"""The session that a training loop calls once per step: counts out, layouts in, in force on all ranks at once."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from types import TracebackType
from typing import Self

import numpy as np
import torch.distributed as dist

from moeplan.api.connection import Security, check_address
from moeplan.api.jobs import JOB_ID, JOB_ID_RULE, Closing, JobSpec, Replan
from moeplan.runtime_client.group import ascending
from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.planning.aggregation import Aggregation, Reporting, leaders
from moeplan.runtime_client.planning.agreement import Agreement
from moeplan.runtime_client.planning.planner_stream import PlannerStream, StreamStatus
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.arrays import Int64, integers
from moeplan.solvers.problem.cluster import Cluster
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import Forecast
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec
from moeplan.solvers.problem.scalars import instance, short
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["PlannerSession"]

log = logging.getLogger("moeplan")

FOLLOWS = 2**62
"""Vote of a rank whose leader holds the plans."""


class PlannerSession:
    """A rank's part in a planned job. The planner may be absent, slow or gone at any time; training goes on.

    Every rank of the group makes one at the same point, and calls `step` at the end of every training step. New layouts
    come into force on all ranks between the same two steps, or on none.

        with PlannerSession("127.0.0.1:7433", "my-run", [layer.layout for layer in layers], apply, slots=5) as session:
            for batch in data:
                train(batch)
                session.step(recorder.step())

    The incarnation, which fences off ranks of an earlier start, is the time when the ranks met: the latest of their
    clocks, in milliseconds. Torchrun's restart count alone would not do, as it is 0 again when a run is launched anew,
    and stays when a node is lost.

    Args:
        address: The daemon, ``host:port`` or ``unix:path``.
        job_id: Id of the job, 1 to 63 of a-z, 0-9 and -, beginning with a letter; one per expert-parallel group.
        layouts: Layouts in force, one per MoE layer.
        apply: Puts a plan into force, ``layer.plan = planned`` for each layer; called between two steps.
        slots: Replicas that a rank can hold, alike on all ranks.
        ranks: Global ranks of the group, ascending; all by default. Every rank of the *world* makes a session where the
            groups are several, each with the ranks of its own group, as `torch.distributed.new_group` demands it.
        cluster: Speeds, memories and links of the ranks, with `slots` each; by default equal ones, on the nodes where
            they are found.
        expert: Costs of an expert and of a token.
        policy: Name of the policy.
        parameters: Limits of one re-plan of all layers.
        forecast: How demand is forecast.
        replan: When to look for a plan, and when to take it.
        closing: When a step that not all ranks have reported closes.
        max_moves: Most replicas that one re-plan of one layer may move; None for no limit.
        groups: Groups of consecutive experts that routing treats as units.
        merge_sources: Forget which rank tokens come from.
        split_rule: How ranks divide tokens among replicas, one of `RANK_RULES`; None for the policy's own.
        spill_slots: Spare slots of a rank, where experts are resident and `HomeMoves` moves their homes; None where
            layouts are of replicas.
        reporting: How many streams there are.
        security: Token and certificates; by default what the environment names, see `Security.from_files`.
        timeout: How long to wait for another rank.

    Raises:
        AgreementError: a rank did not come in time.
        ProblemError: no such job can be; on all ranks alike.
        OSError: the token cannot be read.
    """

    def __init__(
        self,
        address: str,
        job_id: str,
        layouts: Sequence[Layout],
        apply: Callable[[Sequence[PlannedLayer]], None],
        *,
        slots: int,
        ranks: Sequence[int] | None = None,
        cluster: Cluster | None = None,
        expert: ExpertSpec = ExpertSpec(),
        policy: str = "hybrid",
        parameters: SolveParameters = SolveParameters(),
        forecast: Forecast = Forecast(),
        replan: Replan = Replan(),
        closing: Closing = Closing(),
        max_moves: int | None = None,
        groups: int = 1,
        merge_sources: bool = False,
        split_rule: SplitRule | None = None,
        spill_slots: int | None = None,
        reporting: Reporting = "rank",
        security: Security | None = None,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        check_address(address)
        if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
            raise ProblemError("job_id", short(job_id), JOB_ID_RULE)
        layouts = tuple(layouts)
        if not layouts:
            raise ProblemError("layouts", "none", "must be one per MoE layer; write [layer.layout for layer in layers]")
        for index, layout in enumerate(layouts):
            instance(f"layouts[{index}]", layout, Layout, "[layer.layout for layer in layers]")
        self._apply = apply
        security = Security.from_files() if security is None else security
        self._group, self._rank, self._size = _side_group(ranks, timeout)
        self._shape = (len(layouts), layouts[0].devices, slots)
        self._experts = layouts[0].experts
        incarnation, nodes = _meet(self._group, self._rank, self._size)
        spec = JobSpec(  # on every rank, so that all refuse it alike
            cluster=_cluster(cluster, slots, layouts[0].devices, nodes),
            layers=len(layouts),
            experts=self._experts,
            ranks=self._size,
            initial=layouts,
            expert=expert,
            policy=policy,
            parameters=parameters,
            forecast=forecast,
            replan=replan,
            closing=closing,
            max_moves=max_moves,
            groups=groups,
            merge_sources=merge_sources,
            split_rule=split_rule,
            spill_slots=spill_slots,
        )
        self._division = cache(partial(Division, spec.cluster, spec.expert))
        self._aggregation = Aggregation(leaders(reporting, nodes), self._rank, self._group, timeout=timeout)
        self._agreement = Agreement(self._group, timeout=timeout)
        self._stream = None
        self._over = False
        self._step = 0
        self.switches = 0
        if self._aggregation.leads:
            members = self._aggregation.members
            self._stream = PlannerStream(
                address, job_id, spec, incarnation, self._rank, reports_for=members, security=security
            )

    @property
    def version(self) -> int:
        """Version of the layouts in force; 0 for those of the start."""
        return self._agreement.in_force

    @property
    def status(self) -> StreamStatus | None:
        """The state of this rank's line to the planner; None on a rank that another reports for."""
        return None if self._stream is None else self._stream.status

    def step(self, counts: Int64 | None) -> bool:
        """End a training step.

        Args:
            counts: int64[layers, experts], tokens of this rank in a step, as `Recorder.step` returns them; None on all
                ranks alike where there are none yet.

        Returns:
            Whether new layouts are in force.

        Raises:
            AgreementError: a rank did not come in time.
            ProblemError: counts are not such an array.
            RuntimeError: the session is over.
        """
        if self._over:
            raise RuntimeError(
                "session.step() after the session was closed: no layouts come any more; step within its `with`, or "
                "make another PlannerSession"
            )
        if counts is not None:
            self._report(self._aggregation.exchange(self._step, self._checked(counts)))
        stream = self._stream
        newest = FOLLOWS if stream is None else stream.newest
        version = self._agreement.vote(newest, lambda v: stream is None or stream.plan(v) is not None)
        self._step += 1
        if version is None:
            return False
        held = None if stream is None else stream.plan(version)
        agreed = self._aggregation.share(None if held is None else held.layers, self._shape, self._experts)
        self._apply([PlannedLayer(layout, self._division(rule)) for layout, rule in agreed])
        self.switches += 1
        if stream is not None:
            stream.applied(version, self._step)
        return True

    def _checked(self, counts: Int64) -> Int64:
        """Counts that the planner will take; otherwise it would refuse every step, and say so in a log at most."""
        checked = integers("counts", counts, ndim=2, low=0)
        if checked.shape != (self._shape[0], self._experts):
            expected = f"[{self._shape[0]}, {self._experts}], of the layers and experts of `layouts`"
            raise ProblemError("counts", f"array of shape {checked.shape}", f"must be {expected}")
        return checked

    def _report(self, collected: tuple[int, Int64] | None) -> None:
        if collected is not None and self._stream is not None:
            self._stream.report(*collected)

    def close(self) -> None:
        """Take leave of the planner and of the other ranks; every rank calls it."""
        self._over = True
        try:
            self._agreement.finish()
            self._report(self._aggregation.finish())
        finally:
            if self._stream is not None:
                self._stream.close()

    def abandon(self) -> None:
        """Leave without the other ranks, who may not come any more; what has not been sent within a second is lost."""
        self._over = True
        if self._stream is not None:
            self._stream.close(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _side_group(ranks: Sequence[int] | None, timeout: timedelta) -> tuple[dist.ProcessGroup | None, int, int]:
    """A gloo group of the ranks, this rank in it, and their number."""
    if not dist.is_initialized():
        return None, 0, 1
    members = list(range(dist.get_world_size())) if ranks is None else ascending(ranks)
    if dist.get_rank() not in members:
        raise ProblemError("ranks", members, f"must be those of the group that this rank, {dist.get_rank()}, is in")
    group = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=ranks is not None)
    return group, members.index(dist.get_rank()), len(members)


def _meet(group: dist.ProcessGroup | None, rank: int, size: int) -> tuple[int, list[int]]:
    """(incarnation, node of each rank): the latest clock in milliseconds, and nodes by host name."""
    mine = (int(time.time() * 1e3), os.environ.get("GROUP_RANK", ""), socket.gethostname())
    everyone: list[tuple[int, str, str]] = [mine] * size
    if group is not None:
        dist.all_gather_object(everyone, mine, group=group)
    hosts = [where[1:] for where in everyone]
    names = list(dict.fromkeys(hosts))
    return max(clock for clock, *_ in everyone), [names.index(host) for host in hosts]


def _cluster(given: Cluster | None, slots: int, devices: int, nodes: Sequence[int]) -> Cluster:
    """The cluster of the job, every device of it with `slots` slots."""
    if given is None:
        return Cluster(np.full(devices, slots, np.int32), np.array(nodes, np.int32), np.ones(devices))
    if (given.slots != slots).any():
        raise ProblemError("cluster.slots", given.slots.tolist(), f"must be `slots` ({slots}) on every device")
    return given
