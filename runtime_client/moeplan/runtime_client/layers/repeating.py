"""Passes that run again in a backward, as activation checkpoints have them: with what their first run was made with."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from moeplan.solvers.problem.arrays import Int64

__all__ = ["MadePasses", "in_backward", "unseen"]

W = TypeVar("W")


@dataclass(eq=False)
class _Run(Generic[W]):
    """A pass whose backward may come.

    Attributes:
        counts: int64[ranks, experts], its tokens.
        means: Equal for passes that were planned alike: a fingerprint of layout and planner.
        way: What was planned.
        over: Whether its backward has been.
    """

    counts: Int64
    means: int
    way: W
    over: bool = False


class MadePasses(Generic[W]):
    """What the passes of a layer were made with, for as long as autograd keeps them.

    A checkpoint that is not reentrant runs a pass again for the backward of its first run, which has settled what
    travels where. Layout and planner may be others by then, so the second run must not plan anew. Ranks know it by its
    tokens, which they have just told each other, so all of them find the same.
    """

    def __init__(self) -> None:
        self._passes: weakref.WeakSet[_Run[W]] = weakref.WeakSet()

    def add(self, output: Tensor, counts: Int64, means: int, way: W) -> None:
        """Note a pass, whose `output` has a gradient to come."""
        made = _Run(counts, means, way)

        def end(_: Tensor) -> None:
            # When the backward is over, which goes on: a checkpoint may have yet to run the pass again.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: setattr(made, "over", True))

        output.register_hook(end)
        self._passes.add(made)

    def repeated(self, title: str, counts: Int64) -> W | None:
        """The way of the pass that is run again; None if this is a first run.

        Args:
            title: The layer, for the error.
            counts: Tokens of this run, as all ranks know them.

        Raises:
            RuntimeError: it may be one of several that were planned otherwise, or it has other tokens than its first
                run; raised on all ranks.
        """
        if not in_backward():
            return None
        same = [made for made in self._passes if np.array_equal(made.counts, counts)]
        waiting = any(not made.over for made in self._passes)
        if waiting and not same and torch.is_grad_enabled() and _for_first_run():
            raise RuntimeError(
                f"{title}: an activation checkpoint runs a pass again, and its tokens choose other experts than "
                "before. What a router draws must be the same in both runs: leave preserve_rng_state=True, and draw "
                "from torch's own generators"
            )
        same = [made for made in same if not made.over] or same
        if len({made.means for made in same}) > 1:
            raise RuntimeError(
                f"{title}: passes with the same tokens but with different layouts or planners wait for their "
                "backwards, so it is not known which of them an activation checkpoint runs again. Set layouts and "
                "planners between steps"
            )
        return same[0].way if same else None


@contextmanager
def unseen() -> Iterator[None]:
    """Within it, selective activation checkpoints see no operations: what one of two runs of a pass leaves out."""
    if _get_current_dispatch_mode() is None:
        yield
        return
    with _disable_current_modes():
        yield


def in_backward() -> bool:
    """True if autograd is running a backward pass on this thread, as it does while a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def _for_first_run() -> bool:
    """True in a checkpoint that is not reentrant: what it recomputes is for the graph of the first run."""
    return any(
        frame.f_code.co_name == "unpack_hook" and frame.f_globals["__name__"] == "torch.utils.checkpoint"
        for frame, _ in traceback.walk_stack(None)
    )
