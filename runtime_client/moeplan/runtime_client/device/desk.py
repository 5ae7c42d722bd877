"""The words that kernels and a planning thread share, and what the thread does in every pass but plan.

All of it is compiled, never takes the interpreter's lock, and neither logs nor calls CUDA.
"""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moeplan.runtime_client.device.routes import FAULT
from moeplan.solvers.problem.arrays import Int32, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = [
    "ABORTED",
    "ANSWERED",
    "DIFFER",
    "EXCESS",
    "FULL",
    "INVALID",
    "LAYER",
    "NOTED",
    "REQUEST",
    "ROUTER",
    "SHORT",
    "STOP",
    "TOLD",
    "UNKNOWN",
    "WORDS",
    "Desk",
    "layout_key",
    "next_request",
    "note",
    "reply",
    "take_counts",
    "use_exact_sleep",
]

# Places in `words`, each in a cache line of its own.
REQUEST, LAYER, ANSWERED, ABORTED, STOP, NOTED = range(0, 48, 8)
WORDS = 48
TOLD = 8
"""Words of the `checks` of a turn and of its layout, two for each; another one behind them counts its gatherings."""

# Kinds of fault, and what `fault` holds: kind, layer, rank, and two numbers for the message.
ROUTER, EXCESS, SHORT, INVALID, DIFFER, FULL, UNKNOWN = range(1, 8)

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


class Desk(NamedTuple):
    """Memory that the thread works on.

    Attributes:
        words: int64[WORDS].
        table: int32[ranks, columns], counts of all ranks; see `Mailbox`.
        answer: int32[words]; see `AnswerShape`.
        fault: int64[5], what has gone wrong: its kind, the layer, a rank, and two numbers.
        told: int64[ranks, 5], what ranks tell beside their counts, as `compare_ranks` reads it.
        spins: Looks at the request before the thread sleeps between two looks.
        sleep_us: How long it sleeps.
    """

    words: Int64
    table: Int32
    answer: Int32
    fault: Int64
    told: Int64
    spins: int
    sleep_us: int


@kernel
def use_exact_sleep() -> None:
    """Have this thread sleep no longer than it says."""
    _control(_TIMER_SLACK, 1)


@kernel
def next_request(desk: Desk, answered: int) -> int:
    """Wait for a request other than the last, which is returned if there will be none.

    A thread between passes sleeps `sleep_us` between two looks after so many in vain.
    """
    idle = 0
    while True:
        request = _load(desk.words, REQUEST)
        if request != answered:
            return request
        if _load(desk.words, STOP):
            return answered
        idle += 1
        if idle > desk.spins:
            _sleep(desk.sleep_us)
        else:
            _pause()


@kernel
def take_counts(desk: Desk, counts: Int32) -> bool:
    """Whether nothing is wrong with what the ranks sent, as is noted otherwise; their counts, int32[ranks, experts].

    They are copied in loops: numba copies a slice with a stride ten times slower.
    """
    table, experts = desk.table, counts.shape[1]
    if _load(desk.words, NOTED):
        return False
    if _differ(desk.told, table, experts):
        note(desk, DIFFER, 0, 0, 0)
        return False
    for s in range(len(table)):
        if table[s, experts] or table[s, experts + 1]:
            note(desk, ROUTER, s, table[s, experts], table[s, experts + 1])
            return False
        if table[s, experts + 2]:
            note(desk, EXCESS, s, table[s, experts + 2], 0)
            return False
        for e in range(experts):
            counts[s, e] = table[s, e]
    return True


@kernel
def note(desk: Desk, kind: int, rank: int, one: int, two: int) -> None:
    """Note what is wrong with the pass under way."""
    fault = desk.fault
    fault[0], fault[1], fault[2], fault[3], fault[4] = kind, desk.words[LAYER], rank, one, two


@kernel
def reply(desk: Desk, request: int, planned: bool) -> None:
    """The answer is there; without a plan it says so, in this pass and all that follow."""
    if not planned:
        desk.answer[:] = 0
        desk.answer[FAULT] = 1
        _store(desk.words, NOTED, 1)
    _store(desk.words, ANSWERED, request)


@kernel
def layout_key(row: Int32) -> np.int64:
    """`Turn.layout` of a rank, from what it tells behind its counts."""
    return _joined(row, TOLD)


@kernel
def _joined(row: Int32, place: int) -> np.int64:
    """The int64 of two words."""
    return (np.int64(row[place + 1]) << 32) | (np.int64(row[place]) & 0xFFFFFFFF)


@kernel
def _differ(told: Int64, table: Int32, experts: int) -> bool:
    """Fill `told` from a table; whether what ranks tell does not go together, as `Turn.compare` finds it."""
    for s in range(len(told)):
        row = table[s, experts + 3 :]
        told[s, 0] = (np.int64(row[0]) << 32) | row[1]
        for check in range(3):
            told[s, 2 + check] = _joined(row, 2 + 2 * check)
        told[s, 1] = layout_key(row) ^ (np.int64(row[2 + TOLD]) << 32)
    for s in range(len(told)):
        if told[s, 0] != told[0, 0] or told[s, 1] != told[0, 1] or told[s, 4] != told[0, 4]:
            return True
        for other in range(len(told)):
            if other != s and told[s, 3] and told[s, 2] and told[s, 2] == told[other, 2]:
                return True
    return False
