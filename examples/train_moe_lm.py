"""Train a small Mixture-of-Experts language model on bytes, with static expert parallelism or with moeplan.

    torchrun --nproc-per-node 2 examples/train_moe_lm.py --mode static
    moeplan serve &
    torchrun --nproc-per-node 2 examples/train_moe_lm.py --mode planned --planner 127.0.0.1:7433
    torchrun --nproc-per-node 2 examples/train_moe_lm.py --mode both --planner 127.0.0.1:7433
    torchrun --nproc-per-node 4 examples/train_moe_lm.py --mode spill
    torchrun --nproc-per-node 8 examples/train_moe_lm.py --mode spill --size large    # on eight GPUs
    torchrun --nproc-per-node 8 examples/train_moe_lm.py --mode auto --size large --planner 127.0.0.1:7433

The text is what every Python has: the sources of its standard library, and its documentation. The kind of text changes
every `--shift` steps, and with it the experts that are busy. No loss balances them.

``static`` is plain expert parallelism: each expert at home on one rank. ``spill`` lends experts to idle ranks, planned
in each pass from exact counts. On GPUs of one NVLink domain both run their passes without the host. ``planned`` shards
every expert over the ranks, and a planner's daemon decides which rank computes which; without a daemon it trains all
the same. On such GPUs experts are gathered by copy engines. ``both`` lends beyond its layouts, in each pass, what they
did not foresee. ``auto`` rehearses two batches, times a token and a byte, and has the cost model decide for each block
whether its experts are resident and lent, sharded, or both; it says why on standard error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from choosing import choose_kinds
from moe_lm import (
    SIZES,
    Experts,
    Model,
    Size,
    backward,
    batches,
    compute_dtype,
    device_loads,
    load_random,
    planned_slots,
    resident_layers,
    sharded_layers,
    spill_options,
)
from moeplan.api import Forecast, Replan
from moeplan.runtime_client import (
    AgreementError,
    DeviceExchange,
    ExpertGroup,
    FullyShardedExperts,
    PlannedLayer,
    PlannerSession,
    ShardMemory,
    SlotsOfLayouts,
    measure_transfer,
    record,
)
from moeplan.solvers import QuotaPlanner, SolveParameters, SpillOptions

KINDS = {"planned": "sharded", "both": "both"}
"""Kind of the experts of all blocks, by mode; others are resident."""


def make_layers(mode: str, size: Size, group: ExpertGroup, device: torch.device) -> list[Experts]:
    """The experts of each block, with the same weights in every mode and on any number of ranks."""
    dtype = compute_dtype(device)
    layers: list[Experts] = []
    kinds: list[str] = [KINDS.get(mode, "resident")] * size.blocks
    options = SpillOptions.uniform(size.experts, group.size, 0) if mode == "static" else spill_options(size, group.size)
    lends, lends_beyond = options, options
    if mode == "auto":
        choices = choose_kinds(size, group, device)
        kinds = [choice.kind for choice in choices]
        for block, choice in enumerate(choices if group.rank == 0 else ()):
            print(f"block {block}: {choice.reason}", file=sys.stderr)
        if device.type == "cuda" and "both" in kinds:  # the model does not know what NCCL costs the host
            kinds = ["sharded" if kind == "both" else kind for kind in kinds]
            if group.rank == 0:
                print("sharded in place of both: passes without the host do not lend beyond layouts", file=sys.stderr)
        # What a replica must be lent for depends on links and experts, which are those of all blocks.
        lends = replace(options, min_tokens=choices[0].resident.min_tokens)
        lends_beyond = replace(options, min_tokens=choices[0].both.min_tokens)
    count = size.blocks - kinds.count("resident")
    planner = QuotaPlanner(options, group.size)
    exchange = device_exchange(size, group, device, planner) if count < size.blocks else None
    spare = int(lends_beyond.spare[0]) if "both" in kinds else 0
    memory = shard_memory(size, group, device, spare) if count else None
    dividing = None
    if memory is not None and "both" not in kinds:  # what is lent beyond a layout needs the host
        dividing = device_exchange(size, group, device, SlotsOfLayouts(size.experts, planned_slots(size, group.size)))
    sharded = sharded_layers(replace(size, blocks=count), group, device, dtype, memory=memory, exchange=dividing)
    resident = resident_layers(
        replace(size, blocks=size.blocks - count),
        group,
        device,
        lambda: QuotaPlanner(lends, group.size),
        dtype,
        exchange=exchange,
    )
    for kind in kinds:
        layers.append(resident.pop(0) if kind == "resident" else sharded.pop(0))
        if kind == "both":
            layers[-1].planner = QuotaPlanner(lends_beyond, group.size)
    load_random(size, layers, device)
    return layers


def device_exchange(
    size: Size, group: ExpertGroup, device: torch.device, planner: QuotaPlanner | SlotsOfLayouts
) -> DeviceExchange | None:
    """Passes without the host, on GPUs that can; experts are lent where that earns their transfer."""
    if device.type == "cpu" or group.size == 1:
        return None
    try:
        exchange = DeviceExchange(
            group, planner, size.shape, max_tokens=size.tokens, choices=size.choices, device=device
        )
    except RuntimeError as error:
        if group.rank == 0:
            print(f"tokens and lent experts travel by NCCL: {error}", file=sys.stderr)
        return None
    if exchange.spare:
        exchange.charge(measure_transfer(exchange))
    return exchange


def shard_memory(size: Size, group: ExpertGroup, device: torch.device, spare: int) -> ShardMemory | None:
    """Gathers by copy engines, on GPUs that can, with room for so many loans."""
    if device.type == "cpu" or group.size == 1:
        return None
    slots = planned_slots(size, group.size) + spare
    try:
        return ShardMemory(
            group, size.shape.elements, size.experts, slots=slots, device=device, dtype=compute_dtype(device)
        )
    except RuntimeError as error:
        if group.rank == 0:
            print(f"sharded experts travel by NCCL: {error}", file=sys.stderr)
        return None


def main() -> None:
    """Train; the first rank writes one line of JSON per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mode", choices=("static", "spill", "planned", "both", "auto"), default="static")
    parser.add_argument("--planner", help="address of the daemon, for sharded experts")
    parser.add_argument("--job", default="train-moe-lm", help="id of the job at the daemon")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--shift", type=int, default=20, help="steps of one kind of text")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--experts", type=int, help="experts of a layer, if not the size's own")
    parser.add_argument("--trace", type=Path, help="file for the routing of all steps, for `moeplan view`")
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if enough else "cpu")
    parser.add_argument("--out", type=Path, help="file for the lines; standard output by default")
    arguments = parser.parse_args()

    size = SIZES[arguments.size]
    size = replace(size, experts=arguments.experts or size.experts)
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=2))
    group = ExpertGroup.create()
    assert group is not None
    layers = make_layers(arguments.mode, size, group, device)
    torch.manual_seed(0)  # after a rehearsal, which draws numbers too
    model = Model(size, layers).to(device)
    shared = model.shared()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, fused=device.type == "cuda")
    sharded = [layer for layer in layers if isinstance(layer, FullyShardedExperts)]
    planned = [block for block, layer in enumerate(layers) if layer in sharded]
    session = connect(arguments, size, sharded, group) if sharded and arguments.planner else None
    recorder = record(model)
    text = batches(size, group.rank, group.size, arguments.shift)
    routed = []
    lines = arguments.out.open("w") if arguments.out and group.rank == 0 else sys.stdout
    try:
        for step in range(arguments.steps):
            start = time.perf_counter()
            for first in sharded[:1]:
                first.prefetch()  # its weights arrive beside what comes before it
            loss = model(next(text).to(device))
            backward(loss, shared, group)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
                check(layers)
            seconds = time.perf_counter() - start
            recorder.step()
            counts = recorder.finish()
            assert counts is not None
            everyone = [torch.empty(counts.shape, dtype=torch.int64) for _ in range(group.size)]
            dist.all_gather(everyone, torch.from_numpy(counts))
            table = torch.stack(everyone, dim=1).numpy()
            routed.append(table)
            loads = [device_loads(layer, counts) for layer, counts in zip(layers, table, strict=True)]
            mean_loss = loss.detach() / group.size
            dist.all_reduce(mean_loss)
            if group.rank == 0:
                line = {
                    "step": step,
                    "loss": float(mean_loss),
                    "seconds": seconds,
                    "tokens_per_second": group.size * size.tokens / seconds,
                    "imbalance": float(np.mean([load.max() / load.mean() for load in loads])),
                    "version": 0 if session is None else session.version,
                }
                print(json.dumps(line), file=lines, flush=True)
            if session is not None:
                session.step(counts[planned])
        if session is not None:
            session.close()
        if arguments.trace and group.rank == 0:
            np.savez_compressed(arguments.trace, counts=np.stack(routed))
    except AgreementError as error:
        print(f"rank {group.rank}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        recorder.close()
    dist.destroy_process_group()


def check(layers: Sequence[Experts]) -> None:
    """Raise what went wrong on GPUs without the host seeing it; the next pass would, too."""
    memories = {layer.memory for layer in layers if isinstance(layer, FullyShardedExperts)}
    for shared in {layer.exchange for layer in layers} | memories:
        if shared is not None:
            shared.check()


def connect(
    arguments: argparse.Namespace, size: Size, sharded: Sequence[FullyShardedExperts], group: ExpertGroup
) -> PlannerSession:
    """A session with the daemon: new layouts from the last steps whenever they are better, as moving is free."""

    def apply(plan: Sequence[PlannedLayer]) -> None:
        for layer, planned in zip(sharded, plan, strict=True):
            layer.plan = planned

    # Few candidates and a look at every fifth step: here the daemon has no cores of its own.
    return PlannerSession(
        arguments.planner,
        arguments.job,
        [layer.layout for layer in sharded],
        apply,
        slots=planned_slots(size, group.size),
        parameters=SolveParameters(work_limit=500),
        forecast=Forecast(window_steps=4),
        replan=Replan(every_steps=5),
        timeout=timedelta(minutes=2),
    )


if __name__ == "__main__":
    main()
    # Layers refer to each other and to their process groups, whose threads must end before the interpreter does: one
    # that lets go of a tensor after that aborts the process.
    gc.collect()
