"""Plans of sharded experts: a planning thread divides the tokens of a pass among the replicas of its layout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.device.desk import (
    FULL,
    UNKNOWN,
    Desk,
    layout_key,
    next_request,
    note,
    reply,
    take_counts,
    use_exact_sleep,
)
from moeplan.runtime_client.device.routes import (
    BORROWED,
    FAULT,
    FULLEST,
    LENT,
    MOST,
    AnswerShape,
    Numbering,
    Places,
    rounded_up,
)
from moeplan.solvers.problem.arrays import Bool, Float64, Int32, Int64
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.problem.layout import EMPTY, Layout
from moeplan.solvers.problem.layout_kernels import hosts
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.flow import split_all
from moeplan.solvers.split.rules import divide_evenly
from moeplan.solvers.split.sources import Sources, sort_sources, source_tokens

__all__ = ["LayoutPlans"]

_ROWS = 1024
"""Layouts that passes under way may have."""


class _Tables(NamedTuple):
    """Layouts by their key, 0 in rows without one.

    Attributes:
        key: int64[rows].
        slots: int32[rows, devices, width], filled slots first.
        speed: float64[rows, devices].
        even: bool[rows], whether every replica of an expert gets as many tokens.
    """

    key: Int64
    slots: Int32
    speed: Float64
    even: Bool


class LayoutPlans:
    """What a planning thread divides tokens by: the layouts of passes.

    A pass tells the key of its layout, so that layouts may change while passes are under way.

    Args:
        experts: Number of experts.
        devices: Number of ranks.
        slots: Most slots of a rank in any layout.
        numbering: Rows of this rank.
        device: Where keys go.

    Attributes:
        shape: Places in the answers.
    """

    def __init__(self, experts: int, devices: int, slots: int, numbering: Numbering, device: torch.device) -> None:
        self.experts, self.devices, self.slots = experts, devices, slots
        self.numbering, self.device = numbering, device
        self.shape = AnswerShape(experts, devices * slots - experts, slots, 0)
        self._tables = _Tables(
            np.zeros(_ROWS, np.int64),
            np.full((_ROWS, devices, slots), EMPTY, np.int32),
            np.ones((_ROWS, devices)),
            np.zeros(_ROWS, np.bool_),
        )
        self._keys: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> LayoutPlans:
        """Itself: copies of layers share an exchange, and so its thread."""
        return self

    def require(self, layout: Layout) -> None:
        """Raise unless tokens can be divided by a layout.

        Raises:
            ValueError: a rank has more slots than there is room for, or none.
        """
        filled = (layout.slots != EMPTY).sum(axis=1)
        if filled.max() > self.slots:
            raise ValueError(
                f"layout has up to {filled.max()} slots on a rank: the exchange was made for {self.slots}; write "
                f"SlotsOfLayouts({self.experts}, {filled.max()})"
            )
        if not filled.all():
            raise ValueError(
                f"layout has no expert on rank {filled.argmin()}: passes without the host need one on every rank"
            )

    def key(self, layout: Layout, speed: Float64, rule: SplitRule, key: int) -> Tensor:
        """`Turn.layout` of a pass whose tokens are to be divided so.

        Args:
            layout: The layout.
            speed: float64[devices].
            rule: `OPTIMAL` or `EVEN`.
            key: Not 0, and different for what differs in any of these.
        """
        told = self._keys.get(key)
        if told is not None:
            return told
        if len(self._keys) == _ROWS:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # no pass is under way then
            self._tables.key[:] = 0
            self._keys.clear()
        row = len(self._keys)
        order = np.argsort(layout.slots == EMPTY, axis=1, kind="stable")
        table = np.take_along_axis(layout.slots, order, axis=1)[:, : self.slots]
        self._tables.slots[row] = EMPTY
        self._tables.slots[row, :, : table.shape[1]] = table
        self._tables.speed[row] = speed
        self._tables.even[row] = rule == SplitRule.EVEN
        self._tables.key[row] = key
        told = self._keys[key] = torch.tensor([0, 0, 0, key], device=self.device)
        return told

    def serve(self, desk: Desk) -> None:
        """Answer the requests of a desk until there will be none."""
        sources = sort_sources(np.arange(self.devices), np.zeros(self.devices, np.int32))
        counts = np.zeros((self.devices, self.experts), np.int32)
        _serve(desk, self._tables, sources, counts, self.shape.places(), self.numbering)


@kernel
def _serve(desk: Desk, tables: _Tables, sources: Sources, counts: Int32, places: Places, numbering: Numbering) -> None:
    answered = 0
    use_exact_sleep()
    while True:
        request = next_request(desk, answered)
        if request == answered:
            return
        answered = request
        planned = take_counts(desk, counts)
        row = 0
        if planned:
            key = layout_key(desk.table[numbering.rank, counts.shape[1] + 3 :])
            while row < len(tables.key) and tables.key[row] != key:
                row += 1
            if key == 0 or row == len(tables.key):
                note(desk, UNKNOWN, numbering.rank, 0, 0)
                planned = False
        if planned:
            start, device, slot = hosts(tables.slots[row], counts.shape[1])
            replicas = start, device, slot
            sent = _divide(tables.slots[row], replicas, tables.speed[row], tables.even[row], sources, counts)
            full = _write_answer(desk.answer, places, numbering, replicas, sent)
            if full >= 0:
                note(desk, FULL, full, desk.answer[FULLEST], numbering.rows)
                planned = False
        reply(desk, request, planned)


@kernel
def _divide(
    slots: Int32, replicas: tuple[Int32, Int32, Int32], speed: Float64, even: bool, sources: Sources, counts: Int32
) -> Int64:
    """int64[replicas, ranks]: tokens of counts int32[ranks, experts] that each replica gets, as `Division` has it."""
    start, device, slot = replicas
    devices, width = slots.shape
    tokens = counts.astype(np.int64).reshape(1, *counts.shape)
    loads = tokens[0].sum(axis=0).reshape(1, -1)
    quota = np.zeros((1, devices * width), np.int64)
    if even:
        divide_evenly(loads, start, device, slot, quota.reshape(1, devices, width))
    else:
        split_all(slots, loads, speed, quota, np.empty((1, devices), np.int64), np.empty((1, devices), np.bool_))
    each = np.empty((1, len(device)), np.int64)
    for r in range(len(device)):
        each[0, r] = quota[0, device[r] * width + slot[r]]
    return source_tokens(sources, tokens, each, start, device)[0]


@kernel
def _write_answer(
    answer: Int32, places: Places, numbering: Numbering, replicas: tuple[Int32, Int32, Int32], sent: Int64
) -> int:
    """Fill `answer` for one rank; which rank has most rows to compute, if they are too many, else -1.

    A rank's rows are ordered by slot and then by source; those of a slot begin at a multiple of a tile.

    Args:
        answer: int32[words], out; see `AnswerShape`, where all slots of this rank are at home.
        places: Its `places`.
        numbering: Whose answer, and its rows.
        replicas: `Hosts` of the layout, whose slots are filled from the first on.
        sent: int64[replicas, ranks], tokens that each gets from each.
    """
    rank, rows, _, tile = numbering
    start, device, slot = replicas
    at_first, at_begin, at_target = places.first, places.begin, places.target
    at_ends, at_end, at_fills = places.home_ends, places.lent_ends, places.fills
    ranks = sent.shape[1]
    filled = np.zeros(ranks, np.int64)
    for r in range(len(device)):
        filled[device[r]] += 1
    at = np.empty((ranks, filled.max()), np.int64)
    for r in range(len(device)):
        at[device[r], slot[r]] = r

    goal = np.empty(len(device), np.int64)
    fullest, where = 0, 0
    for d in range(ranks):
        end = 0
        for c in range(filled[d]):
            r = at[d, c]
            goal[r] = d * rows + end + sent[r, :rank].sum()
            tokens = sent[r].sum()
            if d == rank:
                answer[at_fills + c] = end + tokens
            end += rounded_up(tokens, tile)
            if d == rank:
                answer[at_ends + c] = end
        if d == rank:
            answer[at_ends + filled[d] : at_end] = end
            answer[at_fills + filled[d] : at_fills + at_end - at_ends] = end
        if end > fullest:
            fullest, where = end, d
    most = 1
    for e in range(len(start) - 1):
        answer[at_first + e] = start[e]
        most = max(most, start[e + 1] - start[e])
        begun = 0
        for r in range(start[e], start[e + 1]):
            answer[at_begin + r] = begun
            answer[at_target + r] = goal[r]
            begun += sent[r, rank]
    answer[at_first + len(start) - 1] = start[-1]
    answer[places.shared] = 0
    answer[FAULT], answer[MOST], answer[LENT], answer[BORROWED], answer[FULLEST] = 0, most, 0, 0, fullest
    return where if fullest > rows else -1
