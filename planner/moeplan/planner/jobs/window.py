"""Statistics of the last steps: collected as they come, closed by a rule, kept as a window."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moeplan.api.jobs import JobSpec, StatisticsCount
from moeplan.solvers.problem.arrays import Bool, Int64

__all__ = ["Cells", "Report", "Window"]

FAR_STEPS = 4_096
"""A report further than this from the window is no straggler and no rank that runs ahead: its step is not to be
believed before others say the same."""
FAR_REPORTS = 4
"""Reports of each rank of a quorum, more than those near the window, that move the window to where they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The n layers and m ranks that a report is of.

    Ids that follow each other are kept as a slice: to read or write an array by one costs a fraction.

    Attributes:
        layers: As an index, a slice or int64[n].
        ranks: Likewise, of m.
        where: Both, as an index of an array [layers, ranks].
        shape: n and m.
    """

    layers: slice | Int64
    ranks: slice | Int64
    where: tuple[slice | Int64, slice | Int64]
    shape: tuple[int, int]

    @classmethod
    def of(cls, layers: Int64, ranks: Int64) -> Cells:
        """Cells of the layers int64[n] and the ranks int64[m], distinct, at least one of each."""
        rows, columns = _index(layers), _index(ranks)
        apart = not (isinstance(rows, slice) or isinstance(columns, slice))
        where = (layers[:, np.newaxis], ranks) if apart else (rows, columns)
        return cls(rows, columns, where, (len(layers), len(ranks)))


def _index(ids: Int64) -> slice | Int64:
    first, end = int(ids[0]), int(ids[0]) + len(ids)
    return slice(first, end) if np.array_equal(ids, np.arange(first, end)) else ids


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Token counts of some layers of one step, from some ranks.

    Attributes:
        step: Training step.
        cells: The layers and ranks.
        tokens: int64[n, m, experts], at least 0; not written to afterwards, as a window may keep this very array.
    """

    step: int
    cells: Cells
    tokens: Int64


@dataclass(slots=True)
class _OpenStep:
    tokens: Int64
    """int64[layers, sources, experts]"""
    seen: Bool
    """bool[layers, ranks]"""
    since_s: float
    missing: int


@dataclass(slots=True)
class Window:
    """The statistics of one job.

    A step closes when every rank has reported every layer. Once a quorum of the ranks has reached it, it also closes
    incomplete: when the quorum is more than ``max_lag_steps`` ahead, or ``timeout_s`` after its first report. Steps
    close in order, so an open step holds back those after it.

    The frontier is the newest step that a quorum has reached. One rank with a wrong step number can neither move it nor
    close what lies beyond it, and its steps are the first to go when there are too many open ones.

    One report far from the window counts for nothing; when a quorum reports far from it again and again, and more than
    others report near it, then it was the window that was wrong, and it begins again where they are.

    The result is independent of the order of reports as long as each comes before its step is closed: a cell is written
    once, and sums are of integers.
    """

    spec: JobSpec
    count: StatisticsCount = field(default_factory=StatisticsCount)
    closed_step: int | None = None
    closed_steps: int = 0
    _open: dict[int, _OpenStep] = field(default_factory=dict)
    _steps: list[deque[tuple[int, Int64]]] = field(default_factory=list)
    _newest: Int64 = field(init=False)
    _last: Int64 | None = None
    _quorum: int = field(init=False)
    _frontier: int = -1
    _ahead: int = 0
    """Ranks whose newest step is beyond the frontier: fewer than a quorum."""
    _far: int = 0

    def __post_init__(self) -> None:
        self._quorum = max(1, math.ceil(self.spec.closing.quorum * self.spec.ranks))
        self._steps = [deque(maxlen=self.spec.forecast.window_steps) for _ in range(self.spec.layers)]
        self._newest = np.full(self.spec.ranks, -1, np.int64)

    def add(self, report: Report, now_s: float) -> None:
        """Take in a report; what is late, early or a duplicate is counted and dropped.

        Args:
            report: Counts whose layers, ranks and shape are those of the job.
            now_s: Time on a clock that never goes back.
        """
        cells = math.prod(report.cells.shape)
        if not self._near(report):
            if report.step < self._frontier:
                self.count.late += cells
            else:
                self.count.early += cells
            return
        if self.closed_step is not None and report.step <= self.closed_step:
            self.count.late += cells
            return
        self._advance(report)
        step = self._open.get(report.step)
        if step is None:
            if len(self._open) >= self.spec.max_open_steps and not self._evict(report.step):
                self.count.early += cells
                return
            if self._is_whole(report):
                self._open[report.step] = _OpenStep(report.tokens, np.ones(report.cells.shape, np.bool_), now_s, 0)
                self.count.accepted += cells
                return
            spec = self.spec
            step = self._open[report.step] = _OpenStep(
                tokens=np.zeros((spec.layers, spec.sources, spec.experts), np.int64),
                seen=np.zeros((spec.layers, spec.ranks), np.bool_),
                since_s=now_s,
                missing=spec.layers * spec.ranks,
            )
        where = report.cells.where
        seen = step.seen[where]
        fresh = cells - int(np.count_nonzero(seen))
        if fresh:
            tokens = report.tokens if fresh == cells else np.where(seen[:, :, np.newaxis], 0, report.tokens)
            if self.spec.merge_sources:
                merged = tokens[:, 0] if tokens.shape[1] == 1 else tokens.sum(axis=1)
                step.tokens[report.cells.layers, 0] += merged
            elif fresh == cells:
                step.tokens[where] = tokens
            else:
                step.tokens[where] += tokens
            step.seen[where] = True
            step.missing -= fresh
        self.count.accepted += fresh
        self.count.duplicate += cells - fresh

    def close(self, now_s: float) -> bool:
        """Close every step that the rule allows; whether there was one."""
        closed = False
        while self._open:
            number = min(self._open)
            step = self._open[number]
            if step.missing:
                ahead = self._frontier - number
                timed_out = now_s - step.since_s >= self.spec.closing.timeout_s
                if ahead < 0 or (ahead <= self.spec.closing.max_lag_steps and not timed_out):
                    break
            del self._open[number]
            self._keep(number, step)
            closed = True
        return closed

    def next_timeout_s(self) -> float | None:
        """When `close` should be called although nothing came, on the clock of `add`; None if time closes no step."""
        oldest = min(self._open, default=None)
        if oldest is None or oldest > self._frontier:
            return None
        return self._open[oldest].since_s + self.spec.closing.timeout_s

    def late_ranks(self) -> list[int]:
        """Ranks whose newest statistics are of a step before the newest closed one, or that never sent any."""
        closed = -1 if self.closed_step is None else self.closed_step
        found: list[int] = np.flatnonzero(self._newest < closed).tolist()
        return found

    def layer(self, layer: int) -> tuple[Int64, ...]:
        """int64[sources, experts] of each step in the window of a layer, oldest first; never written to again."""
        return tuple(tokens for _, tokens in self._steps[layer])

    def demand_after(self, step: int | None) -> list[tuple[int, Int64]]:
        """Closed steps after `step` that all layers' windows hold: number and int64[layers, experts], in order."""
        if step == self.closed_step:
            return []
        held = [dict(steps) for steps in self._steps]
        numbers = sorted(set[int]().union(*held[:1]).intersection(*held[1:]))
        return [
            (number, np.stack([steps[number].sum(axis=0) for steps in held]))
            for number in numbers
            if step is None or number > step
        ]

    def _is_whole(self, report: Report) -> bool:
        """True if a report is all of a step, as the window keeps it."""
        spec, cells = self.spec, report.cells
        ordered = isinstance(cells.layers, slice) and isinstance(cells.ranks, slice)
        return not spec.merge_sources and ordered and cells.shape == (spec.layers, spec.ranks)

    def _near(self, report: Report) -> bool:
        """True if a report is near the window, which moves first if enough others were as far."""
        if self._frontier < 0:
            return True
        if abs(report.step - self._frontier) <= FAR_STEPS:
            self._far = max(0, self._far - report.cells.shape[1])
            return True
        self._far += report.cells.shape[1]
        if self._far < FAR_REPORTS * self._quorum:
            return False
        while self._open:
            self._drop(max(self._open))
        self._newest[:] = -1
        self._frontier, self._ahead, self._far, self.closed_step = -1, 0, 0, None
        return True

    def _evict(self, step: int) -> bool:
        """Make room for an older step by dropping the newest open one; whether there was one to drop."""
        newest = max(self._open)
        if newest <= max(step, self._frontier):
            return False
        self._drop(newest)
        return True

    def _drop(self, step: int) -> None:
        dropped = int(np.count_nonzero(self._open.pop(step).seen))
        self.count.accepted -= dropped
        self.count.early += dropped

    def _advance(self, report: Report) -> None:
        ranks, ahead = report.cells.ranks, report.step > self._frontier
        newest = self._newest[ranks]
        if ahead:
            self._ahead += int(np.count_nonzero(newest <= self._frontier))
        self._newest[ranks] = np.maximum(newest, report.step)
        if not ahead:
            return
        # All ranks are looked at once a quorum is ahead, not for the report of each.
        if self._ahead >= self._quorum:
            position = self.spec.ranks - self._quorum
            self._frontier = int(np.partition(self._newest, position)[position])
            self._ahead = int(np.count_nonzero(self._newest > self._frontier))

    def _keep(self, number: int, step: _OpenStep) -> None:
        self.count.missing += step.missing
        self.closed_step = number
        self.closed_steps += 1
        if step.missing:
            self._complete(step)
        if not self.spec.merge_sources:
            # Rows for ranks that miss the next step. An own array is needed only once a step was incomplete before.
            self._last = step.tokens
        reported = step.seen.sum(axis=1)
        for layer in np.flatnonzero(reported >= self._quorum):
            self._steps[layer].append((number, step.tokens[layer]))

    def _complete(self, step: _OpenStep) -> None:
        """Fill in the ranks that are missing: with their last rows, or merged, with the mean of the others."""
        if self.spec.merge_sources:
            reported = np.maximum(step.seen.sum(axis=1), 1)
            step.tokens = np.rint(step.tokens * (self.spec.ranks / reported)[:, np.newaxis, np.newaxis]).astype(
                np.int64
            )
        elif self._last is not None:
            np.copyto(step.tokens, self._last, where=~step.seen[:, :, np.newaxis])
