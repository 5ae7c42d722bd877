"""Memory that all ranks of a link domain read and write, each under addresses of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["SymmetricMemory", "places", "symmetric_memory"]

UNIT = 16
"""Bytes of the unit in which `SymmetricMemory.peers` counts."""

_ALIGNMENT = 256
_FIRST_TORCH = (2, 11)


@dataclass(frozen=True, slots=True, eq=False)
class SymmetricMemory:
    """Memory of the same layout on every rank.

    Attributes:
        own: uint8[bytes], this rank's.
        peers: int64[ranks] on the same device, where each rank's begins as seen from the beginning of this rank's, in
            units of 16 bytes.
        held: What the addresses depend on.
    """

    own: Tensor
    peers: Tensor
    held: object = None

    @classmethod
    def of_addresses(cls, own: Tensor, addresses: Sequence[int], held: object = None) -> SymmetricMemory:
        """From the address of each rank's memory.

        Raises:
            ValueError: addresses differ by other than multiples of 16 bytes.
        """
        offsets = [address - own.data_ptr() for address in addresses]
        if any(offset % UNIT for offset in offsets):
            raise ValueError(f"addresses of symmetric memory differ by {offsets} bytes: must be multiples of {UNIT}")
        peers = torch.tensor([offset // UNIT for offset in offsets], dtype=torch.int64, device=own.device)
        return cls(own, peers, held)

    def view(self, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that begins `place` bytes from the beginning."""
        return self.own[place : place + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def places(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where parts of these sizes in bytes begin, one after the other and aligned; and the size of all together."""
    begins, end = {}, 0
    for name, size in sizes.items():
        begins[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return begins, end


def symmetric_memory(group: dist.ProcessGroup, size: int, device: torch.device) -> SymmetricMemory:
    """Zeroed memory on the GPUs of a group within one link domain. All ranks call it at the same time.

    NVLink multicast is not used.

    Args:
        group: NCCL process group whose GPUs reach each other's memory.
        size: Bytes.
        device: This rank's GPU.

    Raises:
        RuntimeError: torch is too old, or has no symmetric memory for these GPUs.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _FIRST_TORCH:
        raise RuntimeError(
            f"torch {torch.__version__}: GPUs reach each other by the symmetric memory of torch "
            f"{'.'.join(map(str, _FIRST_TORCH))} or later; leave `exchange` or `memory` out to stay on NCCL, or update"
        )
    import torch.distributed._symmetric_memory as symmetric

    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, group)
    own.zero_()
    addresses = [
        own.data_ptr() if rank == handle.rank else handle.get_buffer(rank, (size,), torch.uint8).data_ptr()
        for rank in range(handle.world_size)
    ]
    torch.cuda.synchronize(device)
    dist.barrier(group)  # nobody writes before all have zeroed theirs
    return SymmetricMemory.of_addresses(own, addresses, handle)
