"""Agreement of the ranks on a version of the layouts: all switch at one step, or none does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from moeplan.runtime_client.errors import AgreementError

__all__ = ["Agreement"]


class Agreement:
    """The newest version that every rank holds, found at step boundaries.

    A vote takes a step: `vote` starts an all_reduce(MIN) of the newest versions on a gloo group of its own and returns
    the outcome of the vote before, so no rank waits for the network. Only when that is a version to switch to do the
    ranks ask each other whether all still hold it, as one may have received a newer one alone.

    Args:
        group: gloo group of the ranks; None for a group of one.
        timeout: How long to wait for a rank that does not come.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, timeout: timedelta = timedelta(minutes=5)) -> None:
        self._group, self._timeout = group, timeout
        self._newest = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None
        self._begun = False
        self.in_force = 0

    def vote(self, newest: int, holds: Callable[[int], bool]) -> int | None:
        """Take part, at a step boundary; every rank of the group calls it in every step.

        Args:
            newest: Newest version that this rank holds; a rank that follows another's says ``2**62``.
            holds: Whether this rank can switch to a version.

        Returns:
            The version to switch to before the next step, the same on every rank; None to stay.

        Raises:
            AgreementError: a rank did not take part in time.
        """
        agreed = self._outcome()
        self._newest = torch.tensor([newest], dtype=torch.int64)
        switch = None
        if agreed is not None and self.in_force < agreed < 2**62 and self._all(holds(agreed)):
            self.in_force = switch = agreed
        self._pending, self._begun = self._reduce(self._newest), True
        return switch

    def finish(self) -> None:
        """Wait for the last vote, so that no collective is left open."""
        self._outcome()

    def _outcome(self) -> int | None:
        if not self._begun:
            return None
        self._wait(self._pending)
        self._pending, self._begun = None, False
        return int(self._newest)

    def _all(self, mine: bool) -> bool:
        answer = torch.tensor([int(mine)], dtype=torch.int64)
        self._wait(self._reduce(answer))
        return bool(answer)

    def _reduce(self, value: torch.Tensor) -> dist.Work | None:
        if self._group is None:
            return None
        return dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self._group, async_op=True)

    def _wait(self, work: dist.Work | None) -> None:
        if work is None:
            return
        begin = time.monotonic()
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise AgreementError(
                f"ranks did not agree on a layout within {time.monotonic() - begin:.0f} s "
                f"(limit {self._timeout.total_seconds():.0f} s): a rank is gone or stuck: {error}"
            ) from error
