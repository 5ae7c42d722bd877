"""Copies between addresses of memory that ranks share, which copy engines do beside the processors."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from moeplan.solvers.problem.arrays import Int64

__all__ = ["copy_pieces"]


def copy_pieces(out: Int64, source: Int64, size: int, stream: torch.cuda.Stream | None) -> None:
    """Copy pieces of the same size, each from one address to another.

    PyTorch knows this memory as one tensor for each rank, and takes twice the time of the host to copy parts of it.

    Args:
        out: int64[pieces], addresses to write.
        source: int64[pieces], addresses to read.
        size: Bytes of a piece.
        stream: Of the GPU whose copies these are, which the caller has made wait for whatever they need; None for
            memory of CPUs, which is copied at once.

    Raises:
        RuntimeError: the driver refused a copy.
    """
    pairs = zip(out.tolist(), source.tolist(), strict=True)
    if stream is None:
        for to, origin in pairs:
            ctypes.memmove(to, origin, size)
        return
    copy, queue = _driver().cuMemcpyAsync, stream.cuda_stream
    for to, origin in pairs:
        if status := copy(to, origin, size, queue):
            raise RuntimeError(f"cuMemcpyAsync of {size} bytes: error {status} of the driver")


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    return driver
