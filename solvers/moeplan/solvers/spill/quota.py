"""`quota`: exact-load spilling near the proven optimum, in tens of microseconds on one core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.domain_search import lower_bound, solve_domain, with_transfers
from moeplan.solvers.spill.filling import (
    CHUNK_EXPERT,
    CHUNK_TO,
    CHUNK_TOKENS,
    Costs,
    Domain,
    State,
    finish_time,
    go_home,
)
from moeplan.solvers.spill.options import MAX_TOTAL, NO_CAP, SpillOptions
from moeplan.solvers.spill.replica_search import Trial
from moeplan.solvers.spill.sourcing import Places, Quotas, Scratch, source_spill
from moeplan.solvers.spill.spill_plan import SpillPlan
from moeplan.solvers.split.sources import Groups, Sources

__all__ = ["QuotaPlanner", "fill_plans"]

# Rows of the tables that carry a planner's arrays into its kernel. Each argument of a compiled function costs about
# 0.1 us of unpacking per call, so arrays of one length share a table.
_FIRST, _SPARE, _CAP, _DEVICE, _NODE, _OF_DEVICE, _OF_NODE = range(7)
_AT_HOME, _LOAD, _RECEIVED, _ROOM, _EXCESS, _TRIED_LOAD, _TRIED_RECEIVED, _QUEUE, _ENTRY, _COUNTERS = range(10)
_TOKENS, _LEFT, _GROUP, _TRIED_LEFT = range(4)
_EXPERT, _HOST, _QUOTA, _GROUPED, _START, _ORDER, _CURSOR, _NEED = range(8)
_OUT_LOAD, _OUT_SHORT = range(2)
_REPLICAS, _TIMES = range(2)

_SEARCH = 40_000
"""Chunks that a search over replicas may look at: some tenths of a millisecond, where it runs at all."""


class _Topology(NamedTuple):
    """The options as the kernel reads them; devices by position: sorted by domain, stably.

    Attributes:
        experts: int64[2, experts], experts sorted by the position of their home, and each expert's home.
        table: int64[7, devices + 1 or more], one row per name above.
        speed: float64[positions].
        domains: int64[domains + 1], first position of each domain.
        sources: int64[2, sources], sources sorted by device and by node.
        costs: float64[10], the fields of `Costs`, in tiles; then the nodes, and the tokens of a tile and a least chunk.
    """

    experts: Int64
    table: Int64
    speed: Float64
    domains: Int64
    sources: Int64
    costs: Float64


class _Work(NamedTuple):
    """Memory of a call between its steps, and nothing beyond it: a row per name above.

    Attributes:
        devices: int64[10, devices].
        experts: int64[4, experts].
        supply: int64[sources].
        chunks: int64[4, 4, slots].
    """

    devices: Int64
    experts: Int64
    supply: Int64
    chunks: Int64


class _Plans(NamedTuple):
    """The plans of all layers, a row per name above.

    Attributes:
        replicas: int64[layers, 8, slots + 1].
        home_quota: int64[layers, experts].
        devices: int64[layers, 2, devices].
        sent: `dtype`[layers, slots, sources].
        kept: `dtype`[layers, sources, experts].
        summary: float64[layers, 4], number of replicas, then `SpillPlan.times`.
    """

    replicas: Int64
    home_quota: Int64
    devices: Int64
    sent: npt.NDArray[Any]
    kept: npt.NDArray[Any]
    summary: Float64


class QuotaPlanner:
    """The `quota` policy with its workspace, which all calls share: a call allocates nothing.

    Every rank that plans the same counts with equal options gets the same plan, bit for bit. Building a planner
    compiles the kernels, once per machine. A planner serves one thread at a time.

    The search packs chunks at a target load (`filling`), raising the target from the lower bound until it fits
    (`domain_search`). It shares the outer idea, greedy export at a threshold, with UltraEP (arXiv 2606.04101); its own
    are passing unused room on to the sender, the bounds, unequal speeds, memory, and transfer costs.

    Args:
        options: Devices and limits.
        sources: Ranks whose tokens are routed; source i is on device ``i * devices // sources``.
        layers: Layers of one `plan_layers` call; the workspace holds one plan for each.
        dtype: int32 or int64, type of the counts.
        quick: Whether to leave it at packing, some microseconds, where limits that packing does not look ahead to (see
            `_looks_ahead`) are worth a search of some tenths of a millisecond otherwise. Within a pass they are not:
            experts take no longer than that for the tokens that it gains. It searches where packing exceeds a cap.

    Attributes:
        workspace: What `fill_plans` takes after the counts, for compiled callers; ends with what it fills.

    Raises:
        ProblemError: `sources`, `layers` or `dtype` is out of range.
    """

    def __init__(
        self,
        options: SpillOptions,
        sources: int,
        *,
        layers: int = 1,
        dtype: npt.DTypeLike = np.int64,
        quick: bool = False,
    ) -> None:
        for name, value in (("sources", sources), ("layers", layers)):
            if not 1 <= value < 2**31:
                raise ProblemError(f"spill.{name}", value, "must be at least 1")
        self.options = options
        self.sources = sources
        self.layers = layers
        self.quick = quick
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
            raise ProblemError("spill.dtype", self.dtype, "must be int32 or int64")
        self.source_device = options.source_device(sources)

        experts, devices = options.experts, options.devices
        slots = int(np.minimum(options.spare, experts).sum())
        work = _Work(
            np.zeros((10, devices), np.int64),
            np.full((4, experts), -1, np.int64),
            np.zeros(sources, np.int64),
            np.zeros((4, 4, slots), np.int64),
        )
        self._plans = _Plans(
            np.zeros((layers, 8, slots + 1), np.int64),
            np.zeros((layers, experts), np.int64),
            np.zeros((layers, 2, devices), np.int64),
            np.zeros((layers, slots, sources), self.dtype),
            np.zeros((layers, sources, experts), self.dtype),
            np.zeros((layers, 4), np.float64),
        )
        self.workspace: tuple[Any, ...] = (
            *_topology(options, self.source_device, quick),
            *work,
            *self._plans,
        )
        self._views: list[dict[int, SpillPlan]] = [{} for _ in range(layers)]
        self.plan(np.zeros((sources, experts), self.dtype))  # compiles, or loads what is compiled

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose plans are views into a workspace of their own."""
        return self.__dict__ | {"_views": [{} for _ in range(self.layers)]}

    @property
    def settings(self) -> tuple[object, ...]:
        """What plans depend on beside options and counts."""
        return (self.quick,)

    def with_home(self, home: Int32) -> QuotaPlanner:
        """A planner that differs in the homes, int32[experts], only; it has a workspace of its own."""
        options = replace(self.options, home=home)
        return QuotaPlanner(options, self.sources, layers=self.layers, dtype=self.dtype, quick=self.quick)

    def plan(self, counts: npt.NDArray[Any]) -> SpillPlan:
        """The plan of one layer.

        Args:
            counts: `dtype`[sources, experts], tokens of each expert from each source; exact, so never negative.

        Raises:
            ProblemError: shape or dtype differ from the planner's, a count is negative, or the total exceeds 2**46.
        """
        return self.plan_layers(counts[np.newaxis])[0]

    def plan_layers(self, counts: npt.NDArray[Any]) -> list[SpillPlan]:
        """The plans of up to `layers` layers, each on its own.

        Args:
            counts: `dtype`[layers, sources, experts].

        Raises:
            ProblemError: as `plan`.
        """
        layers = self._run(counts)
        return [self._view(layer) for layer in range(layers)]

    def _run(self, counts: npt.NDArray[Any]) -> int:
        shape = counts.shape
        if len(shape) != 3 or not 1 <= shape[0] <= self.layers or shape[1:] != self._plans.kept.shape[1:]:
            raise ProblemError(
                "spill.counts",
                f"array of shape {shape}",
                f"must be [1..{self.layers} layers, {self.sources} sources, {self.options.experts} experts]",
            )
        if counts.dtype != self.dtype:
            raise ProblemError("spill.counts", f"array of {counts.dtype}", f"must hold {self.dtype}; cast it first")
        if not counts.flags.carray:  # read-only ones would have all kernels compiled once more
            counts = counts.copy()
        fault = fill_plans(counts, *self.workspace)
        if fault >= 0:
            raise ProblemError(
                "spill.counts",
                f"layer {fault}",
                f"must hold counts of at least 0 with a total of at most {MAX_TOTAL}",
            )
        return len(counts)

    def _view(self, layer: int) -> SpillPlan:
        """The views of a plan depend on nothing but its number of replicas, so each is made once."""
        plans = self._plans
        n = int(plans.summary[layer, _REPLICAS])
        plan = self._views[layer].get(n)
        if plan is None:
            replicas = plans.replicas[layer]
            plan = self._views[layer][n] = SpillPlan(
                replicas[_EXPERT, :n],
                replicas[_HOST, :n],
                replicas[_QUOTA, :n],
                plans.home_quota[layer],
                plans.sent[layer, :n].T,
                plans.kept[layer],
                plans.devices[layer, _OUT_LOAD],
                plans.devices[layer, _OUT_SHORT],
                plans.summary[layer, _TIMES:],
            )
        return plan


def _topology(options: SpillOptions, source_device: Int64, quick: bool) -> _Topology:
    devices = options.devices
    device = np.argsort(options.domain, kind="stable")
    home = np.argsort(device)[options.home]
    source_node = options.node[source_device]
    nodes = int(options.node.max()) + 1
    table = np.zeros((7, max(devices, nodes) + 1), np.int64)
    table[_FIRST, : devices + 1] = np.searchsorted(np.sort(home), np.arange(devices + 1))
    table[_SPARE, :devices] = np.minimum(options.spare, options.experts)[device]
    tile = options.tile_rows
    table[_CAP, :devices] = options.token_cap[device] // tile
    table[_DEVICE, :devices] = device
    table[_NODE, :devices] = options.node
    table[_OF_DEVICE, : devices + 1] = np.searchsorted(source_device, np.arange(devices + 1))
    table[_OF_NODE, : nodes + 1] = np.searchsorted(np.sort(source_node), np.arange(nodes + 1))
    costs = Costs(
        options.transfer_tokens / tile,
        -(-options.replica_tokens // tile),
        -(-options.min_tokens // tile),
        options.tolerance,
        options.threshold,
        _SEARCH if _looks_ahead(options) else 0,
        int(quick),
    )
    return _Topology(
        np.stack([np.argsort(home, kind="stable"), options.home.astype(np.int64)]),
        table,
        options.speed[device],
        np.append(np.flatnonzero(np.diff(options.domain[device], prepend=-1)), devices).astype(np.int64),
        np.stack([np.arange(len(source_device)), np.argsort(source_node, kind="stable")]),
        np.array([*costs, nodes, tile, options.min_tokens], np.float64),
    )


def _looks_ahead(options: SpillOptions) -> bool:
    """True where packing, which does not look ahead, may miss plans; elsewhere it is near the optimum."""
    alike = all((row == row[0]).all() for row in (options.spare, options.speed))
    return options.min_tokens > 1 or options.transfer_tokens > 0 or options.token_cap.min() < NO_CAP or not alike


@kernel
def _add_up(counts: npt.NDArray[Any], total: Int64, copy: npt.NDArray[Any]) -> bool:
    """Tokens of each expert from all sources, and a copy; False if a count is negative or the total too large."""
    bits = 0
    for e in range(len(total)):
        total[e] = 0
    for s in range(counts.shape[0]):
        for e in range(counts.shape[1]):
            tokens = counts[s, e]
            total[e] += tokens
            copy[s, e] = tokens
            bits |= tokens
    return bits >= 0 and bits <= MAX_TOTAL and total.sum() <= MAX_TOTAL


@kernel
def _loads_at_home(w: Int64, first: Int64, load: Int64) -> None:
    for p in range(len(load)):
        load[p] = 0
        for i in range(first[p], first[p + 1]):
            load[p] += w[i]


@kernel
def fill_plans(
    counts: npt.NDArray[Any],
    experts: Int64,
    table: Int64,
    speed: Float64,
    domains: Int64,
    sources: Int64,
    costs: Float64,
    device_work: Int64,
    expert_work: Int64,
    supply: Int64,
    chunks: Int64,
    replicas: Int64,
    home_quota: Int64,
    devices: Int64,
    sent: npt.NDArray[Any],
    kept: npt.NDArray[Any],
    summary: Float64,
) -> int:
    """`_plan_each` of a topology, workspace and plans.

    Their fields are handed over one by one: a call from Python takes several microseconds to look through a tuple of
    arrays, as long as the planning of a small layer.
    """
    return _plan_each(
        counts,
        _Topology(experts, table, speed, domains, sources, costs),
        _Work(device_work, expert_work, supply, chunks),
        _Plans(replicas, home_quota, devices, sent, kept, summary),
    )


@kernel
def _plan_each(counts: npt.NDArray[Any], topology: _Topology, work: _Work, plans: _Plans) -> int:
    """Plan every layer; -1, or the first layer whose counts are invalid."""
    table, numbers = topology.table, topology.costs
    costs = Costs(
        numbers[0], int(numbers[1]), int(numbers[2]), numbers[3], numbers[4], int(numbers[5]), int(numbers[6])
    )
    by_device, by_node = topology.sources[0], topology.sources[1]
    of_node = table[_OF_NODE, : int(numbers[7]) + 1]
    places = Places(topology.experts[1], Sources(table[_NODE], by_device, table[_OF_DEVICE], by_node, of_node))
    for layer in range(len(counts)):
        replicas, home_quota = plans.replicas[layer], plans.home_quota[layer]
        summary, sent, kept = plans.summary[layer], plans.sent[layer], plans.kept[layer]
        if not _add_up(counts[layer], home_quota, kept):
            return layer
        quotas = Quotas(replicas[_EXPERT], replicas[_HOST], replicas[_QUOTA], home_quota)
        _plan_quotas(topology, costs, work, quotas, plans.devices[layer], summary)
        groups = Groups(replicas[_GROUPED], replicas[_START], replicas[_ORDER])
        scratch = Scratch(work.experts[_GROUP], groups, replicas[_CURSOR], work.supply, replicas[_NEED])
        source_spill(counts[layer], int(summary[_REPLICAS]), quotas, places, scratch, sent, kept)
    return -1


@kernel
def _plan_quotas(
    topology: _Topology, costs: Costs, work: _Work, quotas: Quotas, devices: Int64, summary: Float64
) -> None:
    """Replicas and quotas of one layer; `home_quota` holds the tokens of each expert and keeps what stays."""
    order, table, domains, chunks = topology.experts[0], topology.table, topology.domains, work.chunks
    expert, host, quota, home_quota = quotas.expert, quotas.device, quotas.quota, quotas.home_quota
    n = len(topology.speed)
    every = Domain(table[_FIRST, : n + 1], table[_SPARE, :n], table[_CAP, :n], topology.speed)
    device = table[_DEVICE, :n]
    rows = work.devices
    state = State(rows[_AT_HOME], rows[_LOAD], rows[_RECEIVED], rows[_ROOM], rows[_EXCESS])
    w, left = work.experts[_TOKENS], work.experts[_LEFT]
    tile = int(topology.costs[8])
    for i in range(len(order)):
        w[i] = home_quota[order[i]] if tile == 1 else -(-home_quota[order[i]] // tile)
    _loads_at_home(w, every.first, state.at_home)
    go_home(state)
    floor = 0.0
    for k in range(len(domains) - 1):
        low, high = domains[k], domains[k + 1]
        part, at_home = _part(every, low, high), state.at_home[low:high]
        bound = lower_bound(part, at_home)
        if costs.transfer > 0:
            bound = with_transfers(bound, w, part, at_home, costs.transfer)
        floor = max(floor, bound)
    worst, short = finish_time(every, costs, state)
    balanced = state.at_home.sum() / topology.speed.sum()
    if tile > 1:
        _hold_last_tiles(home_quota, order, tile, int(topology.costs[9]), w)

    count = 0
    if short > 0 or worst > costs.threshold * balanced:
        for k in range(len(domains) - 1):
            low, high = domains[k], domains[k + 1]
            here = State(
                state.at_home[low:high],
                state.load[low:high],
                state.received[low:high],
                state.room[low:high],
                state.excess[low:high],
            )
            trial = _trial(rows[:, low:high], work)
            best, found = solve_domain(floor, w, _part(every, low, high), costs, here, left, chunks, trial)
            for c in range(found):
                e = order[chunks[best, CHUNK_EXPERT, c]]
                expert[count] = e
                host[count] = device[low + chunks[best, CHUNK_TO, c]]
                quota[count] = min(chunks[best, CHUNK_TOKENS, c] * tile, home_quota[e])
                home_quota[e] -= quota[count]
                count += 1
        worst, short = finish_time(every, costs, state)
    load, received, cap = state.load, state.received, every.cap
    for p in range(n):
        devices[_OUT_LOAD, device[p]] = load[p]
        devices[_OUT_SHORT, device[p]] = max(load[p] + costs.memory * received[p] - cap[p], 0) * tile
    if tile > 1:
        _load_in_tokens(count, quotas, topology.experts[1], devices[_OUT_LOAD])
    summary[_REPLICAS] = count
    summary[_TIMES] = worst * tile
    summary[_TIMES + 1] = floor * tile
    summary[_TIMES + 2] = balanced * tile


@kernel
def _hold_last_tiles(tokens: Int64, order: Int64, tile: int, smallest: int, w: Int64) -> None:
    """Keep an expert's last tile, if it is not full, at home where a least chunk would have too few tokens with it."""
    for i in range(len(order)):
        missing = w[i] * tile - tokens[order[i]]
        if missing > 0 and -(-smallest // tile) * tile - missing < smallest:
            w[i] -= 1


@kernel
def _load_in_tokens(replicas: int, quotas: Quotas, home: Int64, load: Int64) -> None:
    """Tokens of each device, where loads were counted in tiles."""
    for d in range(len(load)):
        load[d] = 0
    for e in range(len(home)):
        load[home[e]] += quotas.home_quota[e]
    for r in range(replicas):
        load[quotas.device[r]] += quotas.quota[r]


@kernel
def _part(every: Domain, low: int, high: int) -> Domain:
    """The devices at positions ``low:high``."""
    return Domain(every.first[low : high + 1], every.spare[low:high], every.cap[low:high], every.speed[low:high])


@kernel
def _trial(rows: Int64, work: _Work) -> Trial:
    """The memory of a search over some of the devices' columns."""
    return Trial(
        rows[_TRIED_LOAD],
        rows[_TRIED_RECEIVED],
        rows[_QUEUE],
        rows[_ENTRY],
        rows[_COUNTERS],
        work.experts[_TRIED_LEFT],
        work.chunks[2],
        work.chunks[3],
    )
