"""Replicas lent for one micro-batch: which rank sends which expert to whom, and the buffer that they arrive in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeplan.runtime_client.group import ExpertGroup, Traffic, Transfer, beside, join
from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.solvers import SpillPlan
from moeplan.solvers.problem.arrays import Int32, Int64

__all__ = ["Homes", "Loan", "LoanBuffer"]


class Homes:
    """Who owns which expert.

    Args:
        home: int[experts], the owner of each.
        group: The ranks.
        row: int64[experts], see the attribute; in ascending order of experts by default.

    Attributes:
        device: int64[experts], the owner.
        row: int64[experts], place of an expert among those of its owner, which are numbered from 0.
        owned: Experts of this rank, by row.
        slots: int32[devices, most owned], the experts of each rank by row, -1 beyond.
        fingerprint: Equal on ranks that hold the same homes, and hardly on others.
    """

    def __init__(self, home: npt.NDArray[Any], group: ExpertGroup, row: Int64 | None = None) -> None:
        self.device = home.astype(np.int64)
        counts = np.bincount(self.device, minlength=group.size)
        if row is None:
            order = np.argsort(self.device, kind="stable")
            row = np.empty(len(home), np.int64)
            row[order] = np.arange(len(home)) - (np.cumsum(counts) - counts)[self.device[order]]
        self.row = row
        self.slots = np.full((group.size, int(counts.max())), -1, np.int32)
        self.slots[self.device, self.row] = np.arange(len(home))
        self.owned: list[int] = self.slots[group.rank, : counts[group.rank]].tolist()
        self.fingerprint = fingerprint(self.slots.tobytes())
        self._group = group

    def exchanged(self, pairs: Sequence[tuple[int, int]]) -> Homes:
        """The homes after the experts of each pair, which are in one pair at most, have changed places."""
        device, row = self.device.copy(), self.row.copy()
        first, second = np.array(pairs, np.int64).reshape(-1, 2).T
        for places in (device, row):
            places[first], places[second] = places[second], places[first]
        return Homes(device, self._group, row)


@dataclass(frozen=True, eq=False)
class Loan:
    """The transient replicas of one plan, as one rank sends and receives them.

    On every device they are ordered by owner and expert, so that they arrive in order.

    Attributes:
        slots: int32[devices, width], experts at home, then transient replicas; -1 where a slot is empty.
        sent: int64[devices, width], tokens from this rank to each slot.
        received: int64[devices, width], tokens from each source to the slots of this rank.
        rows: int64[lent], rows of this rank's experts to send, ordered by borrower.
        give: Replicas that this rank sends to each rank.
        take: Replicas that it receives from each rank.
        total: Replicas of all ranks together.
    """

    slots: Int32
    sent: Int64
    received: Int64
    rows: Int64
    give: list[int]
    take: list[int]
    total: int

    @classmethod
    def of(cls, plan: SpillPlan, homes: Homes, rank: int) -> Loan:
        """A copy of what matters of `plan`, whose arrays are the planner's own.

        Args:
            plan: Transient replicas and who sends them how many tokens.
            homes: Owners of the experts.
            rank: The rank whose view this is.
        """
        devices, owned = homes.slots.shape
        owner = homes.device[plan.expert]
        order = np.lexsort((plan.expert, owner, plan.device))
        expert, device, owner = plan.expert[order], plan.device[order], owner[order]
        borrowed = np.bincount(device, minlength=devices)
        place = owned + np.arange(len(expert)) - (np.cumsum(borrowed) - borrowed)[device]

        slots = np.full((devices, owned + int(borrowed.max(initial=0))), -1, np.int32)
        slots[:, :owned] = homes.slots
        slots[device, place] = expert
        experts = np.arange(len(homes.device))
        sent, received = np.zeros((2, *slots.shape), np.int64)
        sent[homes.device, homes.row] = plan.kept[rank]
        sent[device, place] = plan.sent[rank, order]
        at_home, here = experts[homes.device == rank], device == rank
        received[:, homes.row[at_home]] = plan.kept[:, at_home]
        received[:, place[here]] = plan.sent[:, order[here]]
        mine = owner == rank
        return cls(
            slots=slots,
            sent=sent,
            received=received,
            rows=homes.row[expert[mine]],
            give=np.bincount(device[mine], minlength=devices).tolist(),
            take=np.bincount(owner[here], minlength=devices).tolist(),
            total=len(expert),
        )

    @property
    def borrowed(self) -> int:
        """Replicas that this rank receives."""
        return sum(self.take)


class LoanBuffer:
    """Memory for transient replicas, shared by layers that run one after another.

    Attributes:
        contents: What the last loan was; a layer's backward pass has its loan repeated unless it is still there.
    """

    def __init__(self) -> None:
        self.contents: object = None
        self._memory: Tensor | None = None
        self._transfer: Transfer | None = None

    def __deepcopy__(self, memo: object) -> LoanBuffer:
        """Itself: a copy of a layer runs before or after it."""
        return self

    def view(self, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, elements] at the start of the buffer, which grows if it must; views given before stay valid."""
        elements = rows * like.shape[1]
        if self._memory is None or self._memory.dtype != dtype or self._memory.device != like.device:
            self._memory = torch.empty(elements, dtype=dtype, device=like.device)
        storage = self._memory.untyped_storage()
        if storage.size() < elements * dtype.itemsize:
            self.wait()
            storage.resize_(elements * dtype.itemsize)
        return torch.empty(0, dtype=dtype, device=like.device).set_(
            storage, 0, (rows, like.shape[1]), (like.shape[1], 1)
        )

    def lend(
        self,
        loan: Loan,
        flat: Tensor,
        into: Tensor,
        group: ExpertGroup,
        traffic: Traffic,
        purpose: str,
        contents: object,
    ) -> None:
        """Start the transfer of a loan. Every rank calls it at the same point, also with nothing to give or take.

        Args:
            loan: The replicas.
            flat: [owned, elements], this rank's experts.
            into: [borrowed, elements], a `view` of this buffer.
            group: The ranks.
            traffic: Counter of the bytes sent.
            purpose: Key in `traffic`.
            contents: What to call it in `contents`.
        """
        self.wait()
        self.contents = contents
        with beside(flat.device):
            rows = torch.from_numpy(loan.rows).to(flat.device, non_blocking=True)
            packed = flat.detach().index_select(0, rows).to(into.dtype)
            self._transfer = group.exchange(
                packed, loan.give, loan.take, weights=True, traffic=traffic, purpose=purpose, into=into
            )

    def wait(self) -> None:
        """Until the last loan is there. On CUDA the current stream waits, not the host."""
        if self._transfer is not None:
            device = self._transfer.received.device
            with beside(device):
                self._transfer.wait()
            join(device)
            self._transfer = None


def add_loan(gradient: Tensor, returned: Tensor, loan: Loan) -> None:
    """Add the gradients that came back from borrowers to those of the experts at home, in float32 or wider.

    Args:
        gradient: [owned, elements], changed in place.
        returned: [lent, elements], in the order of ``loan.rows``.
        loan: What was lent.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    for row in np.unique(loan.rows).tolist():
        total = gradient[row].to(wide)
        for position in np.flatnonzero(loan.rows == row).tolist():
            total += returned[position]
        gradient[row] = total
