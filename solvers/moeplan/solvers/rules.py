"""A problem's limits on a layout as arrays, which every search and model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moeplan.solvers.arrays import Bool, Int32, Int64
from moeplan.solvers.cluster import Cluster
from moeplan.solvers.errors import InfeasibleError, ProblemError

if TYPE_CHECKING:
    from moeplan.solvers.problem import Problem

__all__ = ["NO_LIMIT", "Rules", "broken", "rules_of"]

NO_LIMIT = 2**53
"""More arrivals than there can be."""


@dataclass(frozen=True, eq=False)
class Rules:
    """What a layout must respect, beyond the capacity of its devices.

    An **arrival** is a replica on a device that does not hold it now; it is **far** if no device of its node does. A
    **unit** is a set of experts whose replicas share a **region** of devices.

    Attributes:
        may: bool[devices, experts], pairs that are allowed.
        must: bool[devices, experts], pairs that are required.
        most: int32[experts], most replicas of each expert.
        held: bool[devices, experts], replicas of the layout in force.
        node: int32[devices].
        max_arrivals: Most arrivals.
        device_arrivals: int64[devices], most arrivals at each device.
        node_arrivals: int64[nodes], most far arrivals at each node.
        unit: int32[experts], 0..units-1, each of equal size.
        region: int32[devices], 0..regions-1; all 0 where units may be anywhere.
    """

    may: Bool
    must: Bool
    most: Int32
    held: Bool
    node: Int32
    max_arrivals: int
    device_arrivals: Int64
    node_arrivals: Int64
    unit: Int32
    region: Int32

    @cached_property
    def far(self) -> Bool:
        """bool[devices, experts]: pairs whose node does not hold the expert now."""
        by_node = np.zeros((len(self.node_arrivals), self.held.shape[1]), np.bool_)
        np.logical_or.at(by_node, self.node, self.held)
        far: Bool = ~by_node[self.node]
        return far

    @cached_property
    def regions(self) -> int:
        """Number of regions."""
        return int(self.region.max()) + 1

    @cached_property
    def free(self) -> bool:
        """Whether any device may hold any expert, as often as it has slots."""
        everywhere = bool(self.may.all()) and not self.must.any() and self.regions == 1
        return everywhere and bool((self.most >= len(self.may)).all())

    @cached_property
    def simple(self) -> bool:
        """Whether `max_moves` is the only limit there may be."""
        return self.free and min(int(self.device_arrivals.min()), int(self.node_arrivals.min())) >= NO_LIMIT

    @cached_property
    def moves_limited(self) -> bool:
        """Whether any limit of arrivals is set."""
        least = min(self.max_arrivals, int(self.device_arrivals.min()), int(self.node_arrivals.min()))
        return least < NO_LIMIT

    def arrival_limits(self) -> Iterator[tuple[int, Bool]]:
        """Each limit of arrivals, and the pairs that count for it, bool[devices, experts]."""
        arriving = ~self.held
        yield self.max_arrivals, arriving
        for d, limit in enumerate(self.device_arrivals.tolist()):
            yield limit, arriving & (np.arange(len(self.may)) == d)[:, None]
        for n, limit in enumerate(self.node_arrivals.tolist()):
            yield limit, self.far & (self.node == n)[:, None]

    def narrowed(self, region: Int32) -> Rules:
        """The same rules with every unit in its given region, int32[units], so that `may` says it all."""
        here = self.region[:, None] == region[self.unit]
        return replace(self, may=self.may & here, region=np.zeros_like(self.region))

    def part(self, devices: Int64, experts: Int32, placed: Bool) -> Rules:
        """The rules for placing some experts on some devices while the others, in `placed`, stay as they are.

        Args:
            devices: int64[few], the devices to place on.
            experts: int32[some], the experts to place there.
            placed: bool[devices, experts], the whole layout.
        """
        outside = placed.copy()
        outside[devices] = False
        arriving = outside & ~self.held
        far = np.bincount(self.node, (arriving & self.far).sum(axis=1), len(self.node_arrivals)).astype(np.int64)
        block = np.ix_(devices, experts)
        return replace(
            self,
            may=self.may[block],
            must=self.must[block],
            most=(self.most[experts] - outside[:, experts].sum(axis=0)).astype(np.int32),
            held=self.held[block],
            node=self.node[devices],
            max_arrivals=self.max_arrivals - int(arriving.sum()),
            device_arrivals=self.device_arrivals[devices],
            node_arrivals=self.node_arrivals - far,
            unit=np.arange(len(experts), dtype=np.int32),
            region=np.zeros(len(devices), np.int32),
        )._with_far(self.far[block])

    def _with_far(self, far: Bool) -> Rules:
        self.__dict__["far"] = far  # a part of the devices does not show what the rest of their nodes holds
        return self


def rules_of(problem: Problem) -> Rules:
    """Compile a problem's constraints.

    Raises:
        ProblemError: a constraint names what the problem does not have.
        InfeasibleError: constraints contradict each other or the slots.
    """
    rules = _unlimited(problem.cluster, problem.experts, (problem.capacity > 0).tobytes())
    if problem.current is not None:
        most = NO_LIMIT if problem.max_moves is None else problem.max_moves
        rules = replace(rules, held=problem.current.placed, max_arrivals=most)
    if problem.constraints.names:
        rules = _limited(problem, rules)
    if not rules.free:
        _check_pins(problem, rules)
        _check_regions(problem, rules)
        _check_room(problem, rules)
    _check_lost(problem, rules)
    return rules


@lru_cache(maxsize=8)
def _unlimited(cluster: Cluster, experts: int, has_room: bytes) -> Rules:
    """No limit but that some devices hold nothing. Layers share it: to make it takes as long as a small solve."""
    devices = cluster.devices
    room = np.frombuffer(has_room, np.bool_)
    return Rules(
        may=np.repeat(room[:, None], experts, axis=1),
        must=np.zeros((devices, experts), np.bool_),
        most=np.full(experts, devices, np.int32),
        held=np.zeros((devices, experts), np.bool_),
        node=cluster.node,
        max_arrivals=NO_LIMIT,
        device_arrivals=np.full(devices, NO_LIMIT),
        node_arrivals=np.full(cluster.nodes, NO_LIMIT),
        unit=np.arange(experts, dtype=np.int32),
        region=np.zeros(devices, np.int32),
    )


def _limited(problem: Problem, rules: Rules) -> Rules:
    """`rules` with the problem's constraints."""
    constraints, devices, experts = problem.constraints, problem.devices, problem.experts
    may, must, most = rules.may.copy(), rules.must.copy(), rules.most
    for name, table, value in (("forbidden", may, False), ("pinned", must, True)):
        pairs = getattr(constraints, name)
        for i, (expert, device) in enumerate(pairs.tolist()):
            if not 0 <= expert < experts or not 0 <= device < devices:
                raise ProblemError(
                    f"constraints.{name}[{i}]",
                    f"expert {expert}, device {device}",
                    f"must be 0..{experts - 1} and 0..{devices - 1}",
                )
        table[pairs[:, 1], pairs[:, 0]] = value
    if constraints.min_tokens:
        most = np.clip(problem.mean_load // constraints.min_tokens, 1, devices).astype(np.int32)
    unit, region = _units(problem)
    return replace(
        rules,
        may=may,
        must=must,
        most=most,
        device_arrivals=np.full(devices, _replicas(problem, "device_move_bytes")),
        node_arrivals=np.full(problem.cluster.nodes, _replicas(problem, "node_move_bytes")),
        unit=unit,
        region=region,
    )


def broken(rules: Rules, placed: Bool) -> ProblemError | None:
    """The first limit that a layout, bool[devices, experts], does not respect; None if it respects all."""
    if rules.free and not rules.moves_limited:
        return None
    for table, name, says in (
        (placed & ~rules.may, "forbidden", "may not be there"),
        (rules.must & ~placed, "pinned", "must be there"),
    ):
        if table.any():
            device, expert = (int(i) for i in np.argwhere(table)[0])
            return ProblemError("layout", f"expert {expert} on device {device}", f"{says} (constraints.{name})")
    replicas = placed.sum(axis=0)
    if (replicas > rules.most).any():
        expert = int(np.argmax(replicas > rules.most))
        reason = f"may have {rules.most[expert]} (constraints.min_tokens)"
        return ProblemError("layout", f"{replicas[expert]} replicas of expert {expert}", reason)
    arriving = placed & ~rules.held
    if arriving.sum() > rules.max_arrivals:
        return ProblemError("layout", f"{arriving.sum()} replicas to load", f"max_moves is {rules.max_arrivals}")
    over = arriving.sum(axis=1) > rules.device_arrivals
    if over.any():
        d = int(np.argmax(over))
        reason = f"may receive {rules.device_arrivals[d]} (constraints.device_move_bytes)"
        return ProblemError("layout", f"{arriving[d].sum()} replicas to load on device {d}", reason)
    far = np.bincount(rules.node, (arriving & rules.far).sum(axis=1), len(rules.node_arrivals))
    if (far > rules.node_arrivals).any():
        n = int(np.argmax(far > rules.node_arrivals))
        reason = f"may receive {rules.node_arrivals[n]} (constraints.node_move_bytes)"
        return ProblemError("layout", f"{far[n]:.0f} replicas from other nodes to load on node {n}", reason)
    if rules.regions > 1:
        in_region = np.zeros((rules.regions, placed.shape[1]), np.bool_)
        np.logical_or.at(in_region, rules.region, placed)
        of_unit = np.zeros((rules.regions, int(rules.unit.max()) + 1), np.bool_)
        for r in range(rules.regions):
            np.logical_or.at(of_unit[r], rules.unit, in_region[r])
        if (of_unit.sum(axis=0) > 1).any():
            u = int(np.argmax(of_unit.sum(axis=0) > 1))
            members = np.flatnonzero(rules.unit == u).tolist()
            reason = "must stay within one (constraints.domain, constraints.groups_on_node)"
            where = np.flatnonzero(of_unit[:, u]).tolist()
            return ProblemError("layout", f"experts {_few(members)} in regions {where}", reason)
    return None


def _replicas(problem: Problem, name: str) -> int:
    """A budget of bytes as replicas."""
    budget, size = getattr(problem.constraints, name), problem.expert.weight_bytes
    if budget is None:
        return NO_LIMIT
    if problem.current is None:
        raise ProblemError(f"constraints.{name}", budget, "needs `current`, the layout that moves start from")
    if size == 0:
        raise ProblemError(f"constraints.{name}", budget, "needs expert.weight_bytes, the size of a replica")
    return int(budget // size)


def _units(problem: Problem) -> tuple[Int32, Int32]:
    """`Rules.unit` and `Rules.region`."""
    constraints, cluster = problem.constraints, problem.cluster
    unit = np.arange(problem.experts, dtype=np.int32)
    region = np.zeros(problem.devices, np.int32)
    if constraints.domain is not None:
        if len(constraints.domain) != problem.devices:
            raise ProblemError(
                "constraints.domain",
                f"{len(constraints.domain)} values",
                f"must have one per device ({problem.devices})",
            )
        region = np.unique(constraints.domain, return_inverse=True)[1].reshape(-1).astype(np.int32)
    if constraints.groups_on_node:
        if problem.groups == 1:
            raise ProblemError("constraints.groups_on_node", True, "needs `groups`, the number of expert groups")
        for node in range(cluster.nodes):
            inside = np.unique(region[cluster.node == node])
            if len(inside) > 1:
                raise ProblemError(
                    "constraints.domain", f"{len(inside)} domains in node {node}", "a node must lie within one domain"
                )
        return (unit // (problem.experts // problem.groups)).astype(np.int32), cluster.node
    return unit, region


def _check_pins(problem: Problem, rules: Rules) -> None:
    both = rules.must & ~rules.may
    if both.any():
        device, expert = (int(i) for i in np.argwhere(both)[0])
        why = "has no slots" if problem.capacity[device] == 0 else "is forbidden there (constraints.forbidden)"
        raise InfeasibleError("constraints.pinned", f"expert {expert} to device {device}", why)
    pins = rules.must.sum(axis=1)
    if (pins > problem.capacity).any():
        device = int(np.argmax(pins > problem.capacity))
        reason = f"has room for {problem.capacity[device]}; unpin some or add slots"
        raise InfeasibleError("constraints.pinned", f"{pins[device]} experts to device {device}", reason)
    replicas = rules.must.sum(axis=0)
    if (replicas > rules.most).any():
        expert = int(np.argmax(replicas > rules.most))
        reason = f"constraints.min_tokens allows {rules.most[expert]} replicas; unpin some or lower it"
        raise InfeasibleError("constraints.pinned", f"expert {expert} to {replicas[expert]} devices", reason)


def _check_regions(problem: Problem, rules: Rules) -> None:
    if rules.regions == 1:
        return
    units = int(rules.unit.max()) + 1
    size = problem.experts // units
    room = np.bincount(rules.region, problem.capacity).astype(np.int64) // size
    if room.sum() < units:
        what = "expert groups" if size > 1 else "experts"
        raise InfeasibleError(
            "constraints.groups_on_node" if size > 1 else "constraints.domain",
            f"{units} {what} of {size} experts in {rules.regions} regions",
            f"these have room for {room.sum()}; add slots, or allow replicas anywhere",
        )
    device, expert = np.nonzero(rules.must)
    home = np.full(units, -1, np.int64)
    for d, e in zip(device, expert, strict=True):
        u = rules.unit[e]
        if home[u] not in (-1, rules.region[d]):
            where = "one node" if size > 1 else "one domain"
            raise InfeasibleError("constraints.pinned", f"expert {e} to device {d}", f"its replicas must be on {where}")
        home[u] = rules.region[d]


def _check_room(problem: Problem, rules: Rules) -> None:
    """Hall's condition: any set of experts finds as many slots among the devices that it may use."""
    from scipy.sparse import csr_matrix  # takes a while to import
    from scipy.sparse.csgraph import maximum_bipartite_matching

    free = problem.capacity - rules.must.sum(axis=1)
    loose = np.flatnonzero(~rules.must.any(axis=0))
    slot_device = np.repeat(np.arange(problem.devices), free)
    open_ = rules.may[slot_device][:, loose]  # [slots, experts]
    slot_of = maximum_bipartite_matching(csr_matrix(open_.T), perm_type="column")
    if len(loose) == 0 or (slot_of >= 0).all():
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
        f"experts {_few(experts)} only on devices {_few(devices)}",
        f"{len(experts)} experts, but {int(seen_slots.sum())} slots are free there; allow more pairs or add slots",
    )


def _check_lost(problem: Problem, rules: Rules) -> None:
    if problem.current is None:
        return
    lost = int((~rules.held.any(axis=0)).sum())
    pins = int((rules.must & ~rules.held).any(axis=0).sum())
    needed = max(lost, pins)
    if needed > rules.max_arrivals:
        raise InfeasibleError(
            "max_moves",
            rules.max_arrivals,
            f"{needed} experts must be loaded anew (lost with their device, or pinned); allow at least as many",
        )


def _few(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"{str(numbers[:8])[:-1]}, ... {len(numbers)} in all]"
