"""Symmetric memory on CPUs: a file for each rank, which all ranks map; kernels run in Triton's interpreter."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from moeplan.runtime_client.device.memory import SymmetricMemory

Memory = Callable[[dist.ProcessGroup, int, torch.device], SymmetricMemory]


def shared_memory(folder: Path) -> Memory:
    """What `symmetric_memory` is on GPUs, for processes of one host that share a folder."""
    numbers = itertools.count()

    def make(group: dist.ProcessGroup, size: int, device: torch.device) -> SymmetricMemory:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        number = next(numbers)
        with (folder / f"rank{rank}-{number}").open("wb") as file:
            file.truncate(size)
        dist.barrier(group)
        maps = []
        for peer in range(ranks):
            with (folder / f"rank{peer}-{number}").open("r+b") as file:
                maps.append(torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8))
        return SymmetricMemory.of_addresses(maps[rank], [part.data_ptr() for part in maps], maps)

    return make
