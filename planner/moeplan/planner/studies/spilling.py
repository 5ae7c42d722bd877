"""Judging policies under known counts: each plans every layer and step from the counts that it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter_ns
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from moeplan.solvers import LlepPlanner, ProblemError, QuotaPlanner, SpillOptions, SpillPlan

__all__ = ["KNOWN_COUNTS_POLICIES", "KnownCountsComparison", "compare_known_counts"]

KNOWN_COUNTS_POLICIES = ("static", "llep", "quota")
"""Names that `compare_known_counts` knows."""


class KnownCountsRow(TypedDict):
    """Measurements of one policy; see `compare_known_counts`."""

    policy: str
    imbalance: dict[str, float]
    replicas: dict[str, float]
    us_per_call: dict[str, float]
    remote_fraction: dict[str, float | None]


class KnownCountsComparison(TypedDict):
    """The answer of `compare_known_counts`."""

    policies: list[KnownCountsRow]


class _Planner(Protocol):
    def plan(self, counts: npt.NDArray[Any]) -> SpillPlan: ...


@dataclass(slots=True)
class _Judged:
    """Measurements of one policy; one entry per layer and step."""

    name: str
    options: SpillOptions
    planners: dict[tuple[int, np.dtype[Any]], _Planner] = field(default_factory=dict)
    imbalance: list[float] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    microseconds: list[float] = field(default_factory=list)
    remote: list[float] = field(default_factory=list)

    def judge(self, counts: npt.NDArray[Any]) -> None:
        """Plan a layer, [sources, experts]."""
        sources = len(counts)
        planner = self.planners.get((sources, counts.dtype))
        if planner is None:
            planner = self.planners[sources, counts.dtype] = _planner(self.name, self.options, sources, counts.dtype)
            planner.plan(counts)  # compiles
        begin = perf_counter_ns()
        plan = planner.plan(counts)
        self.microseconds.append((perf_counter_ns() - begin) / 1e3)
        self.imbalance.append(plan.imbalance)
        self.replicas.append(plan.replicas)
        away = plan.remote_tokens(self.options.source_device(sources), self.options.home)
        self.remote.append(away / max(int(counts.sum()), 1))

    def row(self, *, told_apart: bool) -> KnownCountsRow:
        """What came out."""
        return {
            "policy": self.name,
            "imbalance": {
                "mean": float(np.mean(self.imbalance)),
                "p95": float(np.quantile(self.imbalance, 0.95)),
                "max": float(np.max(self.imbalance)),
            },
            "replicas": {"mean": float(np.mean(self.replicas)), "max": int(np.max(self.replicas))},
            "us_per_call": {
                "p50": float(np.quantile(self.microseconds, 0.5)),
                "p99": float(np.quantile(self.microseconds, 0.99)),
            },
            "remote_fraction": {"mean": float(np.mean(self.remote)) if told_apart else None},
        }


def compare_known_counts(
    steps: Iterable[npt.NDArray[Any]],
    options: SpillOptions,
    policies: Sequence[str] = KNOWN_COUNTS_POLICIES,
    *,
    every: int = 1,
    on_plan: Callable[[], None] = lambda: None,
) -> KnownCountsComparison:
    """Plan every layer of every `every`-th step with each policy and summarise what came out.

    `static` leaves all tokens at home; `llep` has the paper's parameters (alpha 1, m 1024, lambda 1.3) and no limit of
    spare slots, as published; `quota` obeys all options. Imbalance is largest load over mean load, per layer. A
    token is remote if it is computed on a different device from its source; null where the trace does not tell sources
    apart.

    Args:
        steps: int[layers, sources, experts] tokens of each step, at least one; only one is held at a time.
        options: Homes, spare slots and limits.
        policies: Some of `KNOWN_COUNTS_POLICIES`.
        every: Distance between the steps that are planned.
        on_plan: Called after every plan, for progress.

    Returns:
        ``{"policies": [{"policy", "imbalance": {"mean", "p95", "max"}, "replicas": {"mean", "max"},
        "us_per_call": {"p50", "p99"}, "remote_fraction": {"mean"}}]}``, ready for JSON. The time is that of one layer,
        with replicas, quotas and the quotas of every source; compiling is left out.

    Raises:
        ProblemError: a policy is unknown, `every` is below 1, or the counts do not suit the options.
    """
    if every < 1:
        raise ProblemError("every", every, "must be at least 1")
    for name in policies:
        if name not in KNOWN_COUNTS_POLICIES:
            raise ProblemError("policies", name, f"must be one of {', '.join(KNOWN_COUNTS_POLICIES)}")
    judged = [_Judged(name, options) for name in policies]
    sources = 0
    for step in islice(steps, 0, None, every):
        if step.ndim != 3 or step.size == 0 or step.dtype.kind not in "iu":
            found = f"array of {step.dtype}, shape {step.shape}"
            raise ProblemError("step", found, "must hold integers [layers, sources, experts] and not be empty")
        if step.shape[2] != options.experts:
            raise ProblemError("spill.home", f"{options.experts} experts", f"the trace has {step.shape[2]}")
        sources = step.shape[1]
        counts = step.astype(np.int32 if step.max() < 2**31 else np.int64)
        for one in judged:
            for layer in counts:
                one.judge(layer)
                on_plan()
    if not sources:
        raise ProblemError("steps", "none", "must be at least one")
    told_apart = sources > 1 or options.devices == 1
    return {"policies": [one.row(told_apart=told_apart) for one in judged]}


def _planner(name: str, options: SpillOptions, sources: int, dtype: np.dtype[Any]) -> _Planner:
    match name:
        case "static":
            return QuotaPlanner(replace(options, spare=np.zeros_like(options.spare)), sources, dtype=dtype)
        case "llep":
            return LlepPlanner(options, sources)
        case _:
            return QuotaPlanner(options, sources, dtype=dtype)
