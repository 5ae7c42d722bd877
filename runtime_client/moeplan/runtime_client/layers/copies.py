"""Copies of strided or scattered rows that move as many bytes at a time as the rows allow."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["copy_strided", "scatter_rows", "wide_views"]

_WIDE = (torch.complex128, torch.int64, torch.int32)  # 16, 8 and 4 bytes


def wide_views(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory seen as wider elements, of the widest type that suits all tensors.

    PyTorch's CUDA kernels for strided copies and scatters move one element per thread, so elements of 2 bytes reach
    a quarter of the memory's bandwidth.

    Args:
        tensors: Of one dtype, and to be copied from one to another only.
    """
    for dtype in _WIDE:
        if all(_suits(tensor, dtype.itemsize // tensor.element_size()) for tensor in tensors):
            return tuple(tensor.view(dtype) for tensor in tensors)
    return tensors


def copy_strided(out: Tensor, source: Tensor) -> None:
    """``out.copy_(source)`` where rows, the last dimension, are contiguous in both."""
    if out.dtype == source.dtype:
        out, source = wide_views(out, source)
    out.copy_(source)


def scatter_rows(out: Tensor, positions: Tensor, rows: Tensor) -> None:
    """``out[positions] = rows``, of one dtype; the order of writes does not matter, as no position may repeat."""
    wide_out, wide_rows = wide_views(out, rows.contiguous())
    wide_out.index_copy_(0, positions, wide_rows)


def _suits(tensor: Tensor, ratio: int) -> bool:
    """True if `ratio` elements of the last dimension can be seen as one."""
    if ratio <= 1 or tensor.stride(-1) != 1 or tensor.data_ptr() % (ratio * tensor.element_size()):
        return False
    return all(size % ratio == 0 for size in (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1]))
