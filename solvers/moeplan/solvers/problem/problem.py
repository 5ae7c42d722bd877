"""One layer's placement problem: a cluster, a demand, what an expert and a token cost, and where replicas are now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from moeplan.solvers.problem.arrays import Float64, Int32, Int64, integers
from moeplan.solvers.problem.cluster import Cluster, source_devices
from moeplan.solvers.problem.compile_limits import compile_limits
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import InfeasibleError, ProblemError
from moeplan.solvers.problem.layout import EMPTY, Layout, check_layout
from moeplan.solvers.problem.limits import Limits
from moeplan.solvers.problem.scalars import instance, integer, number
from moeplan.solvers.problem.split_rules import SplitRule, split_rule

__all__ = ["ExpertSpec", "Problem", "check_experts"]

MIN_TOKEN_S, MAX_TOKEN_S = 1e-30, 1e30
"""Beyond them times of as many tokens as a demand may have, on the slowest devices, may be no doubles."""


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Costs of one expert and one token of a layer. The zeros of the default leave out memory and traffic.

    Attributes:
        weight_bytes: Weights of one replica; also what moving a replica sends.
        state_bytes: Gradients and optimizer state of one resident replica; 0 where they are sharded elsewhere.
        token_bytes: A token's hidden vector as it travels to a device, and again back.
        activation_bytes: Memory that one token occupies on the device that computes it.
        seconds_per_token: Forward time of one token on a device of speed 1, 1e-30 to 1e30.
    """

    weight_bytes: int = 0
    state_bytes: int = 0
    token_bytes: int = 0
    activation_bytes: int = 0
    seconds_per_token: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight_bytes", "state_bytes", "token_bytes", "activation_bytes"):
            object.__setattr__(self, name, integer(f"expert.{name}", getattr(self, name), 0, 2**53))
        token_s = number("expert.seconds_per_token", self.seconds_per_token)
        if not MIN_TOKEN_S <= token_s <= MAX_TOKEN_S:
            raise ProblemError(
                "expert.seconds_per_token", token_s, f"must be {MIN_TOKEN_S:g} to {MAX_TOKEN_S:g}; give seconds"
            )

    @property
    def replica_bytes(self) -> int:
        """Memory that one resident replica takes."""
        return self.weight_bytes + self.state_bytes


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that a policy knows about one layer.

    Attributes:
        cluster: Devices and links.
        demand: Tokens that the layout should suit.
        expert: Costs of an expert and of a token.
        current: Layout in force, from which moves are counted; None if there is none.
        max_moves: Most replicas that a new layout may load onto devices that do not hold them now; None for no limit.
            Needs `current`.
        groups: Groups of consecutive experts that routing treats as units (group-limited routing); 1 for none. `hybrid`
            keeps each on a node where that is possible; `Constraints.groups_on_node` makes it a condition.
        tail: Part of the scenarios that a plan should suit, the worst ones: 1.0 for their mean, less for the mean of a
            tail (conditional value at risk).
        constraints: Further limits on where replicas may be.
        split_rule: How the system that will run the layout divides tokens, given by its name or as `SplitRule`; a
            policy that cannot plan for it refuses. None for the policy's own.

    Raises:
        ProblemError: a field is invalid or contradicts another.
        InfeasibleError: the experts do not fit into slots or memory; the message says by how much.
    """

    cluster: Cluster
    demand: Demand
    expert: ExpertSpec = field(default=ExpertSpec())
    current: Layout | None = None
    max_moves: int | None = None
    groups: int = 1
    tail: float = 1.0
    constraints: Constraints = field(default=Constraints())
    split_rule: SplitRule | None = None

    def __post_init__(self) -> None:
        instance("cluster", self.cluster, Cluster, "Cluster.uniform(devices, slots)")
        instance("demand", self.demand, Demand, "Demand.of(tokens)")
        instance("expert", self.expert, ExpertSpec, "ExpertSpec(weight_bytes=...)")
        instance("constraints", self.constraints, Constraints, "Constraints(...)")
        if self.current is not None:
            instance("current", self.current, Layout, "Layout(slots, experts)")
        if self.split_rule is not None:
            rule = split_rule("split_rule", self.split_rule)
            object.__setattr__(self, "split_rule", rule)
            if rule.needs_sources and self.demand.sources == 1 and self.devices > 1:
                raise ProblemError("split_rule", rule, "needs the demand of each source; give tokens[sources, experts]")
        check_experts(self.cluster, self.experts, self.expert, self.groups)
        if not 0 < number("tail", self.tail) <= 1:
            raise ProblemError("tail", self.tail, "must be above 0 and at most 1")
        if self.current is not None:
            check_layout("current", self.current, self.experts, self.cluster.slots)
        if self.max_moves is not None:
            if self.current is None:
                raise ProblemError("max_moves", self.max_moves, "needs `current`, the layout that moves start from")
            integer("max_moves", self.max_moves, 0)
        _ = self.limits  # contradictions show here

    def without(self, failed: Sequence[int]) -> Problem:
        """The same problem on the devices that remain, numbered as before, when some have failed.

        Failed devices keep their place in every array, with no slots and no replicas in force. Experts that were only
        there have no holder, so a plan loads them from elsewhere, such as a checkpoint (`Moves.source` is -1).

        Args:
            failed: Indices of devices.

        Raises:
            ProblemError: a device does not exist.
            InfeasibleError: the experts do not fit on the devices that remain.
        """
        instance("failed", failed, Iterable, "a list of devices")
        for i, device in enumerate(failed):
            integer(f"failed[{i}]", device, 0, self.devices - 1)
        gone = np.array(failed, np.int64)
        slots = self.cluster.slots.copy()
        slots[gone] = 0
        current = self.current
        if current is not None:
            left = current.slots.copy()
            left[gone] = EMPTY
            current = Layout.trusted(left, self.experts)
        return replace(self, cluster=replace(self.cluster, slots=slots), current=current)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.cluster.devices

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.demand.experts

    @cached_property
    def loads(self) -> Int64:
        """int64[scenarios, experts]: tokens of each expert."""
        return self.demand.loads()

    @cached_property
    def mean_load(self) -> Float64:
        """float64[experts]: tokens of each expert, averaged over the scenarios by their weights."""
        mean: Float64 = self.demand.weights @ self.loads
        return mean

    @cached_property
    def capacity(self) -> Int32:
        """int32[devices]: replicas that each device can hold: its slots, or what its memory has room for.

        A device never holds two replicas of one expert, so never more than there are experts.
        """
        return _capacity(self.cluster, self.experts, self.expert.replica_bytes)

    @cached_property
    def limits(self) -> Limits:
        """All limits on a layout, as arrays."""
        return compile_limits(
            self.cluster,
            self.capacity,
            self.constraints,
            mean_load=self.mean_load,
            groups=self.groups,
            weight_bytes=self.expert.weight_bytes,
            current=self.current,
            max_moves=self.max_moves,
        )

    @cached_property
    def mean_level(self) -> Float64:
        """float64[scenarios]: tokens per unit of speed of all devices that have slots."""
        level: Float64 = self.loads.sum(axis=1) / self.cluster.speed[self.capacity > 0].sum()
        return level

    @cached_property
    def lower_bound(self) -> Float64:
        """float64[scenarios]: no layout and split within the limits has a smaller largest load per speed.

        Under the rule ``even``, if it is asked for; see `bounds`, `limit_bounds` and `even_bounds`.
        """
        from moeplan.solvers.problem.bounds import lower_bound  # the compiler loads slowly
        from moeplan.solvers.problem.even_bounds import needed_bound
        from moeplan.solvers.problem.limit_bounds import limited_bound

        alive, speed = self.capacity > 0, self.cluster.speed
        anywhere = lower_bound(self.loads, speed[alive], self.capacity[alive])
        proven = np.maximum(anywhere, limited_bound(self.loads, speed, self.capacity, self.limits))
        if self.split_rule is not SplitRule.EVEN:
            return proven
        return needed_bound(self.loads, speed[alive], self.capacity[alive], self.limits.most, proven)

    @property
    def spare(self) -> int:
        """R: replicas that fit beyond one of each expert."""
        return int(self.capacity.sum()) - self.experts

    @cached_property
    def source_device(self) -> Int32:
        """int32[sources]: device whose tokens a source holds: itself, or contiguous blocks where the numbers differ.

        Raises:
            ProblemError: the demand has one source but the cluster several devices, so origins are not known.
        """
        sources = self.demand.sources
        if sources == 1 and self.devices > 1:
            raise ProblemError(
                "demand.sources", 1, "traffic needs the demand of each source; give tokens[sources, experts]"
            )
        return source_devices(sources, self.devices).astype(np.int32)


def check_experts(cluster: Cluster, experts: int, expert: ExpertSpec, groups: int) -> None:
    """Check that the experts of a layer fit, whatever the demand.

    Raises:
        ProblemError: `groups` does not divide the experts.
        InfeasibleError: the experts do not fit into slots or memory; the message says by how much.
    """
    if experts > cluster.total_slots:
        raise InfeasibleError(
            "cluster.slots",
            f"{cluster.total_slots} slots",
            f"{experts} experts need {experts - cluster.total_slots} more; add slots or devices",
        )
    room = int(_capacity(cluster, experts, expert.replica_bytes).sum())
    if experts > room:
        raise InfeasibleError(
            "cluster.memory_bytes",
            f"room for {room} replicas",
            f"{experts} experts need {experts - room} more; "
            "add memory or devices, or shrink expert.weight_bytes + expert.state_bytes",
        )
    if not 1 <= integer("groups", groups, 0) <= experts or experts % groups:
        raise ProblemError("groups", groups, f"must divide the number of experts ({experts})")


@lru_cache(maxsize=8)
def _capacity(cluster: Cluster, experts: int, replica_bytes: int) -> Int32:
    room = np.minimum(cluster.slots, experts)
    if cluster.memory_bytes is not None and replica_bytes:
        room = np.minimum(room, cluster.memory_bytes // replica_bytes)
    return integers("capacity", room, ndim=1, dtype=np.int32)
