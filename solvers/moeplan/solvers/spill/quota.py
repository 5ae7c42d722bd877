"""`quota`: exact-load spilling near the proven optimum, in tens of microseconds on one core."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.domain_search import lower_bound, solve_domain
from moeplan.solvers.spill.filling import CHUNK_EXPERT, CHUNK_TO, CHUNK_TOKENS, finish_time, go_home
from moeplan.solvers.spill.options import MAX_TOTAL, SpillOptions
from moeplan.solvers.spill.sourcing import source_tokens
from moeplan.solvers.spill.spill_plan import SpillPlan

__all__ = ["QuotaPlanner", "fill_plans"]

# Rows of the tables that carry a planner's arrays into its kernel. Each argument of a compiled function costs about
# 0.1 us of unpacking per call, so arrays of one length share a table.
_FIRST, _SPARE, _CAP, _DEVICE, _NODE, _OF_DEVICE, _OF_NODE = range(7)
_AT_HOME, _LOAD, _RECEIVED, _ROOM, _EXCESS = range(5)
_TOKENS, _LEFT, _HEAD = range(3)
_EXPERT, _HOST, _QUOTA, _FOLLOWING, _NEED = range(5)
_OUT_LOAD, _OUT_SHORT = range(2)
_REPLICAS, _TIMES = range(2)


class QuotaPlanner:
    """The `quota` policy with its workspace, which all calls share: a call allocates nothing.

    Every rank that plans the same counts with equal options gets the same plan, bit for bit. Building a planner
    compiles the kernels, once per machine. A planner serves one thread at a time.

    The search packs chunks at a target load (`packing`), raising the target from the lower bound until it fits
    (`search`). It shares the outer idea, greedy export at a threshold, with UltraEP (arXiv 2606.04101); its own are
    passing unused room on to the sender, the bounds, unequal speeds, memory, and transfer costs.

    Args:
        options: Devices and limits.
        sources: Ranks whose tokens are routed; source i is on device ``i * devices // sources``.
        layers: Layers of one `plan_layers` call; the workspace holds one plan for each.
        dtype: int32 or int64, type of the counts.

    Attributes:
        workspace: What `fill_plans` takes after the counts, for compiled callers; ends with what it fills.

    Raises:
        ProblemError: `sources`, `layers` or `dtype` is out of range.
    """

    def __init__(
        self, options: SpillOptions, sources: int, *, layers: int = 1, dtype: npt.DTypeLike = np.int64
    ) -> None:
        for name, value in (("sources", sources), ("layers", layers)):
            if not 1 <= value < 2**31:
                raise ProblemError(f"spill.{name}", value, "must be at least 1")
        self.options = options
        self.sources = sources
        self.layers = layers
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
            raise ProblemError("spill.dtype", self.dtype, "must be int32 or int64")
        self.source_device = options.source_device(sources)

        experts, devices = options.experts, options.devices
        slots = int(np.minimum(options.spare, experts).sum())
        # Scratch: what a call needs between its steps, and nothing beyond it.
        self._scratch = (
            np.zeros((5, devices), np.int64),
            np.full((3, experts), -1, np.int64),
            np.zeros(sources, np.int64),
            np.zeros((2, 4, slots), np.int64),
        )
        self._topology = _topology(options, self.source_device)
        self._replicas = np.zeros((layers, 5, slots), np.int64)
        self._home_quota = np.zeros((layers, experts), np.int64)
        self._devices = np.zeros((layers, 2, devices), np.int64)
        self._sent = np.zeros((layers, slots, sources), self.dtype)
        self._kept = np.zeros((layers, sources, experts), self.dtype)
        self._summary = np.zeros((layers, 4), np.float64)
        self.workspace = (
            *self._topology,
            *self._scratch,
            self._replicas,
            self._home_quota,
            self._devices,
            self._sent,
            self._kept,
            self._summary,
        )
        self._views: list[dict[int, SpillPlan]] = [{} for _ in range(layers)]
        self.plan(np.zeros((sources, experts), self.dtype))  # compiles, or loads what is compiled

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
        if len(shape) != 3 or not 1 <= shape[0] <= self.layers or shape[1:] != self._kept.shape[1:]:
            raise ProblemError(
                "spill.counts",
                f"array of shape {shape}",
                f"must be [1..{self.layers} layers, {self.sources} sources, {self.options.experts} experts]",
            )
        if counts.dtype != self.dtype:
            raise ProblemError("spill.counts", f"array of {counts.dtype}", f"must hold {self.dtype}; cast it first")
        if not counts.flags.c_contiguous:
            counts = np.ascontiguousarray(counts)
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
        n = int(self._summary[layer, _REPLICAS])
        plan = self._views[layer].get(n)
        if plan is None:
            replicas = self._replicas[layer]
            plan = self._views[layer][n] = SpillPlan(
                replicas[_EXPERT, :n],
                replicas[_HOST, :n],
                replicas[_QUOTA, :n],
                self._home_quota[layer],
                self._sent[layer, :n].T,
                self._kept[layer],
                self._devices[layer, _OUT_LOAD],
                self._devices[layer, _OUT_SHORT],
                self._summary[layer, _TIMES:],
            )
        return plan


def _topology(options: SpillOptions, source_device: Int64) -> tuple[Int64, Int64, Float64, Int64, Int64, Float64]:
    """The options as the kernel reads them; devices by position: sorted by domain, stably.

    Returns:
        int64[2, experts], experts sorted by the position of their home, and each expert's home; int64[7, devices + 1 or
        more], one row per name above; float64[positions], speeds; int64[domains + 1], first position of each domain;
        int64[2, sources], sources sorted by device and by node; float64[6], costs, limits and the number of nodes.
    """
    devices = options.devices
    device = np.argsort(options.domain, kind="stable")
    home = np.argsort(device)[options.home]
    source_node = options.node[source_device]
    nodes = int(options.node.max()) + 1
    table = np.zeros((7, max(devices, nodes) + 1), np.int64)
    table[_FIRST, : devices + 1] = np.searchsorted(np.sort(home), np.arange(devices + 1))
    table[_SPARE, :devices] = np.minimum(options.spare, options.experts)[device]
    table[_CAP, :devices] = options.token_cap[device]
    table[_DEVICE, :devices] = device
    table[_NODE, :devices] = options.node
    table[_OF_DEVICE, : devices + 1] = np.searchsorted(source_device, np.arange(devices + 1))
    table[_OF_NODE, : nodes + 1] = np.searchsorted(np.sort(source_node), np.arange(nodes + 1))
    limits = (
        options.transfer_tokens,
        options.replica_tokens,
        options.min_tokens,
        options.tolerance,
        options.threshold,
    )
    return (
        np.stack([np.argsort(home, kind="stable"), options.home.astype(np.int64)]),
        table,
        options.speed[device],
        np.append(np.flatnonzero(np.diff(options.domain[device], prepend=-1)), devices).astype(np.int64),
        np.stack([np.arange(len(source_device)), np.argsort(source_node, kind="stable")]),
        np.array([*limits, nodes], np.float64),
    )


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
    source_order: Int64,
    costs: Float64,
    work: Int64,
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
    """Plan every layer; -1, or the first layer whose counts are invalid. The tables' rows are named at the top."""
    for layer in range(len(counts)):
        if not _add_up(counts[layer], home_quota[layer], kept[layer]):
            return layer
        _plan_quotas(
            experts[0], table, speed, domains, costs, work, expert_work, chunks,
            replicas[layer], home_quota[layer], devices[layer], summary[layer],
        )  # fmt: skip
        source_tokens(
            counts[layer],
            int(summary[layer, _REPLICAS]),
            replicas[layer, _EXPERT],
            replicas[layer, _HOST],
            replicas[layer, _QUOTA],
            home_quota[layer],
            experts[1],
            table[_NODE],
            source_order[0],
            table[_OF_DEVICE],
            source_order[1],
            table[_OF_NODE, : int(costs[5]) + 1],
            expert_work[_HEAD],
            replicas[layer, _FOLLOWING],
            supply,
            replicas[layer, _NEED],
            sent[layer],
            kept[layer],
        )
    return -1


@kernel
def _plan_quotas(
    order: Int64,
    table: Int64,
    speed: Float64,
    domains: Int64,
    costs: Float64,
    work: Int64,
    expert_work: Int64,
    chunks: Int64,
    replicas: Int64,
    home_quota: Int64,
    devices: Int64,
    summary: Float64,
) -> None:
    """Replicas and quotas of one layer; `home_quota` holds the tokens of each expert and keeps what stays."""
    n = len(speed)
    first, spare, cap, device = table[_FIRST, : n + 1], table[_SPARE, :n], table[_CAP, :n], table[_DEVICE, :n]
    at_home, load, received, room, excess = work[_AT_HOME], work[_LOAD], work[_RECEIVED], work[_ROOM], work[_EXCESS]
    w, left = expert_work[_TOKENS], expert_work[_LEFT]
    for i in range(len(order)):
        w[i] = home_quota[order[i]]
    _loads_at_home(w, first, at_home)
    go_home(at_home, load, received)
    floor = 0.0
    for k in range(len(domains) - 1):
        d = slice(domains[k], domains[k + 1])
        floor = max(floor, lower_bound(spare[d], cap[d], speed[d], at_home[d]))
    worst, short = finish_time(cap, speed, costs, load, received)
    balanced = at_home.sum() / speed.sum()

    count = 0
    if short > 0 or worst > costs[4] * balanced:
        for k in range(len(domains) - 1):
            low, high = domains[k], domains[k + 1]
            d = slice(low, high)
            best, found = solve_domain(
                floor, w, first[low : high + 1], spare[d], cap[d], speed[d], costs,
                at_home[d], load[d], received[d], room[d], excess[d], left, chunks,
            )  # fmt: skip
            for c in range(found):
                expert = order[chunks[best, CHUNK_EXPERT, c]]
                replicas[_EXPERT, count] = expert
                replicas[_HOST, count] = device[low + chunks[best, CHUNK_TO, c]]
                replicas[_QUOTA, count] = chunks[best, CHUNK_TOKENS, c]
                home_quota[expert] -= chunks[best, CHUNK_TOKENS, c]
                count += 1
        worst, short = finish_time(cap, speed, costs, load, received)
    memory = int(costs[1])
    for p in range(n):
        devices[_OUT_LOAD, device[p]] = load[p]
        devices[_OUT_SHORT, device[p]] = max(load[p] + memory * received[p] - cap[p], 0)
    summary[_REPLICAS] = count
    summary[_TIMES] = worst
    summary[_TIMES + 1] = floor
    summary[_TIMES + 2] = balanced
