"""Descriptions of a job: its machines, its layers, how it wants to be planned, and where it stands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

from moeplan.api.job_plans import Decision
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.cluster import MAX_SLOTS, Cluster
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import Forecast, ForecastMethod
from moeplan.solvers.problem.layout import Layout, check_layout
from moeplan.solvers.problem.problem import ExpertSpec, Problem, check_experts
from moeplan.solvers.problem.scalars import instance
from moeplan.solvers.problem.split_rules import RANK_RULES, SplitRule, split_rule

__all__ = [
    "Closing",
    "Forecast",
    "ForecastMethod",
    "Job",
    "JobSpec",
    "JobStatus",
    "Payback",
    "Replan",
    "StatisticsCount",
]

MAX_LAYERS = 4_096
MAX_EXPERTS = 65_536
MAX_RANKS = 65_536
MAX_LAG_STEPS = 1_024
MAX_INCARNATION = 2**53
"""Of the time in milliseconds, which clients take, far more than there will be; and no number that came about by a
slip, as all bits set, which would fence out every later start of the job."""
MAX_PLACES = 2**24
"""Places in the layouts of all layers, empty ones too: 64 MiB of a plan. A table is as wide as the largest device."""
MAX_PAIRS = 2**28
"""Pairs of device and expert: one byte each, when the layouts of a layer are compared."""
REPORT_BYTES, COUNT_BYTES, PLACE_BYTES = 1, 8, 4

JOB_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
JOB_ID_RULE = "must be 1 to 63 of a-z, 0-9 and -, beginning with a letter"


def check_incarnation(field_name: str, value: int) -> None:
    """Refuse an incarnation that no start has.

    Raises:
        ProblemError: it is negative, or so large that hardly a later one could follow.
    """
    if value < 0:
        raise ProblemError(field_name, value, "must be at least 0")
    if value > MAX_INCARNATION:
        raise ProblemError(
            field_name, value, f"must be at most 2^53 ({MAX_INCARNATION}); take the time of the start in milliseconds"
        )


def _within(field_name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ProblemError(field_name, value, f"must be {low} to {high}")


@dataclass(frozen=True, slots=True)
class Payback:
    """A layer's new layout must save more than its move costs.

    Attributes:
        horizon_steps: Steps over which the gain counts.
        cost_factor: How much the gain must outweigh the move.
    """

    horizon_steps: int
    cost_factor: float = 1.0

    def __post_init__(self) -> None:
        _within("job.replan.payback.horizon_steps", self.horizon_steps, 1, 2**31 - 1)
        if not 0 <= self.cost_factor < float("inf"):
            raise ProblemError("job.replan.payback.cost_factor", self.cost_factor, "must be finite and at least 0")


@dataclass(frozen=True, slots=True)
class Replan:
    """When to look for a plan, and when to take it.

    Attributes:
        every_steps: Closed steps from one look to the next.
        payback: The rule that a move must pay; None where a new layout is free.
    """

    every_steps: int = 1
    payback: Payback | None = None

    def __post_init__(self) -> None:
        _within("job.replan.every_steps", self.every_steps, 1, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Closing:
    """When a step that is not complete closes.

    Attributes:
        max_lag_steps: Steps that it may lag behind the step that a quorum of the ranks has reached.
        timeout_s: Seconds from its first statistics.
        quorum: Fraction of the ranks without which a layer's statistics are not used.
    """

    max_lag_steps: int = 4
    timeout_s: float = 10.0
    quorum: float = 0.5

    def __post_init__(self) -> None:
        _within("job.closing.max_lag_steps", self.max_lag_steps, 1, MAX_LAG_STEPS)
        if not 0 < self.timeout_s <= 86_400:
            raise ProblemError("job.closing.timeout", self.timeout_s, "must be above 0 and at most a day")
        if not 0 <= self.quorum <= 1:
            raise ProblemError("job.closing.quorum", self.quorum, "must be 0 to 1")


@dataclass(frozen=True, eq=False)
class JobSpec:
    """A job as its owner described it.

    Attributes:
        cluster: Devices and links.
        layers: MoE layers.
        experts: Experts of each layer.
        ranks: Ranks whose tokens are counted; as many as devices if 0.
        initial: Layout of each layer before the first plan; contiguous if empty.
        expert: Costs of an expert and of a token.
        policy: Name of the policy.
        parameters: Limits of one re-plan of all layers.
        forecast: How demand is forecast.
        replan: When to look for a plan, and when to take it.
        closing: When an incomplete step closes.
        max_moves: Most replicas that one re-plan of one layer may move; None for no limit.
        groups: Groups of consecutive experts.
        merge_sources: Forget which rank tokens come from.
        split_rule: How ranks divide tokens among replicas, one of `RANK_RULES`; None for the policy's own.
        spill_slots: Spare slots of each rank, where experts are resident and spill within their node: the job plans
            their homes, layouts of one replica per expert, and asks no policy. None where it plans replicas.

    Raises:
        ProblemError: a field is out of range, or no layout can exist.
    """

    cluster: Cluster
    layers: int
    experts: int
    ranks: int = 0
    initial: tuple[Layout, ...] = ()
    expert: ExpertSpec = field(default=ExpertSpec())
    policy: str = "hybrid"
    parameters: SolveParameters = field(default=SolveParameters())
    forecast: Forecast = field(default=Forecast())
    replan: Replan = field(default=Replan())
    closing: Closing = field(default=Closing())
    max_moves: int | None = None
    groups: int = 1
    merge_sources: bool = False
    split_rule: SplitRule | None = None
    spill_slots: int | None = None

    def __post_init__(self) -> None:
        instance("job.cluster", self.cluster, Cluster, "Cluster.uniform(devices, slots)")
        for name, kind in (
            ("expert", ExpertSpec),
            ("parameters", SolveParameters),
            ("forecast", Forecast),
            ("replan", Replan),
            ("closing", Closing),
        ):
            instance(f"job.{name}", getattr(self, name), kind, f"{kind.__name__}(...)")
        check_size(self.cluster, self.layers, self.experts, self.ranks)
        check_experts(self.cluster, self.experts, self.expert, self.groups)
        if not self.ranks:
            object.__setattr__(self, "ranks", self.cluster.devices)
        if not self.initial:
            contiguous = Layout.contiguous(self.experts, self.cluster.slots)
            object.__setattr__(self, "initial", (contiguous,) * self.layers)
        if len(self.initial) != self.layers:
            raise ProblemError("job.initial_layouts", f"{len(self.initial)} layouts", f"must be {self.layers}")
        if self.max_moves is not None and self.max_moves < 0:
            raise ProblemError("job.max_moves", self.max_moves, "must be at least 0, or None")
        if self.merge_sources and self.expert.token_bytes:
            raise ProblemError(
                "job.merge_sources", True, "hides where tokens come from; set expert.token_bytes = 0 or keep sources"
            )
        if self.split_rule is not None:
            object.__setattr__(self, "split_rule", split_rule("job.split_rule", self.split_rule, RANK_RULES))
        for index, layout in enumerate(self.initial):
            check_layout(f"job.initial_layouts[{index}]", layout, self.experts, self.cluster.slots)
        if self.spill_slots is not None:
            _within("job.spill_slots", self.spill_slots, 0, MAX_SLOTS)
            for index, layout in enumerate(self.initial):
                replicas = len(layout.hosts.device)
                if replicas != self.experts:
                    raise ProblemError(
                        f"job.initial_layouts[{index}]",
                        f"{replicas} replicas",
                        f"must be one per expert ({self.experts}): with spill_slots a layout says who owns what",
                    )

    @property
    def sources(self) -> int:
        """Sources that the demand keeps apart."""
        return 1 if self.merge_sources else self.ranks

    @property
    def max_open_steps(self) -> int:
        """Steps that may be open at once: the lag that is allowed, and as much again for ranks that run ahead."""
        return 2 * self.closing.max_lag_steps + 2

    @property
    def window_bytes(self) -> int:
        """Most memory that the job's statistics take: counts, and who has reported."""
        steps = self.forecast.window_steps + self.max_open_steps + 1
        per_layer = self.sources * self.experts * COUNT_BYTES + self.ranks * REPORT_BYTES
        return steps * self.layers * per_layer

    @property
    def plan_bytes(self) -> int:
        """Memory of the layouts of one plan."""
        width = max(self.cluster.max_slots, *(layout.slots.shape[1] for layout in self.initial))
        return self.layers * self.cluster.devices * width * PLACE_BYTES

    @property
    def moved_bytes(self) -> int:
        """Bytes of a replica that moves: weights, and where homes move also gradients and optimizer state."""
        return self.expert.weight_bytes if self.spill_slots is None else self.expert.replica_bytes

    def problem(self, demand: Demand, current: Layout) -> Problem:
        """One layer's problem.

        Raises:
            ProblemError: a field contradicts another.
        """
        return Problem(
            cluster=self.cluster,
            demand=demand,
            expert=self.expert,
            current=current,
            max_moves=self.max_moves,
            groups=self.groups,
            split_rule=self.split_rule,
        )


def check_size(cluster: Cluster, layers: int, experts: int, ranks: int) -> None:
    """Check the numbers, and the products of them that memory is taken for, before any is.

    Raises:
        ProblemError: one is out of range.
    """
    _within("job.layers", layers, 1, MAX_LAYERS)
    _within("job.experts", experts, 1, MAX_EXPERTS)
    _within("job.ranks", ranks, 0, MAX_RANKS)
    places = layers * cluster.devices * cluster.max_slots
    if places > MAX_PLACES:
        raise ProblemError(
            "job.cluster.slots",
            f"at most {cluster.max_slots} on a device",
            f"layers x devices x most slots are {places}, and {MAX_PLACES} are allowed; a device needs no more slots "
            f"than there are experts ({experts})",
        )
    if cluster.devices * experts > MAX_PAIRS:
        raise ProblemError(
            "job.experts", experts, f"devices x experts are {cluster.devices * experts}, and {MAX_PAIRS} are allowed"
        )


@dataclass(slots=True)
class StatisticsCount:
    """Statistics counted by their fate, in cells: one layer of one step of one rank.

    Attributes:
        accepted: Counted.
        duplicate: Seen before: the first one counts.
        late: Came after their step closed, or from before the first step of a window.
        missing: Missing in the steps that closed incomplete.
        early: Further ahead than the window holds.
    """

    accepted: int = 0
    duplicate: int = 0
    late: int = 0
    missing: int = 0
    early: int = 0


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The state of a job as its server knows it.

    Attributes:
        plan_version: Version of the newest plan.
        connected_ranks: Ranks that a stream reports for now.
        closed_step: Newest step whose statistics are closed; None before the first.
        applied_version: Newest version that a rank reported as applied; 0 before the first.
        decision: The newest decision, also where it was to stay; None from a server that does not own the job.
        statistics: Statistics counted since the owner took the job over.
        owner: Address of the server that owns the job; empty if none does.
        silent_ranks: Ranks that no stream reports for, the first 32.
        late_ranks: Connected ranks whose newest statistics are of a step before the newest closed one, the first 32.
        saved_s: Predicted time that plans have saved since the owner took the job over: for each closed step, the cost
            with the layouts that the newest plan replaced, less that with its own, seconds.
        failure: The newest solve that failed since the owner took the job over; None if none did.
    """

    plan_version: int
    connected_ranks: int = 0
    closed_step: int | None = None
    applied_version: int = 0
    decision: Decision | None = None
    statistics: StatisticsCount = field(default_factory=StatisticsCount)
    owner: str = ""
    silent_ranks: tuple[int, ...] = ()
    late_ranks: tuple[int, ...] = ()
    saved_s: float = 0.0
    failure: Decision | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A job of a server.

    Attributes:
        name: Resource name, ``jobs/{job}``.
        incarnation: Newest start of the training that was seen.
        spec: What its owner said.
        created: When it was created, in UTC.
        status: Where it stands.
    """

    name: str
    incarnation: int
    spec: JobSpec
    created: datetime
    status: JobStatus
