"""The expert-parallel group: its collectives, and the stream that weights travel on."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.errors import MissedPassError
from moeplan.solvers.problem.errors import ProblemError

__all__ = ["ExpertGroup", "Traffic", "Transfer", "ascending", "beside", "join", "mark", "on_stream", "switched_to"]

_SLOW_S = 1.0
"""A rank that has waited for others so long says so, for those that will ask who came."""

_BUSY_S = 1e-3
"""The host polls a GPU without a pause for so long, as it would to synchronise."""

# Its name since torch 2.13, which warns about the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Traffic = Counter[str]
"""Bytes that a rank sent to *other* ranks, by purpose.

Keys: ``tokens.forward``, ``tokens.backward`` (dispatch and combine), ``weights.forward``, ``weights.backward``
(replicas sent to slots), ``gradients`` (theirs on the way back) and ``homes`` (experts that move for good). Counted
from the split sizes of the collectives.
"""


@dataclass(frozen=True, slots=True)
class Transfer:
    """An all-to-all under way.

    Attributes:
        sent: Rows being read; held until the transfer is over.
        received: Rows being written; valid after `wait`.
        purpose: What for, as in `Traffic`.
    """

    sent: Tensor
    received: Tensor
    work: dist.Work | None
    purpose: str

    def wait(self) -> Tensor:
        """The received rows. On CUDA only the current stream waits, not the host.

        Raises:
            MissedPassError: a rank has not come within the time limit, or is gone.
        """
        if self.work is None:
            return self.received
        try:
            self.work.wait()
        except RuntimeError as error:
            raise MissedPassError(
                f"{self.purpose}: some rank has not come to it in time, or is gone ({error}). Every rank calls "
                "backward() as often as the others do, also with no tokens"
            ) from error
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
        timeout: How long a rank waits for the others to come to the same pass.
    """

    rank: int = 0
    size: int = 1
    tokens: dist.ProcessGroup | None = None
    weights: dist.ProcessGroup | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)
    timeout: timedelta = timedelta(seconds=30)

    @overload
    @classmethod
    def create(cls, ranks: None = None, *, timeout: timedelta = timedelta(seconds=30)) -> ExpertGroup: ...

    @overload
    @classmethod
    def create(cls, ranks: Sequence[int], *, timeout: timedelta = timedelta(seconds=30)) -> ExpertGroup | None: ...

    @classmethod
    def create(
        cls, ranks: Sequence[int] | None = None, *, timeout: timedelta = timedelta(seconds=30)
    ) -> ExpertGroup | None:
        """Make the process groups. As with ``torch.distributed.new_group``, *every* rank of the world calls it.

        Args:
            ranks: Global ranks of the group, ascending; all by default.
            timeout: How long a rank waits for the others to come to the same pass, before it raises `MissedPassError`;
                longer where one rank is busy for longer between passes, for instance with what it logs or evaluates.

        Returns:
            The group, or None on a rank outside of it.

        Raises:
            ProblemError: the ranks do not ascend.
        """
        members = list(range(dist.get_world_size())) if ranks is None else ascending(ranks)
        tokens = dist.new_group(members, timeout=_limit(timeout))
        weights = dist.new_group(members, timeout=_limit(timeout))
        if dist.get_rank() not in members:
            return None
        return cls(members.index(dist.get_rank()), len(members), tokens, weights, timeout=timeout)

    @classmethod
    def within(cls, process_group: dist.ProcessGroup, *, timeout: timedelta = timedelta(seconds=30)) -> ExpertGroup:
        """Make process groups of the ranks of another one, as of a framework's expert parallelism.

        Args:
            process_group: The ranks; only they call it, in the same order where it is called for several groups.
            timeout: As in `create`.
        """
        members = dist.get_process_group_ranks(process_group)
        if len(members) == 1:
            return cls(timeout=timeout)
        tokens, weights = (
            dist.new_group(members, timeout=_limit(timeout), use_local_synchronization=True) for _ in range(2)
        )
        return cls(members.index(dist.get_rank()), len(members), tokens, weights, timeout=timeout)

    @property
    def members(self) -> tuple[int, ...]:
        """Global ranks of the group."""
        if self.tokens is None:
            return (dist.get_rank() if dist.is_initialized() else 0,)
        return tuple(dist.get_process_group_ranks(self.tokens))

    def __deepcopy__(self, memo: object) -> ExpertGroup:
        """Itself: copies of a layer run on the same process groups."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "process groups cannot be pickled, so a model that holds them cannot either. Save on every rank, with "
            "torch.distributed.checkpoint as dcp:\n"
            '    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)'
        )

    def gather_rows(self, row: Tensor, what: str = "gathering") -> Tensor:
        """[size, len(row)]: the row of every rank, once it is there.

        Args:
            row: Of one length on all ranks.
            what: What errors call it, for instance a pass of a layer; the same on all ranks.

        Raises:
            MissedPassError: a rank has not come within the time limit, or is gone.
        """
        if self.tokens is None:
            return row.unsqueeze(0)
        table = row.new_empty(self.size * len(row))
        work = _all_gather(table, row, group=self.tokens, async_op=True)
        try:
            came = self._wait(_Awaited(work, row.device), what)
        except RuntimeError as error:
            self._announce(what)
            time.sleep(2 * _SLOW_S)  # for the others to announce themselves
            raise MissedPassError(f"{what}: {self._absent(what)} gone ({error})") from error
        if not came:
            raise MissedPassError(
                f"{what}: {self._absent(what)} not come to it within {self.timeout.total_seconds():g} s. Every rank of "
                "the group calls every layer as often as the others do, also with no tokens; if one is busy for longer "
                "between passes, ExpertGroup.create(timeout=...)"
            )
        return table.view(self.size, len(row))

    def _wait(self, gathered: _Awaited, what: str) -> bool:
        """True if the others come within the time limit."""
        end = time.monotonic() + self.timeout.total_seconds()
        if gathered.within(min(_SLOW_S, self.timeout.total_seconds())):
            return True
        self._announce(what)
        while time.monotonic() < end:
            if gathered.within(_SLOW_S):
                return True
        return False

    def _announce(self, what: str) -> None:
        """Let ranks that wait in vain see that this one has come."""
        dist.distributed_c10d._get_default_store().set(self._key(what, self.rank), "")

    def _absent(self, what: str) -> str:
        """Ranks that have not come, in words."""
        store = dist.distributed_c10d._get_default_store()
        absent = [rank for rank in range(self.size) if not store.check([self._key(what, rank)])]
        return f"ranks {absent} have" if absent else "some rank has"

    def _key(self, what: str, rank: int) -> str:
        assert self.tokens is not None, "there are others"
        return f"moeplan/{self.tokens.group_name}/{what}/{rank}"

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
            return Transfer(rows, rows, None, purpose)
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:]) if into is None else into
        work = dist.all_to_all_single(received, rows, list(receive), list(send), group=process_group, async_op=True)
        return Transfer(rows, received, work, purpose)


def ascending(ranks: Sequence[int]) -> list[int]:
    """Ranks of a group, in the only order that process groups have.

    Raises:
        ProblemError: they are in another.
    """
    members = list(ranks)
    if members != sorted(members):
        raise ProblemError("ranks", members, f"must ascend, as those of process groups do; write {sorted(members)}")
    return members


def _limit(timeout: timedelta) -> timedelta:
    """Of the collectives of a group.

    Gloo cannot give up a collective before its own limit, so a process could not end sooner. NCCL's watchdog ends the
    process, without a word of layers, so it must be later.
    """
    return 2 * timeout if dist.get_backend() == "gloo" else 2 * max(timeout, timedelta(minutes=5))


class _Awaited:
    """A collective that the host waits for, but not for ever."""

    def __init__(self, work: dist.Work, device: torch.device) -> None:
        self.work = work
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            work.wait()  # only the stream waits
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))

    def within(self, seconds: float) -> bool:
        """True if it is over, after waiting for so long at most."""
        if self.event is None:
            try:
                self.work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if not self.work.is_completed():
                    return False
                self.work.wait()  # raises if it has failed; it may also have ended well just after the time was up
            return True
        now = time.monotonic()
        while not self.event.query():
            if time.monotonic() > now + seconds:
                return False
            if time.monotonic() > now + _BUSY_S:
                time.sleep(_BUSY_S)
        return True


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def on_stream(stream: torch.cuda.Stream | None, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """Run what follows on a stream, `after` what was marked, or else the work already queued on its device's current
    one; None: where it is.
    """
    if stream is None:
        yield
        return
    stream.wait_event(after or torch.cuda.current_stream(stream.device).record_event())
    with switched_to(stream):
        yield


def switched_to(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Queue what follows on a stream, which waits for nothing; None: where it is.

    As `torch.cuda.stream`, which takes the host some 10 us, several times a layer.
    """
    if stream is None:
        return nullcontext()
    if not hasattr(stream, "__enter__"):  # in older torch
        return torch.cuda.stream(stream)
    # An object for this use: it keeps what was current before, and so can be entered once, by one thread.
    number, index, kind = stream.stream_id, stream.device_index, stream.device_type
    return torch.cuda.Stream(stream_id=number, device_index=index, device_type=kind)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """The end of the work already queued on the current stream of a CUDA device, for `beside`."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def beside(device: torch.device, after: torch.cuda.Event | None = None) -> AbstractContextManager[None]:
    """Run what follows on the side stream of a CUDA device, `after` a `mark`, or else what is queued by now.

    Nothing on other devices, where the process group's own threads do the transfer. The caller makes the current stream
    wait with `join` before it uses a result.
    """
    return on_stream(_side_stream(device) if device.type == "cuda" else None, after)


def join(device: torch.device, at: torch.cuda.Event | None = None) -> None:
    """Make the current stream wait for the side stream, or for a `mark` on it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_event(at or _side_stream(device).record_event())
