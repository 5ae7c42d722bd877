"""Homes that follow a trace: re-planned from the steps before, judged by what spilling leaves in the step after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Demand, Forecast, HomePlan, SpillOptions, forecast, plan_homes, spilled_imbalance
from moeplan.solvers.problem.arrays import Float64, Int32, Int64

__all__ = ["HomesStudy", "Variant", "follow_homes"]

BLOCK = 10
"""Steps whose mean is one sample of a standard error: neighbours, planned from nearly the same steps, are alike."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to have homes.

    Attributes:
        name: What reports call it.
        max_moves: Most experts that one re-plan of a layer may move; None for no limit.
        price: See `plan_homes`.
        foresight: Whether it plans from the very step that it is judged on.
    """

    name: str
    max_moves: int | None
    price: float = 0.0
    foresight: bool = False


class HomesRow(TypedDict):
    """Outcome of one variant: imbalance after spilling inside domains, and experts moved per re-plan of a layer."""

    variant: str
    imbalance: float
    standard_error: float | None
    domains_alone: float
    moved: float
    moved_most: float


class HomesStudy(TypedDict):
    """The answer of `follow_homes`: `one_domain` is the imbalance if spilling could reach every device."""

    samples: int
    one_domain: float
    variants: list[HomesRow]


def follow_homes(
    trace: Trace,
    options: SpillOptions,
    variants: Sequence[Variant],
    how: Forecast,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> HomesStudy:
    """Re-plan the homes of every layer before every step that has `how.window_steps` before it, and judge them on it.

    Args:
        trace: Recorded steps.
        options: Homes of the start, spare slots, domains and limits.
        variants: What to try; each follows the trace with homes of its own.
        how: How demand is forecast from the steps before.
        on_step: Called after every step of the trace, for progress.

    Returns:
        Means over layers and steps: `imbalance` is max load / mean load after spilling; `domains_alone` is that of the
        domains, each as one device, so the rest is what spilling leaves within them; `moved` and `moved_most` are the
        mean and the largest share of experts that changed their home. The standard error takes the mean of ten
        consecutive steps of a layer as one sample; None where there is only one.

    Raises:
        ProblemError: the trace does not suit the options.
        TraceError: the trace is shorter than a window and one step.
    """
    together = replace(options, domain=np.zeros_like(options.domain))
    homes = {variant.name: [options.home] * trace.layers for variant in variants}
    found: dict[str, list[tuple[float, float, float]]] = {variant.name: [] for variant in variants}
    one_domain = []
    for window in trace.windows(how.window_steps, 1):
        for layer in range(trace.layers):
            step = Demand.of(window.next[layer])
            coming = forecast(window.history[:, layer], how)
            one_domain.append(spilled_imbalance(step, together)[0])
            for variant in variants:
                held = replace(options, home=homes[variant.name][layer])
                plan = _plan(step if variant.foresight else coming, held, variant)
                homes[variant.name][layer] = plan.home
                imbalance, _ = spilled_imbalance(step, replace(options, home=plan.home))
                alone = _domains_alone(step.loads()[0], options, plan.home)
                found[variant.name].append((imbalance, alone, len(plan.moved) / trace.experts))
        on_step()
    rows = [_row(variant.name, np.array(found[variant.name]), trace.layers) for variant in variants]
    return {"samples": len(one_domain), "one_domain": float(np.mean(one_domain)), "variants": rows}


def _plan(demand: Demand, options: SpillOptions, variant: Variant) -> HomePlan:
    return plan_homes(demand, options, max_moves=variant.max_moves, price=variant.price)


def _domains_alone(loads: Int64, options: SpillOptions, home: Int32) -> float:
    """Load per speed of the busiest domain over the mean, as if spilling left nothing within domains."""
    domain = np.bincount(options.domain[home], loads, minlength=int(options.domain.max()) + 1)
    speed = np.bincount(options.domain, options.speed)
    most = np.divide(domain, speed, out=np.zeros_like(speed), where=speed > 0).max()
    return float(most * options.speed.sum() / max(int(loads.sum()), 1))


def _row(name: str, figures: Float64, layers: int) -> HomesRow:
    imbalance, alone, moved = figures.T
    by_layer = imbalance.reshape(-1, layers)
    whole = by_layer[: max(1, len(by_layer) // BLOCK) * BLOCK]
    blocks = whole.reshape(-1, min(BLOCK, len(whole)), layers).mean(axis=1).reshape(-1)
    return {
        "variant": name,
        "imbalance": float(imbalance.mean()),
        "standard_error": float(blocks.std(ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else None,
        "domains_alone": float(alone.mean()),
        "moved": float(moved.mean()),
        "moved_most": float(moved.max()),
    }
