"""The expert-parallel group: its collectives, and the stream that weights travel on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ExpertGroup", "Traffic", "Transfer", "beside", "join"]

# Its name since torch 2.13, which warns about the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Traffic = Counter[str]
"""Bytes that a rank sent to *other* ranks, by purpose.

Keys: ``tokens.forward``, ``tokens.backward`` (dispatch and combine), ``weights.forward``, ``weights.backward``
(replicas sent to slots) and ``gradients`` (theirs on the way back). Counted from the split sizes of the collectives.
"""


@dataclass(frozen=True, slots=True)
class Transfer:
    """An all-to-all under way.

    Attributes:
        sent: Rows being read; held until the transfer is over.
        received: Rows being written; valid after `wait`.
    """

    sent: Tensor
    received: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The received rows. On CUDA only the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.received


@dataclass(frozen=True, eq=False)
class ExpertGroup:
    """Ranks that hold one set of experts together.

    Tokens and weights travel on separate process groups, so that neither queues behind the other.

    Attributes:
        rank: This process's place in the group, 0..size-1: its device index in every layout.
        size: Number of ranks N.
        tokens: Process group of dispatch, combine and counts; None for a group of one.
        weights: Process group of weights and their gradients; None for a group of one.
        numbers: Numbers for the layers of the group, which every rank makes in the same order.
    """

    rank: int = 0
    size: int = 1
    tokens: dist.ProcessGroup | None = None
    weights: dist.ProcessGroup | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @classmethod
    def create(
        cls, ranks: Sequence[int] | None = None, *, timeout: timedelta = timedelta(minutes=10)
    ) -> ExpertGroup | None:
        """Make the process groups. As with ``torch.distributed.new_group``, *every* rank of the world calls it.

        Args:
            ranks: Global ranks of the group; all by default.
            timeout: Limit of one collective.

        Returns:
            The group, or None on a rank outside of it.
        """
        members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        tokens = dist.new_group(members, timeout=timeout)
        weights = dist.new_group(members, timeout=timeout)
        if dist.get_rank() not in members:
            return None
        return cls(members.index(dist.get_rank()), len(members), tokens, weights)

    def __deepcopy__(self, memo: object) -> ExpertGroup:
        """Itself: copies of a layer run on the same process groups."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "process groups cannot be pickled, so a model that holds them cannot either. Save on every rank, with "
            "torch.distributed.checkpoint as dcp:\n"
            '    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)'
        )

    def gather_rows(self, row: Tensor) -> Tensor:
        """[size, len(row)]: the row of every rank."""
        if self.tokens is None:
            return row.unsqueeze(0)
        table = row.new_empty(self.size * len(row))
        _all_gather(table, row, group=self.tokens)
        return table.view(self.size, len(row))

    def exchange(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        *,
        weights: bool = False,
        traffic: Traffic,
        purpose: str,
        into: Tensor | None = None,
    ) -> Transfer:
        """Start an all-to-all of rows with uneven splits; every rank of the group calls it, also with no rows.

        Args:
            rows: [sum(send), ...], ordered by destination rank.
            send: Rows for each rank.
            receive: Rows from each rank.
            weights: Whether they travel on the process group of the weights.
            traffic: Counter of the bytes sent.
            purpose: Key in `traffic`.
            into: [sum(receive), ...], memory for what arrives; new by default.
        """
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        traffic[purpose] += row_bytes * (sum(send) - send[self.rank])
        process_group = self.weights if weights else self.tokens
        if process_group is None:
            return Transfer(rows, rows, None)
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:]) if into is None else into
        work = dist.all_to_all_single(received, rows, list(receive), list(send), group=process_group, async_op=True)
        return Transfer(rows, received, work)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run what follows on the side stream of a CUDA device, after the work already queued on the current stream.

    Nothing on other devices, where the process group's own threads do the transfer. The caller makes the current stream
    wait with `join` before it uses a result.
    """
    if device.type != "cuda":
        yield
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def join(device: torch.device) -> None:
    """Make the current stream wait for the side stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))
