"""Who waits for a worker: everyone has a turn, however many another has waiting."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["Turns"]


class _Waits(Protocol):
    @property
    def caller(self) -> str: ...

    @property
    def size(self) -> int: ...


W = TypeVar("W", bound=_Waits)


class Turns(Generic[W]):
    """Tasks that wait, by who wants them: first come, first served for each, and callers in turn.

    Attributes:
        size: Bytes of all that waits.
    """

    def __init__(self) -> None:
        self._callers: dict[str, deque[W]] = {}
        self.size = 0

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def add(self, waiting: W) -> None:
        """Let it wait behind all of its caller's."""
        self._callers.setdefault(waiting.caller, deque()).append(waiting)
        self.size += waiting.size

    def take(self) -> W:
        """The next task; its caller's turn is over."""
        caller = next(iter(self._callers))
        turns = self._callers.pop(caller)
        waiting = turns.popleft()
        if turns:
            self._callers[caller] = turns  # behind the others
        self.size -= waiting.size
        return waiting

    def remove(self, waiting: W) -> None:
        """It waits no more; nothing if it does not."""
        turns = self._callers.get(waiting.caller, deque())
        with contextlib.suppress(ValueError):
            turns.remove(waiting)
            self.size -= waiting.size
            if not turns:
                del self._callers[waiting.caller]

    def of(self, caller: str) -> Sequence[W]:
        """All that a caller has waiting, in order."""
        return tuple(self._callers.get(caller, ()))

    def fullest(self) -> str:
        """Who has most bytes waiting, and of those with equally many the most in number; empty for nobody."""
        return max(
            self._callers,
            key=lambda caller: (sum(w.size for w in self._callers[caller]), len(self._callers[caller])),
            default="",
        )

    def longest(self) -> str:
        """Who has most in number waiting; empty for nobody."""
        return max(self._callers, key=lambda caller: len(self._callers[caller]), default="")
