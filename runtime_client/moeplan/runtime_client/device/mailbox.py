"""A thread that plans: kernels leave the counts of a pass in host memory, it leaves the plan, and nobody else waits."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.device.desk import (
    ABORTED,
    DIFFER,
    EXCESS,
    FULL,
    LAYER,
    NOTED,
    ROUTER,
    SHORT,
    STOP,
    TOLD,
    UNKNOWN,
    WORDS,
    Desk,
)
from moeplan.runtime_client.device.routes import AnswerShape, Numbering
from moeplan.runtime_client.errors import MissedPassError, PassError, RouterError
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.errors import InfeasibleError

__all__ = ["Mailbox", "Planning", "Turn"]

_SPINS = 20_000_000
"""Looks at the request, a second of them or so, before the thread sleeps between two looks: longer than a step."""

_SLEEP_US = 20

_UNHURRIED_US = 1000
"""Without a GPU there may be no core to spare, and kernels are slow: the thread sleeps so long between all looks."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Which pass this is, and what the rank tells the others beside its counts.

    Attributes:
        layer: Number of the layer in the group.
        number: Number of its pass.
        compare: Called with what all ranks told, int64[size, 5]: ``layer << 32 | number``, `layout` with `gathered`,
            and `checks`, or zeros; raises if they do not go together.
        title: What errors call the layer.
        checks: int64 each, on the device: sum of this rank's experts, whether they are not what was loaded, and the sum
            of weights that all ranks share; empty in most passes.
        layout: int64[4], on the device, where tokens are divided by layouts: three zeros in place of checks, and the
            layout's key. See `LayoutPlans.key`.
        gathered: A number that differs after another number of gatherings, as ranks then have other weights, and where
            ranks differ in what `compare` says of layouts.
        scale: What gradients of experts at home are multiplied by.
        means: Differs between passes that are planned differently; for one that is run again for its backward.
    """

    layer: int
    number: int
    compare: Callable[[Int64], None]
    title: str
    checks: Sequence[Tensor] = ()
    layout: Tensor | None = None
    gathered: int = 0
    scale: float = 1.0
    means: int = 0


class Planning(Protocol):
    """What a thread plans: see `QuotaPlans` and `LayoutPlans`."""

    @property
    def devices(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def numbering(self) -> Numbering: ...
    @property
    def shape(self) -> AnswerShape: ...
    def serve(self, desk: Desk) -> None: ...


class Mailbox:
    """Host memory that kernels and a planning thread share, and the thread.

    The thread runs one compiled function that never takes the interpreter's lock, logs, or calls CUDA; between passes
    of a GPU it looks for a request without a pause for a second, and then every 20 us or so. It takes a core.

    Args:
        planning: What the thread plans.
        device: Whose kernels read and write the memory.

    Attributes:
        shape: Places in the answer.
        columns: Columns of a row of `table`.
        words: int64[48], request, answered request and the like.
        table: int32[ranks, columns], counts of all ranks: of each expert, then choices out of range, weights that are
            not finite, tokens beyond what the pass has room for, the numbers of the layer and of its pass, its checks,
            its layout and its gatherings.
        answer: int32[shape.words].
    """

    def __init__(self, planning: Planning, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.planning, self.shape = planning, planning.shape
        self.columns = -(-(planning.experts + 6 + TOLD) // 4) * 4
        self.words = torch.zeros(WORDS, dtype=torch.int64, pin_memory=pinned)
        self.table = torch.zeros(planning.devices, self.columns, dtype=torch.int32, pin_memory=pinned)
        self.answer = torch.zeros(self.shape.words, dtype=torch.int32, pin_memory=pinned)
        self._words: Int64 = self.words.numpy()
        self._desk = Desk(
            self._words,
            self.table.numpy(),
            self.answer.numpy(),
            np.zeros(5, np.int64),
            np.zeros((planning.devices, 5), np.int64),
            *((_SPINS, _SLEEP_US) if pinned else (0, _UNHURRIED_US)),
        )
        self._words[STOP] = 1
        planning.serve(self._desk)  # compiles
        self._words[STOP] = 0
        self._thread = threading.Thread(target=planning.serve, args=(self._desk,), name="moeplan-mailbox", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._words, self._thread, device)
        """End the thread."""

    def check(self, turns: Mapping[int, Turn]) -> None:
        """Raise what a pass has noted, if any; see `DeviceExchange.check`.

        Args:
            turns: The last turn of each layer.
        """
        aborted = int(self._words[ABORTED])
        if aborted:
            raise MissedPassError(
                f"{_title(turns, int(self._words[LAYER]))}: rank {aborted - 1} has not come to a pass in time (seen by "
                f"rank {self.planning.numbering.rank}); the pass was abandoned on all ranks"
            )
        if not self._words[NOTED]:
            return
        kind, layer, rank, one, two = self._desk.fault.tolist()
        title = _title(turns, layer)
        if kind == DIFFER:
            turns[layer].compare(self._desk.told)
        if kind == ROUTER:
            raise RouterError(
                f"{title}: router output of rank {rank}: {one} choices outside 0..{self.planning.experts - 1} and "
                f"{two} weights that are not finite; the model has diverged or its inputs are wrong"
            )
        if kind == EXCESS:
            raise PassError(
                f"{title}: {one} tokens more than max_tokens on rank {rank}; raise it, or lower the micro-batch"
            )
        if kind == SHORT:
            raise InfeasibleError(
                f"spill.token_cap[{rank}]",
                f"{one} tokens planned in {title}",
                f"exceeds the cap by {two} tokens; raise the cap or the capacity, add spare slots, or lower the "
                "micro-batch",
            )
        if kind == FULL:
            raise PassError(
                f"{title}: its layout gives rank {rank} {one} rows, more than the {two} that capacity and rounds make "
                "room for; raise them in DeviceExchange, or lower the micro-batch"
            )
        if kind == UNKNOWN:
            raise PassError(
                f"{title}: the layout of this pass is not known any more, as of a captured graph that is replayed "
                "after more than a thousand others; capture it again"
            )
        raise PassError(f"{title}: counts that no plan can be made from; this is a fault of moeplan")


def _title(turns: Mapping[int, Turn], layer: int) -> str:
    turn = turns.get(layer)
    return f"layer {layer}" if turn is None else turn.title


def _stop(words: Int64, thread: threading.Thread, device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a pass under way still asks
    finally:
        words[STOP] = 1
        thread.join(timeout=1)
