"""A GPU that is one rank of several: the others are made up, and all memory is its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.device.exchange import DeviceExchange, SlotsOfLayouts
from moeplan.runtime_client.device.expert import Expert
from moeplan.runtime_client.device.launches import Launch
from moeplan.runtime_client.device.memory import SymmetricMemory
from moeplan.runtime_client.group import ExpertGroup
from moeplan.solvers import QuotaPlanner
from result_file import write_result

__all__ = ["exchange_of_one", "memory_of_one", "process_of_one", "write_result_of_one"]


@contextmanager
def process_of_one() -> Iterator[torch.device]:
    """A process group of this process alone, for `exchange_of_one`; its GPU."""
    with tempfile.NamedTemporaryFile() as meeting:
        dist.init_process_group("gloo", init_method=f"file://{meeting.name}", rank=0, world_size=1)
        yield torch.device("cuda", 0)
        dist.destroy_process_group()


def memory_of_one(size: int, device: torch.device, ranks: int) -> SymmetricMemory:
    """This rank's memory, zeros, in place of that of all."""
    own = torch.zeros(size, dtype=torch.uint8, device=device)
    return SymmetricMemory.of_addresses(own, [own.data_ptr()] * ranks)


def exchange_of_one(
    rank: int,
    ranks: int,
    planner: QuotaPlanner | SlotsOfLayouts,
    shape: Expert,
    device: torch.device,
    *,
    max_tokens: int,
    choices: int,
    capacity: int,
    differ: Callable[[Tensor], None] | None = None,
) -> DeviceExchange:
    """The exchange of a rank for which all others are there at every meeting, and write nothing.

    Args:
        rank: Which of the `ranks` it is.
        ranks: How many there are; the rest as `DeviceExchange` has it.
        differ: Changes what this rank tells in a pass, int32[columns], into what the others do; without it they are
            the caller's to tell.
    """
    assert dist.group.WORLD is not None

    def memory(group: dist.ProcessGroup, size: int, device: torch.device) -> SymmetricMemory:
        return memory_of_one(size, device, ranks)

    group = ExpertGroup(rank, ranks, dist.group.WORLD, dist.group.WORLD)
    exchange = DeviceExchange(
        group, planner, shape, max_tokens=max_tokens, choices=choices, device=device, capacity=capacity, memory=memory
    )
    for flags in (exchange.flags, exchange.flags_beside):
        flags.fill_(2**62)
    if differ is not None:
        exchange._launches.plan = _Told(exchange._launches.plan, exchange.table, rank, differ)
    return exchange


@dataclass(frozen=True)
class _Told:
    """`plan`, once the others have told what they have."""

    plan: Launch
    table: Tensor
    rank: int
    differ: Callable[[Tensor], None]

    def __call__(self, grid: tuple[int, int, int], *arguments: object) -> None:
        for other, row in enumerate(self.table):
            if other != self.rank:
                row.copy_(self.table[self.rank])
                self.differ(row)
        self.plan(grid, *arguments)


def write_result_of_one(path: Path, rows: Sequence[dict[str, Any]], commit: str | None, **facts: object) -> None:
    """Write what was measured on the GPU, with `facts` of the machine beside its own."""
    machine = {"device": torch.cuda.get_device_name(0), "ranks": 1, "torch": torch.__version__, **facts}
    write_result(path, rows, commit=commit, machine=machine)
