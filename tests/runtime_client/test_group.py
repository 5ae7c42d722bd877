"""Groups of ranks, and waiting for a collective, which may end at any moment."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeplan.runtime_client.group import ExpertGroup, _Awaited
from moeplan.solvers.problem.errors import ProblemError

Launch = Callable[..., list[Any]]


class _EndsLate:
    """A collective that the others join just after a wait for it has timed out."""

    def __init__(self, work: dist.Work) -> None:
        self.work = work
        self.is_completed = work.is_completed

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.work.wait()
        if timeout is not None:
            raise RuntimeError("Operation timed out!")
        return True


def add() -> tuple[bool, float]:
    number = torch.tensor([dist.get_rank() + 1.0])
    work = dist.all_reduce(number, async_op=True)
    assert work is not None
    awaited = _Awaited(_EndsLate(work), number.device)  # type: ignore[arg-type]
    return awaited.within(1.0), number.item()


def test_a_collective_that_ends_as_the_time_is_up_has_not_failed(ranks: Launch) -> None:
    assert ranks(2, add) == [(True, 3.0)] * 2


def reverse() -> str:
    with pytest.raises(ProblemError) as refused:
        ExpertGroup.create([1, 0])
    return str(refused.value)


def test_ranks_in_another_order_than_that_of_process_groups_are_refused(ranks: Launch) -> None:
    assert ranks(2, reverse) == ["ranks = [1, 0]: must ascend, as those of process groups do; write [0, 1]"] * 2
