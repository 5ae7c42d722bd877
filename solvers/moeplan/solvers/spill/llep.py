"""`llep`: the least-loaded assignment of LLEP (arXiv 2601.17111, algorithms 2 and 3), as a baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.options import SpillOptions
from moeplan.solvers.spill.sourcing import Places, Quotas, Scratch, source_spill
from moeplan.solvers.spill.spill_plan import SpillPlan
from moeplan.solvers.split.sources import Groups, sort_sources

__all__ = ["LlepPlanner"]


class LlepPlanner:
    """LLEP's planner: experts by falling load, each at home as far as the capacity goes, the rest to the least loaded.

    The capacity is ``alpha * tokens / devices``. Nothing is spilled while max / mean of the loads that `gate` names is
    below `threshold`: of the experts, as the paper says, or of the devices at home, as its program does, which spills
    less often where a hot expert has cold neighbours. As published it knows neither spare slots nor domains, nodes,
    speeds or memory: of the options only `home` is used for planning (`node` for the choice of sources). It may give a
    device any number of replicas.

    Two differences from the published program: tokens of one expert that go to one device in several steps are one
    replica (the program can list the pair twice, and then loses gradients), and a spill from a full home looks for the
    least loaded device before every chunk, as the paper's algorithm does (the program sorts the devices once).

    Args:
        options: Devices; see above.
        sources: Ranks whose tokens are routed.
        alpha: Capacity over mean load, at least 1.
        min_tokens: Smallest chunk (m), unless it is all that remains.
        threshold: The gate (lambda) on max / mean.
        gate: Loads that it looks at: of `experts` (the paper) or of `devices` (its program).

    Raises:
        ProblemError: a value is out of range.
    """

    def __init__(
        self,
        options: SpillOptions,
        sources: int,
        *,
        alpha: float = 1.0,
        min_tokens: int = 1024,
        threshold: float = 1.3,
        gate: Literal["experts", "devices"] = "experts",
    ) -> None:
        for name, value, least in (
            ("sources", sources, 1),
            ("alpha", alpha, 1),
            ("min_tokens", min_tokens, 1),
            ("threshold", threshold, 1),
        ):
            if not least <= value < float("inf"):
                raise ProblemError(f"llep.{name}", value, f"must be at least {least}")
        if gate not in ("experts", "devices"):
            raise ProblemError("llep.gate", repr(gate), "must be experts or devices")
        self.options = options
        self.sources = sources
        self.gate: Literal["experts", "devices"] = gate
        self.alpha, self.min_tokens, self.threshold = alpha, min_tokens, threshold
        self.source_device = options.source_device(sources)
        self._places = Places(options.home.astype(np.int64), sort_sources(self.source_device, options.node))

    @property
    def settings(self) -> tuple[object, ...]:
        """What plans depend on beside options and counts."""
        return self.alpha, self.min_tokens, self.threshold, self.gate

    def with_home(self, home: Int32) -> LlepPlanner:
        """A planner that differs in the homes, int32[experts], only."""
        return LlepPlanner(
            replace(self.options, home=home),
            self.sources,
            alpha=self.alpha,
            min_tokens=self.min_tokens,
            threshold=self.threshold,
            gate=self.gate,
        )

    def plan(self, counts: npt.NDArray[Any]) -> SpillPlan:
        """The plan of one layer.

        Args:
            counts: int[sources, experts].

        Raises:
            ProblemError: `counts` has another shape or a negative count.
        """
        if counts.shape != (self.sources, self.options.experts) or counts.dtype.kind not in "iu":
            raise ProblemError(
                "llep.counts",
                f"array of {counts.dtype}, shape {counts.shape}",
                f"must hold integers [{self.sources} sources, {self.options.experts} experts]",
            )
        tokens = counts.sum(axis=0, dtype=np.int64)
        if counts.min() < 0:
            raise ProblemError("llep.counts", int(counts.min()), "must be at least 0")
        experts, devices, home = self.options.experts, self.options.devices, self._places.home
        total = int(tokens.sum())
        balanced = total / devices
        share = np.zeros((experts, devices), np.int64)
        at_home = np.bincount(home, tokens, minlength=devices)
        gated = tokens if self.gate == "experts" else at_home
        if gated.max() * len(gated) < self.threshold * total or total == 0:
            share[np.arange(experts), home] = tokens
            load = share.sum(axis=0)
        else:
            capacity = max(int(self.alpha * (total // devices)), 1)
            order = np.argsort(-tokens, kind="stable")
            load = np.zeros(devices, np.int64)
            _assign(tokens, order, home, capacity, self.min_tokens, load, share)
        home_quota = share[np.arange(experts), home]
        share[np.arange(experts), home] = 0
        expert, device = np.nonzero(share)
        quota = share[expert, device]
        slots = len(expert)
        sent = np.zeros((slots, self.sources), counts.dtype)
        kept = counts.copy()
        workspace = np.zeros((5, slots + 1), np.int64)
        source_spill(
            counts,
            slots,
            Quotas(expert, device, quota, home_quota),
            self._places,
            Scratch(
                np.full(experts, -1),
                Groups(*workspace[:3]),
                workspace[3],
                np.zeros(self.sources, np.int64),
                workspace[4],
            ),
            sent,
            kept,
        )
        shortfall = np.maximum(load - self.options.token_cap, 0)
        return SpillPlan(
            expert, device, quota, home_quota, sent.T, kept, load, shortfall,
            np.array([load.max(), balanced, balanced]),
        )  # fmt: skip


@kernel
def _least_loaded(
    load: Int64, pending: Int64, home: int, capacity: int, remaining: int, smallest: int
) -> tuple[int, int]:
    """Device, other than `home`, with the least load to come that can take a worthwhile chunk; and the chunk.

    Where no device has room, the least loaded takes all that remains.
    """
    best, forced = -1, -1
    for d in range(len(load)):
        if d == home:
            continue
        expected = load[d] + pending[d]
        if forced < 0 or expected < load[forced] + pending[forced]:
            forced = d
        chunk = min(remaining, capacity - expected)
        if chunk <= 0 or (chunk < smallest and chunk < remaining):
            continue
        if best < 0 or expected < load[best] + pending[best]:
            best = d
    if best >= 0:
        return best, min(remaining, capacity - load[best] - pending[best])
    return (forced if forced >= 0 else home), remaining


@kernel
def _assign(tokens: Int64, order: Int64, home: Int64, capacity: int, smallest: int, load: Int64, share: Int64) -> None:
    """Fill `share`[expert, device] and `load`[device]."""
    pending = np.zeros(len(load), np.int64)
    for e in range(len(tokens)):
        pending[home[e]] += tokens[e]
    for e in order:
        h = home[e]
        pending[h] -= tokens[e]
        stays = min(tokens[e], max(capacity - load[h] - pending[h], 0))
        share[e, h] += stays
        load[h] += stays
        remaining = tokens[e] - stays
        while remaining > 0:
            d, chunk = _least_loaded(load, pending, h, capacity, remaining, smallest)
            share[e, d] += chunk
            load[d] += chunk
            remaining -= chunk
