"""A thread that plans: kernels leave the counts of a pass in host memory, it leaves the plan, and nobody else waits."""

from __future__ import annotations

import platform
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from moeplan.runtime_client.device.routes import FAULT, AnswerShape, Owners, write_answer
from moeplan.runtime_client.errors import MissedPassError, PassError, RouterError
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.kernel import kernel
from moeplan.solvers.spill.quota import fill_plans

__all__ = ["ABORTED", "ANSWERED", "LAYER", "REQUEST", "TOLD", "Mailbox", "MailboxSizes", "Turn"]

# Places in `words`, each in a cache line of its own.
REQUEST, LAYER, ANSWERED, ABORTED, STOP, NOTED = range(0, 48, 8)
_WORDS = 48
TOLD = 6
"""Words of the `checks` of a turn, two for each."""

# Kinds of fault, and what `note` holds: kind, layer, rank, and two numbers for the message.
_ROUTER, _EXCESS, _SHORT, _INVALID, _DIFFER = range(1, 6)
_KIND, _OF_LAYER, _RANK, _ONE, _TWO = range(5)

_SPINS = 20_000_000
"""Looks at the request, a second of them or so, before the thread sleeps between two looks: longer than a step."""

_SLEEP_US = 20

_UNHURRIED_US = 1000
"""Without a GPU there may be no core to spare, and kernels are slow: the thread sleeps so long between all looks."""

_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}
"""What tells a processor that a loop waits, with its arguments."""

_sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_control = types.ExternalFunction("prctl", types.int32(types.int32, types.uint64))
_TIMER_SLACK = 29
"""Linux otherwise adds 50 us to every sleep."""


@intrinsic  # type: ignore[untyped-decorator]
def _load(typing_context: Any, words: Any, place: Any) -> Any:
    """``words[place]`` as others wrote it, and with it all that they wrote before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, arguments), ordering="acquire", align=8)

    return types.int64(words, place), generate


@intrinsic  # type: ignore[untyped-decorator]
def _store(typing_context: Any, words: Any, place: Any, value: Any) -> Any:
    """Write ``words[place]`` for others, after all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        value = context.cast(builder, arguments[2], signature.args[2], types.int64)
        builder.store_atomic(value, pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.void(words, place, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pause(typing_context: Any) -> Any:
    """Wait for some tens of nanoseconds; yielding would hand the core over for milliseconds on a busy machine."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, numbers = _PAUSES.get(platform.machine(), ("", []))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(numbers))
            builder.call(builder.module.declare_intrinsic(name, (), kind), [ir.IntType(32)(each) for each in numbers])
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    place = context.cast(builder, arguments[1], signature.args[1], types.intp)
    return cgutils.get_item_pointer(context, builder, signature.args[0], array, [place], wraparound=False)


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Which pass this is, and what the rank tells the others beside its counts.

    Attributes:
        layer: Number of the layer in the group.
        number: Number of its pass.
        compare: Called with what all ranks told, int64[size, 5]: ``layer << 32 | number``, 0, and `checks` or zeros;
            raises if they do not go together.
        title: What errors call the layer.
        checks: int64 each, on the device: sum of this rank's experts, whether they are not what was loaded, and the sum
            of weights that all ranks share; empty in most passes.
    """

    layer: int
    number: int
    compare: Callable[[Int64], None]
    title: str
    checks: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True)
class MailboxSizes:
    """Rows of each rank, and the first of lent experts; see `write_answer`."""

    rows: int
    away: int


@kernel
def _note(note: Int64, kind: int, layer: int, rank: int, one: int, two: int) -> None:
    note[_KIND], note[_OF_LAYER], note[_RANK], note[_ONE], note[_TWO] = kind, layer, rank, one, two


@kernel
def _differ(told: Int64, table: Int32, experts: int) -> bool:
    """Fill `told` from a table; whether what ranks tell does not go together, as `Turn.compare` finds it."""
    for s in range(len(told)):
        row = table[s, experts + 3 :]
        told[s, 0] = (np.int64(row[0]) << 32) | row[1]
        for check in range(3):
            low, high = np.int64(row[2 + 2 * check]), np.int64(row[3 + 2 * check])
            told[s, 2 + check] = (high << 32) | (low & 0xFFFFFFFF)
    for s in range(len(told)):
        if told[s, 0] != told[0, 0] or told[s, 4] != told[0, 4]:
            return True
        for other in range(len(told)):
            if other != s and told[s, 3] and told[s, 2] and told[s, 2] == told[other, 2]:
                return True
    return False


@kernel
def _faults(note: Int64, layer: int, table: Int32, experts: int) -> bool:
    """True if something is wrong with a row of counts; it is noted."""
    for s in range(len(table)):
        if table[s, experts] or table[s, experts + 1]:
            _note(note, _ROUTER, layer, s, table[s, experts], table[s, experts + 1])
            return True
        if table[s, experts + 2]:
            _note(note, _EXCESS, layer, s, table[s, experts + 2], 0)
            return True
    return False


@kernel
def _take_counts(table: Int32, counts: Int32) -> None:
    """Copy them, in loops: numba copies a slice with a stride ten times slower."""
    for s in range(counts.shape[0]):
        for e in range(counts.shape[1]):
            counts[s, e] = table[s, e]


@kernel
def _serve(
    workspace: Any,
    words: Int64,
    table: Int32,
    answer: Int32,
    note: Int64,
    told: Int64,
    counts: Int32,
    places: Int64,
    rank: int,
    rows: int,
    away: int,
    owners: Any,
    scratch: Any,
    spins: int,
    sleep_us: int,
) -> None:
    """Answer requests until told to stop; sleep so long between two looks after so many in vain."""
    experts = counts.shape[2]
    replicas, home_quota, devices, sent, kept, summary = workspace[-6:]
    answered, idle = 0, 0
    _control(_TIMER_SLACK, 1)
    while True:
        request = _load(words, REQUEST)
        if request == answered:
            if _load(words, STOP):
                return
            idle += 1
            if idle > spins:
                _sleep(sleep_us)
            else:
                _pause()
            continue
        idle = 0
        answered = request
        layer = words[LAYER]
        failed = _load(words, NOTED) != 0
        if not failed and _differ(told, table, experts):
            _note(note, _DIFFER, layer, 0, 0, 0)
            failed = True
        if not failed and _faults(note, layer, table, experts):
            failed = True
        if not failed:
            _take_counts(table, counts[0])
            if fill_plans(counts, *workspace) >= 0:
                _note(note, _INVALID, layer, 0, 0, 0)
                failed = True
            for d in range(devices.shape[2]):
                if not failed and devices[0, 1, d]:
                    _note(note, _SHORT, layer, d, devices[0, 0, d], devices[0, 1, d])
                    failed = True
        if failed:
            answer[:] = 0
            answer[FAULT] = 1
            _store(words, NOTED, 1)
        else:
            write_answer(
                answer, places, rank, rows, away,
                int(summary[0, 0]), replicas[0, 0], replicas[0, 1], home_quota[0], sent[0], kept[0],
                *owners, *scratch,
            )  # fmt: skip
        _store(words, ANSWERED, request)


class Mailbox:
    """Host memory that kernels and a planning thread share, and the thread.

    The thread runs one compiled function that never takes the interpreter's lock, allocates, or calls CUDA; between
    passes of a GPU it looks for a request without a pause for a second, and then every 20 us or so. It takes a core.

    Args:
        options: What the thread plans with.
        rank: This rank.
        sizes: Rows of a rank.
        pinned: Whether kernels of a CUDA device read and write the memory.

    Attributes:
        shape: Places in the answer.
        columns: Columns of a row of `table`.
        words: int64[48], request, answered request and the like.
        table: int32[ranks, columns], counts of all ranks: of each expert, then choices out of range, weights that are
            not finite, tokens beyond what the pass has room for, the numbers of the layer and of its pass, and checks.
        answer: int32[shape.words].
    """

    def __init__(self, options: SpillOptions, rank: int, sizes: MailboxSizes, *, pinned: bool) -> None:
        spare = np.minimum(options.spare, options.experts)
        owned = int((options.home == rank).sum())
        self.rank = rank
        self.options = options
        self.shape = AnswerShape(options.experts, int(spare.sum()), owned, int(spare[rank]))
        self.columns = -(-(options.experts + 5 + TOLD) // 4) * 4
        self.words = torch.zeros(_WORDS, dtype=torch.int64, pin_memory=pinned)
        self.table = torch.zeros(options.devices, self.columns, dtype=torch.int32, pin_memory=pinned)
        self.answer = torch.zeros(self.shape.words, dtype=torch.int32, pin_memory=pinned)
        self._words: Int64 = self.words.numpy()
        self._note = np.zeros(5, np.int64)
        self._told = np.zeros((options.devices, 5), np.int64)
        own = QuotaPlanner(options, options.devices, dtype=np.int32, quick=True)
        owners = Owners.of(options)
        arguments = (
            own.workspace,
            self._words,
            self.table.numpy(),
            self.answer.numpy(),
            self._note,
            self._told,
            np.zeros((1, options.devices, options.experts), np.int32),
            self.shape.places(),
            rank,
            sizes.rows,
            sizes.away,
            (owners.home, owners.row, owners.order, owners.first),
            (np.zeros((4, max(options.experts, options.devices)), np.int64), np.zeros((3, self.shape.slots), np.int64)),
            *((_SPINS, _SLEEP_US) if pinned else (0, _UNHURRIED_US)),
        )
        self._words[STOP] = 1
        _serve(*arguments)  # compiles
        self._words[STOP] = 0
        self._thread = threading.Thread(target=_serve, args=arguments, name="moeplan-mailbox", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._words, self._thread, pinned)
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
                f"rank {self.rank}); the pass was abandoned on all ranks"
            )
        if not self._words[NOTED]:
            return
        kind, layer, rank, one, two = self._note.tolist()
        title = _title(turns, layer)
        if kind == _DIFFER:
            turns[layer].compare(self._told)
        if kind == _ROUTER:
            raise RouterError(
                f"{title}: router output of rank {rank}: {one} choices outside 0..{self.options.experts - 1} and {two} "
                "weights that are not finite; the model has diverged or its inputs are wrong"
            )
        if kind == _EXCESS:
            raise PassError(
                f"{title}: {one} tokens more than max_tokens on rank {rank}; raise it, or lower the micro-batch"
            )
        if kind == _SHORT:
            raise InfeasibleError(
                f"spill.token_cap[{rank}]",
                f"{one} tokens planned in {title}",
                f"exceeds the cap by {two} tokens; raise the cap or the capacity, add spare slots, or lower the "
                "micro-batch",
            )
        raise PassError(f"{title}: counts that no plan can be made from; this is a fault of moeplan")


def _title(turns: Mapping[int, Turn], layer: int) -> str:
    turn = turns.get(layer)
    return f"layer {layer}" if turn is None else turn.title


def _stop(words: npt.NDArray[Any], thread: threading.Thread, pinned: bool) -> None:
    if pinned:
        torch.cuda.synchronize()  # a pass under way still asks
    words[STOP] = 1
    thread.join(timeout=1)
