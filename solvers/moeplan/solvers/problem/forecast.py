"""From the window of past steps to the demand that a layout should suit. Whoever plans comes here.

Planning for the few observed steps overfits them. So by default each scenario is a recent step, newer ones more often,
perturbed as steps are. Sources route different tokens in every step, so where there are several, a step is one draw of
many: its sources are drawn anew (two-stage balanced bootstrap: Davison, Hinkley and Schechtman, Efficient bootstrap
simulation, Biometrika 73, 1986). Where there are not, the changes seen between steps perturb it: each expert by itself,
and all jointly so that correlated experts stay correlated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.solvers.problem.arrays import MAX_TOKENS, Float64, Int64
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.forecast_spec import Forecast, ForecastMethod

__all__ = ["Widening", "drifted", "forecast", "widened"]

OUTLIER = 2.5
"""Changes count up to this many of an expert's usual ones: a shift of domain says nothing about the usual spread."""

NORMAL_MEDIAN = 0.6745
"""Median of the absolute value of a standard normal variable."""

FEW_SOURCES = 8
"""Sources below which their differences say too little of how a step may turn out."""

AS_DRAWN = float(np.sqrt(2))
"""Factor of what sources drawn anew change: a layout in balance for scenarios that lie further out is in balance for
all between them, and few scenarios leave many directions out."""


DRIFTS = 4
"""Scenarios that drift from a single known one."""

WORTH = 100.0
"""Weight of the known scenario beside each of those: a plan may lose next to nothing on it."""


def forecast(window: Int64, how: Forecast = Forecast()) -> Demand:
    """The demand of one layer in the coming steps.

    Args:
        window: int64[steps, sources, experts], oldest step first, at least one; only the newest
            `how.window_steps` count.
        how: How to forecast.

    Raises:
        ProblemError: `window` is not an array of token counts.
    """
    steps = Demand.of(window[-how.window_steps :])
    match how.method:
        case ForecastMethod.LAST:
            return Demand.of(steps.tokens[-1])
        case ForecastMethod.MEAN:
            return Demand.of(np.rint(steps.tokens.mean(axis=0)).astype(np.int64))
        case ForecastMethod.EMA:
            average = steps.tokens[0].astype(np.float64)
            for step in steps.tokens[1:]:
                average += how.smoothing * (step - average)
            return Demand.of(np.rint(average).astype(np.int64))
        case ForecastMethod.STEPS:
            return steps
        case ForecastMethod.SCENARIOS:
            return widened(steps.tokens)


@dataclass(frozen=True, slots=True)
class Widening:
    """Scenarios drawn from a window; see `docs/uncertainty.md` for what was tried.

    Attributes:
        scenarios: How many, even.
        newest: Weight of the newest step; each older one has this part of what the newer ones leave.
        spread: How much wider than what was seen; 0 keeps the steps as they were.
        together: Part of the variance that experts share, along the changes seen; the rest is each expert's own. It
            counts where there are fewer than `FEW_SOURCES` sources.
        seed: Seed of the draws.
    """

    scenarios: int = 48
    newest: float = 0.5
    spread: float = 1.0
    together: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.scenarios <= 4096 or self.scenarios % 2:
            raise ProblemError("widening.scenarios", self.scenarios, "must be even, 2 to 4096")
        if not 0 < self.newest <= 1:
            raise ProblemError("widening.newest", self.newest, "must be above 0 and at most 1")
        if not 0 <= self.spread < float("inf"):
            raise ProblemError("widening.spread", self.spread, "must be finite and at least 0")
        if not 0 <= self.together <= 1:
            raise ProblemError("widening.together", self.together, "must be 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ProblemError("widening.seed", self.seed, "must be 0 to 2**32 - 1")


def widened(window: Int64, widening: Widening = Widening()) -> Demand:
    """Scenarios for the steps that follow a window.

    Their average is that of the steps by age: exactly but for rounding where sources are drawn, nearly otherwise, where
    each scenario comes with its mirror image (the opposite changes).

    Args:
        window: int64[steps, sources, experts], oldest step first, at least one.
        widening: How to draw.

    Returns:
        A demand of `widening.scenarios` equally likely scenarios, or of the one step where there is only one. An
        expert's tokens change by one factor at all sources, rounded to whole tokens, halves to even. The same window
        and widening give the same demand.

    Raises:
        ProblemError: `window` is not an array of token counts.
    """
    steps = Demand.of(window)
    if steps.scenarios == 1:
        return steps
    start = _by_age(steps.scenarios, widening)
    base = steps.tokens[start]
    if not widening.spread:
        return Demand.of(base)
    by_sources = steps.sources >= FEW_SOURCES
    factor = _redrawn(steps.tokens, start, widening) if by_sources else _changed(steps.loads(), widening)
    return Demand.of(np.rint(base * factor[:, np.newaxis]).astype(np.int64))


def _redrawn(steps: Int64, start: Int64, widening: Widening) -> Float64:
    """float64[scenarios, experts]: factors of the loads of the steps int64[scenarios], their sources drawn anew.

    What a source always does, `steps` int64[steps, sources, experts] on average, is not drawn: it will do so again.
    """
    random = np.random.Generator(np.random.PCG64(widening.seed))
    count, sources, _ = steps.shape
    usual = steps.sum(axis=0, dtype=np.float64)
    factor = np.ones((len(start), steps.shape[2]))
    for step in np.unique(start):
        of_step = np.flatnonzero(start == step)
        # Balanced: over the scenarios of a step each of its sources is drawn equally often.
        drawn = random.permutation(np.tile(np.arange(sources), len(of_step))).reshape(len(of_step), sources)
        times = np.stack([np.bincount(row, minlength=sources) for row in drawn])
        # An average over the window holds the step itself, so that deviations from it are smaller than they were.
        wider = widening.spread * AS_DRAWN * np.sqrt(count / (count - 1))
        # Whole numbers, whose sums are the same in any order, and so on any machine.
        change = (times - 1.0) @ (steps[step] * float(count) - usual)
        redrawn = np.maximum(steps[step].sum(axis=0) + wider / count * change, 0)
        total = redrawn.sum(axis=0)  # above that of the step where draws below none were left out
        np.divide(redrawn * len(of_step), total, out=redrawn, where=total > 0)
        factor[of_step] = redrawn
    return factor


def _changed(loads: Int64, widening: Widening) -> Float64:
    """float64[scenarios, experts]: factors as int64[steps, experts] changed from step to step."""
    random = np.random.Generator(np.random.PCG64(widening.seed))
    change = np.diff(np.log(np.maximum(loads, 1)), axis=0)
    usual = np.median(np.abs(change), axis=0) / NORMAL_MEDIAN
    usual = np.maximum(usual, np.median(usual) / 2)
    seen = np.clip(change, -OUTLIER * usual, OUTLIER * usual) / np.sqrt(len(change))
    # A change is the difference of two steps, so each expert's own part has half of its variance.
    own = _mirrored(random, widening.scenarios, len(usual)) * usual / np.sqrt(2)
    shared = _mirrored(random, widening.scenarios, len(seen)) @ seen / np.sqrt(2)
    return np.exp(widening.spread * (np.sqrt(1 - widening.together) * own + np.sqrt(widening.together) * shared))


def drifted(demand: Demand) -> Demand:
    """A single scenario and four that drift from it by its spread, each expert by itself.

    Args:
        demand: A demand of one scenario.

    Returns:
        A demand of five scenarios, the known one first, which counts `WORTH` times as much as each of the others. They
        are two and their mirror images, the same for the same demand.
    """
    random = np.random.Generator(np.random.PCG64(0))
    loads = demand.loads()[0]
    change = _mirrored(random, DRIFTS, len(loads)) * np.sqrt(demand.spread**2 + 1 / np.maximum(loads, 1))
    drift = demand.tokens * np.exp(change)[:, np.newaxis]
    drift *= np.minimum(1, MAX_TOKENS / 2 / np.maximum(drift.sum(axis=(1, 2), keepdims=True), 1))
    tokens = np.concatenate([demand.tokens, np.rint(drift).astype(np.int64)])
    return Demand.of(tokens, [WORTH] + [1.0] * DRIFTS)


def _by_age(steps: int, widening: Widening) -> Int64:
    """int64[scenarios]: the step that each scenario starts from, as many of each as its weight says."""
    weight = (1 - widening.newest) ** np.arange(steps - 1, -1, -1.0)
    reached = np.cumsum(weight / weight.sum())
    middle = (np.arange(widening.scenarios) + 0.5) / widening.scenarios
    return np.minimum(np.searchsorted(reached, middle), steps - 1).astype(np.int64)


def _mirrored(random: np.random.Generator, rows: int, columns: int) -> Float64:
    """float64[rows, columns]: standard normal, each row with its opposite, in any order."""
    half = random.standard_normal((rows // 2, columns))
    return random.permutation(np.concatenate([half, -half]))
