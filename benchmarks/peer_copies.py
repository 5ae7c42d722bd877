"""How GPUs of one host copy parts of experts from each other's memory: bandwidth, time of the host, what products lose.

    torchrun --nproc-per-node 2 benchmarks/peer_copies.py --out peer_copies.json

Each rank gathers its slots (all experts over the ranks) from shards of the others, as fully sharded experts do, in
several ways: copies by PyTorch or by the driver, one for each part; the driver's copies of rectangles, one for each
rank; the driver's batches; NCCL's all-to-all with what it needs before and after. `GB/s` is what arrives from other
ranks, by the slowest rank; `host` is what the host needs to queue it; `products` is how much longer a product of large
matrices takes while gatherings run beside it all the time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client import ExpertGroup
from moeplan.runtime_client.device.memory import UNIT, symmetric_memory
from moeplan.runtime_client.device.peer_copies import Copies

SIZES = {"large": (32, 1024, 2048), "wide": (32, 2048, 4096), "fine": (128, 2048, 768)}
"""Experts, hidden, width."""

Gather = Callable[[torch.cuda.Stream], None]


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes of the driver: order of the stream, places unknown, overlap with compute preferred."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("from_", ctypes.c_int * 2),
        ("to", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


def ways(group: ExpertGroup, experts: int, elements: int, device: torch.device) -> dict[str, Gather]:
    """Ways to gather contiguous slots, into the same memory."""
    rank, size, slots = group.rank, group.size, experts // group.size
    assert group.weights is not None
    width, row = elements // size, 2 * elements // size
    shared = symmetric_memory(group.weights, experts * row, device)
    shards = shared.view(0, (experts, width), torch.bfloat16)
    shards.normal_()
    torch.cuda.synchronize()
    dist.barrier()
    addresses = shared.own.data_ptr() + UNIT * shared.peers.cpu().numpy()
    flat = torch.empty(slots, size, width, dtype=torch.bfloat16, device=device)
    peers = [(rank + step) % size for step in range(1, size + 1)]
    first = rank * slots
    out = flat.data_ptr() + row * (size * np.arange(slots) + np.array(peers)[:, None])
    source = addresses[peers, None] + row * (first + np.arange(slots))
    views = [
        shared.held.get_buffer(peer, (experts, width), torch.bfloat16) if peer != rank else shards  # type: ignore[attr-defined]
        for peer in peers
    ]
    driver = ctypes.CDLL("libcuda.so.1")

    def by_torch(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for peer, view in zip(peers, views, strict=True):
                for slot in range(slots):
                    flat[slot, peer].copy_(view[first + slot])

    def by_driver(stream: torch.cuda.Stream) -> None:
        for to, origin in zip(out.ravel().tolist(), source.ravel().tolist(), strict=True):
            if status := driver.cuMemcpyAsync(
                *map(ctypes.c_uint64, (to, origin, row)), ctypes.c_void_p(stream.cuda_stream)
            ):
                raise RuntimeError(f"cuMemcpyAsync: {status}")

    rectangles = Copies(row, np.full(size, slots), out[:, 0], size * row, source[:, 0], row)

    outs, sources = (np.ascontiguousarray(each.ravel(), np.uint64) for each in (out, source))
    lengths = np.full(len(outs), row, np.uint64)
    attributes, zero, failed = Attributes(order=1, flags=1), ctypes.c_size_t(0), ctypes.c_size_t(0)

    def batch(stream: torch.cuda.Stream) -> None:
        status = driver.cuMemcpyBatchAsync(
            ctypes.c_void_p(outs.ctypes.data), ctypes.c_void_p(sources.ctypes.data),
            ctypes.c_void_p(lengths.ctypes.data), ctypes.c_size_t(len(outs)), ctypes.byref(attributes),
            ctypes.byref(zero), ctypes.c_size_t(1), ctypes.byref(failed), ctypes.c_void_p(stream.cuda_stream),
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cuMemcpyBatchAsync: {status}")

    received = torch.empty(size * slots, width, dtype=torch.bfloat16, device=device)

    def by_nccl(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            packed = shards.index_select(0, torch.arange(experts, device=device))
            dist.all_to_all_single(received, packed, group=group.weights)
            flat.copy_(received.view(size, slots, width).transpose(0, 1))

    expected = torch.stack(
        [view[first : first + slots] for view in (views[peers.index(p)] for p in range(size))], dim=1
    )

    def checked(gather: Gather) -> Gather:
        flat.zero_()
        torch.cuda.synchronize()
        gather(torch.cuda.Stream())
        torch.cuda.synchronize()
        assert torch.equal(flat, expected)
        return gather

    found = {}
    for name, gather in (
        ("torch", by_torch), ("driver", by_driver), ("rectangles", rectangles.start), ("batch", batch),
        ("nccl", by_nccl),
    ):  # fmt: skip
        try:
            found[name] = checked(gather)
        except (RuntimeError, AttributeError, AssertionError) as error:
            print(f"rank {rank}: {name}: {type(error).__name__} {error}", flush=True)
    return found


def seconds(act: Callable[[], None]) -> float:
    """Of the device, until it is idle."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def slowest(value: float, device: torch.device) -> float:
    told = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def measure(gather: Gather, arriving: int, device: torch.device, left: Tensor, right: Tensor) -> dict[str, float]:
    stream = torch.cuda.Stream(priority=-1)
    for _ in range(3):
        gather(stream)
    times, host = [], []
    for _ in range(10):
        queued = 0.0

        def act() -> None:
            nonlocal queued
            start = time.perf_counter()
            gather(stream)
            queued = time.perf_counter() - start

        times.append(seconds(act))
        host.append(queued)
    each = slowest(float(np.median(times)), device)

    def products() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(20):
            torch.mm(left, right)
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    products()
    torch.cuda.synchronize()
    dist.barrier()
    alone = products()
    torch.cuda.synchronize()
    dist.barrier()
    for _ in range(int(2e-3 * slowest(alone, device) / each) + 2):  # as many on all ranks, or collectives hang
        gather(stream)
    beside = products()
    torch.cuda.synchronize()
    return {
        "ms": 1e3 * each,
        "GB/s": arriving / each / 1e9,
        "host us": 1e6 * float(np.median(host)),
        "products": slowest(beside / alone - 1, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=2))
    group = ExpertGroup.create()
    assert group is not None
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    results = {}
    for size in arguments.size:
        experts, hidden, width = SIZES[size]
        elements = 3 * hidden * width
        arriving = 2 * elements * experts // group.size * (group.size - 1) // group.size
        results[size] = {
            name: measure(gather, arriving, device, left, right)
            for name, gather in ways(group, experts, elements, device).items()
        }
        if group.rank == 0:
            for name, row in results[size].items():
                print(size, name, ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if group.rank == 0 and arguments.out:
        machine = {"device": torch.cuda.get_device_name(), "ranks": group.size, "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, "sizes": results}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
