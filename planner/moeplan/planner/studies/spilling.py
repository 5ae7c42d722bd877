"""Judging policies under known counts: each plans every layer and step from the counts that it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter_ns
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from moeplan.solvers import LlepPlanner, ProblemError, QuotaPlanner, SpillOptions, SpillPlan

__all__ = ["KNOWN_COUNTS_POLICIES", "KnownCountsComparison", "compare_known_counts"]

KNOWN_COUNTS_POLICIES = ("static", "llep", "quota")
"""Names that `compare_known_counts` knows."""


class KnownCountsRow(TypedDict):
    """What was measured of one policy; see `compare_known_counts`."""

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


def compare_known_counts(
    counts: npt.NDArray[Any],
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
        counts: int[steps, layers, sources, experts], tokens.
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
    if counts.ndim != 4 or counts.size == 0 or counts.dtype.kind not in "iu":
        raise ProblemError(
            "counts",
            f"array of {counts.dtype}, shape {counts.shape}",
            "must hold integers [steps, layers, sources, experts] and not be empty",
        )
    if counts.shape[3] != options.experts:
        raise ProblemError("spill.home", f"{options.experts} experts", f"the trace has {counts.shape[3]}")
    if every < 1:
        raise ProblemError("every", every, "must be at least 1")
    dtype = np.dtype(np.int32 if counts.max() < 2**31 else np.int64)
    chosen = counts[::every]
    return {"policies": [_judge(name, chosen, dtype, options, on_plan) for name in policies]}


def _planner(name: str, options: SpillOptions, sources: int, dtype: np.dtype[Any]) -> _Planner:
    if name == "static":
        return QuotaPlanner(replace(options, spare=np.zeros_like(options.spare)), sources, dtype=dtype)
    if name == "llep":
        return LlepPlanner(options, sources)
    if name == "quota":
        return QuotaPlanner(options, sources, dtype=dtype)
    raise ProblemError("policies", name, f"must be one of {', '.join(KNOWN_COUNTS_POLICIES)}")


def _judge(
    name: str, counts: npt.NDArray[Any], dtype: np.dtype[Any], options: SpillOptions, on_plan: Callable[[], None]
) -> KnownCountsRow:
    sources = counts.shape[2]
    planner = _planner(name, options, sources, dtype)
    source_device = options.source_device(sources)
    planner.plan(counts[0, 0].astype(dtype))
    imbalance, replicas, microseconds, remote = [], [], [], []
    for step in counts:
        for layer in step.astype(dtype):
            begin = perf_counter_ns()
            plan = planner.plan(layer)
            microseconds.append((perf_counter_ns() - begin) / 1e3)
            imbalance.append(plan.imbalance)
            replicas.append(plan.replicas)
            remote.append(plan.remote_tokens(source_device, options.home) / max(int(layer.sum()), 1))
            on_plan()
    told_apart = sources > 1 or options.devices == 1
    return {
        "policy": name,
        "imbalance": {
            "mean": float(np.mean(imbalance)),
            "p95": float(np.quantile(imbalance, 0.95)),
            "max": float(np.max(imbalance)),
        },
        "replicas": {"mean": float(np.mean(replicas)), "max": int(np.max(replicas))},
        "us_per_call": {
            "p50": float(np.quantile(microseconds, 0.5)),
            "p99": float(np.quantile(microseconds, 0.99)),
        },
        "remote_fraction": {"mean": float(np.mean(remote)) if told_apart else None},
    }
