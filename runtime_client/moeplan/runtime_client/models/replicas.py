"""Gradients of experts that several expert groups hold: averaged over them, and what must be averaged together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.device.launches import is_captured
from moeplan.runtime_client.errors import MissedPassError, RanksDifferError
from moeplan.runtime_client.layers.fingerprints import fingerprint

__all__ = ["Replicas"]


class Replicas:
    """Ranks that hold the same experts, each in its own group; they average gradients as a backward pass goes on.

    Averages have no names, so once it is over they tell each other what they have averaged.
    """

    def __init__(self, members: Sequence[int], timeout: timedelta) -> None:
        self.members = members
        make = partial(dist.new_group, members, timeout=timeout, use_local_synchronization=True)
        self.group, self._tellers = make(), make(backend="gloo")  # by the host, which does not wait for the device
        self._averaged: dict[int, list[tuple[str, int, dist.Work | None]]] = {}
        """Title and steps of each gradient, and its average under way, by the backward pass that it is of."""

    def average(self, gradient: Tensor, title: str, steps: int) -> None:
        """Begin to average a gradient in place; the backward pass that is under way ends once it is.

        Args:
            gradient: The gradient.
            title: Of its layer.
            steps: Of optimizers, that its parameter has made.
        """
        backward = torch._C._current_graph_task_id()  # a checkpoint that is reentrant has its own within another
        if backward not in self._averaged:
            self._averaged[backward] = []
            finish = partial(self._finish, backward, is_captured(gradient))
            torch.autograd.Variable._execution_engine.queue_callback(finish)
        work = None
        if gradient.numel():
            work = dist.all_reduce(gradient.div_(len(self.members)), group=self.group, async_op=True)
        self._averaged[backward].append((title, steps, work))

    def _finish(self, backward: int, captured: bool) -> None:
        averaged = self._averaged.pop(backward)
        if not captured:
            self._compare([(title, steps) for title, steps, _ in averaged])
        for *_, work in averaged:
            if work is not None:
                work.wait()

    def _compare(self, averaged: Sequence[tuple[str, int]]) -> None:
        """Raise, on all replicas, if they have averaged other gradients than these.

        Raises:
            RanksDifferError: they have.
            MissedPassError: one of them did not come in time.
        """
        mine = torch.tensor([fingerprint(repr(averaged).encode())], device="cpu")
        told = [torch.empty_like(mine) for _ in self.members]
        try:
            dist.all_gather(told, mine, group=self._tellers)
        except RuntimeError as error:
            raise MissedPassError(f"{self._rule()} One of them did not come in time: {error}") from error
        if len({int(mark) for mark in told}) > 1:
            everything: list[Sequence[tuple[str, int]]] = [() for _ in self.members]
            dist.all_gather_object(everything, averaged, group=self._tellers)
            each = "; ".join(
                f"rank {rank} {', '.join(title for title, _ in its)} after {its[0][1]} steps"
                for rank, its in zip(self.members, everything, strict=True)
            )
            raise RanksDifferError(f"{self._rule()} These were averaged together: {each}")

    def _rule(self) -> str:
        return (
            f"ranks {list(self.members)} hold the same experts, each in its own expert group, and average their "
            "gradients in every backward pass. So each of them must run as many backward passes in a step, through the "
            "same layers in the same order; where it has nothing for one, call it with no tokens."
        )
