"""Choosing the kind of experts for each block: a rehearsal on the first text, and what a token and a byte take here."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm import Model, Size, batches, compute_dtype, load_random, planned_slots, resident_layers, spill_options
from moeplan.runtime_client import ExpertGroup
from moeplan.solvers import Cluster, Demand, ExpertSpec, KindChoice, Link, QuotaPlanner, SpillOptions, choose_kind

REHEARSED = 2
"""Batches."""

ROWS, BYTES = 2_048, 2**23
"""Tokens that one expert is timed on, and bytes of an exchange."""


def choose_kinds(size: Size, group: ExpertGroup, device: torch.device) -> list[KindChoice]:
    """A decision for each block, the same on all ranks, which call it together."""
    seconds_per_token, bytes_per_s = time_token(size, device), time_exchange(group, device)
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    itemsize = compute_dtype(device).itemsize
    memory = None
    if device.type == "cuda":
        memory = int(-slowest(-torch.cuda.mem_get_info(device)[0], device)) // size.blocks
    cluster = Cluster.uniform(
        group.size, 0, nodes=hosts, memory_bytes=memory, intra_node=Link(bytes_per_s), inter_node=Link(bytes_per_s)
    )
    expert = ExpertSpec(
        weight_bytes=size.shape.elements * itemsize,
        state_bytes=size.shape.elements * 4 * 4,  # in float32: weights, gradient, two moments
        token_bytes=size.hidden * itemsize,
        activation_bytes=(4 * size.hidden + 3 * size.width) * itemsize,
        seconds_per_token=seconds_per_token,
    )
    slots = planned_slots(size, group.size)
    spare = int(spill_options(size, group.size).spare[0])
    counts = rehearse(size, group, device)
    return [
        choose_kind(Demand.of(counts[:, block]), cluster, expert, slots=slots, spill_slots=spare)
        for block in range(size.blocks)
    ]


def rehearse(size: Size, group: ExpertGroup, device: torch.device) -> npt.NDArray[np.int64]:
    """int64[batches, blocks, ranks, experts]: what the first weights route."""
    torch.manual_seed(0)
    none = SpillOptions.uniform(size.experts, group.size, 0)
    dtype = compute_dtype(device)
    layers = resident_layers(size, group, device, lambda: QuotaPlanner(none, group.size), dtype)
    load_random(size, layers, device)
    model = Model(size, layers).to(device)
    chosen: list[Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    with torch.no_grad():
        for text in itertools.islice(batches(size, group.rank, group.size, REHEARSED), REHEARSED):
            model(text.to(device))
    mine = torch.stack([torch.bincount(index.flatten(), minlength=size.experts) for index in chosen]).cpu()
    every = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(every, mine)
    table: npt.NDArray[np.int64] = torch.stack(every, dim=1).unflatten(0, (REHEARSED, size.blocks)).numpy()
    return table


def time_token(size: Size, device: torch.device) -> float:
    """Seconds that an expert's products take of a token, in a forward pass, on the slowest rank."""
    dtype = compute_dtype(device)
    rows = torch.randn(ROWS, size.hidden, device=device, dtype=dtype)
    inner = torch.randn(size.hidden, 2 * size.width, device=device, dtype=dtype)
    outer = torch.randn(size.width, size.hidden, device=device, dtype=dtype)
    return slowest(median_s(lambda: (rows @ inner)[:, : size.width] @ outer, device), device) / ROWS


def time_exchange(group: ExpertGroup, device: torch.device) -> float:
    """Bytes per second that each rank sends while all do."""
    sent = torch.zeros(BYTES, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    away = BYTES * (group.size - 1) // group.size
    seconds = slowest(median_s(lambda: dist.all_to_all_single(received, sent), device), device)
    return away / seconds if away else float("inf")


def median_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, once it is warm."""
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def slowest(value: float, device: torch.device) -> float:
    """The largest of all ranks' values, the same everywhere."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)
