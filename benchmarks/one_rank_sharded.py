"""Fully sharded experts of one rank of two on one GPU, beside resident ones in the same layout: what sharding costs.

    python benchmarks/one_rank_sharded.py --size fine large gpt-oss --json one-rank-sharded.json

A forward and a backward pass of the example's model under even loads, with the host ahead of the device; and how long
the host takes to launch them, with the backward pass in this thread and in autograd's own. The other rank is made up
as in `one_rank.py`: it is at every meeting, and its memory is this rank's, so the numbers of results mean nothing. What
travels is copied within the GPU, by its processors, where copies over a link would not take them: with gradients that
are not sent ("sharded, unsent") it is a little less than what sharding costs, with them a little more. `training.py`
measures it on several GPUs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn

from moe_layer_gpu import ROOM
from moeplan.runtime_client.device.exchange import DeviceExchange, SlotsOfLayouts
from moeplan.runtime_client.device.memory import SymmetricMemory
from moeplan.runtime_client.device.shard_memory import ShardMemory
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.solvers import QuotaPlanner, SpillOptions
from one_gpu import exchange_of_one, memory_of_one, process_of_one, write_result_of_one

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from moe_lm import SIZES, Experts, Model, Size

RANKS, WARM = 2, 3
TURNS = 4
"""How often kinds of experts take turns in launching some steps."""

AHEAD = 120_000_000
"""Cycles that the device sleeps while the host launches a step."""


class Unsent(ShardMemory):
    """Gradients stay where they are; what is added up is what was in the rooms before."""

    def _sending(self, *_: object) -> Any:
        return _Nothing()


class _Nothing:
    def start(self, _: object) -> None:
        pass


class Even(nn.Module):
    """A router that gives all experts as many tokens."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        pairs = torch.arange(size.tokens * size.choices, device=device) % size.experts
        self.index = pairs.view(size.tokens, size.choices)
        self.weight = torch.full(self.index.shape, 1 / size.choices, device=device)

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [tokens, choices] and experts int64[tokens, choices]."""
        return self.weight, self.index


class Rank:
    """Rank 0 of two, with one model for each kind of experts."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        group = ExpertGroup(0, RANKS, dist.group.WORLD, dist.group.WORLD)
        planner = QuotaPlanner(SpillOptions.uniform(size.experts, RANKS, 0), RANKS)
        self.exchanges = [self.exchange(planner), self.exchange(SlotsOfLayouts(size.experts, size.experts // RANKS))]
        by_planner, by_layout = self.exchanges

        def sharded(kind: type[ShardMemory]) -> list[FullyShardedExperts]:
            memory = kind(
                group, size.shape.elements, size.experts, slots=size.experts // RANKS, device=device,
                memory=self.memory,
            )  # fmt: skip
            for line in (memory._gathering, memory._returning):
                line._signals[1].fill_(2**62)
            layers = [
                FullyShardedExperts(
                    size.shape, size.experts, group, memory=memory, exchange=by_layout, reshard=False, device=device
                )
                for _ in range(size.blocks)
            ]
            chain(layers)
            return layers

        resident = [
            ResidentExperts(size.shape, size.experts, group, planner=planner, exchange=by_planner, device=device)
            for _ in range(size.blocks)
        ]
        self.layers: dict[str, Sequence[Experts]] = {
            "resident": resident,
            "sharded": sharded(ShardMemory),
            "sharded, unsent": sharded(Unsent),
        }
        for layer in (each for layers in self.layers.values() for each in layers):
            (weights,) = layer.parameters()
            nn.init.normal_(weights, std=size.hidden**-0.5)
        self.model = Model(size, resident).to(device)
        for block in self.model.blocks:
            block.router = Even(size, device)
        self.text = torch.randint(256, (size.batch, size.sequence + 1), device=device)

    def memory(self, group: dist.ProcessGroup, size: int, device: torch.device) -> SymmetricMemory:
        """This rank's memory in place of both's, with numbers in it like weights behind the meetings."""
        memory = memory_of_one(size, device, RANKS)
        memory.own[1024 : size // 2 * 2].view(torch.bfloat16).normal_(std=self.size.hidden**-0.5)
        return memory

    def exchange(self, planner: QuotaPlanner | SlotsOfLayouts) -> DeviceExchange:
        size = self.size

        def differ(row: Tensor) -> None:
            """The other rank tells what this one does, but that it holds the same experts."""
            row[size.experts + 5] += 1

        return exchange_of_one(
            0, RANKS, planner, size.shape, self.device, max_tokens=size.tokens, choices=size.choices,
            capacity=int(ROOM * size.tokens * size.choices), differ=differ,
        )  # fmt: skip

    def use(self, kind: str) -> None:
        """Have the model use experts of a kind."""
        for block, experts in zip(self.model.blocks, self.layers[kind], strict=True):
            block.experts = experts

    def forward(self) -> Tensor:
        if isinstance(first := self.model.blocks[0].experts, FullyShardedExperts):
            with torch.autocast("cuda", torch.bfloat16):
                first.prefetch()
        loss: Tensor = self.model(self.text)
        return loss

    def end_step(self) -> None:
        torch.cuda.synchronize()
        for exchange in self.exchanges:
            exchange.check()
        self.model.zero_grad()

    def time_of_device(self, kind: str) -> tuple[float, float]:
        """Milliseconds of the forward pass and of the backward pass."""
        self.use(kind)
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(AHEAD)
        begin.record()
        loss = self.forward()
        middle.record()
        loss.backward()
        end.record()
        self.end_step()
        return begin.elapsed_time(middle), middle.elapsed_time(end)

    def time_of_host(self, kind: str, *, own_thread: bool) -> float:
        """Milliseconds until both passes are launched, the backward pass by autograd's own thread or by this one."""
        self.use(kind)
        begin = perf_counter()
        loss = self.forward()
        with torch.autograd.set_multithreading_enabled(own_thread):
            loss.backward()
        launched = perf_counter()
        self.end_step()
        return 1e3 * (launched - begin)

    def measure(self, steps: int) -> list[dict[str, Any]]:
        """A row for each kind of experts, which take turns."""
        device: dict[str, list[tuple[float, float]]] = {kind: [] for kind in self.layers}
        for _ in range(WARM + steps):
            for kind, taken in device.items():
                taken.append(self.time_of_device(kind))
        host: dict[tuple[str, bool], list[float]] = {}
        for turn in range(TURNS):
            for kind in self.layers:
                for own_thread in (turn % 2 == 0, turn % 2 == 1):
                    # The first begins with memory as another kind has left it.
                    taken_here = [self.time_of_host(kind, own_thread=own_thread) for _ in range(1 + steps // 2)]
                    host.setdefault((kind, own_thread), []).extend(taken_here[1:])
        rows = []
        for kind, taken in device.items():
            forward, backward = (statistics.median(each) for each in zip(*taken[WARM:], strict=True))
            row = {"experts": kind, "forward_ms": forward, "backward_ms": backward}
            row |= {"both_ms": statistics.median(map(sum, taken[WARM:]))}
            row |= {"host_ms": statistics.median(host[kind, False])}
            rows.append(row | {"host_own_thread_ms": statistics.median(host[kind, True])})
        for row in rows:
            row["of_resident"] = row["both_ms"] / rows[0]["both_ms"]
        return rows


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["fine"])
    parser.add_argument("--steps", type=int, default=10, help="of each kind of experts, after some that do not count")
    parser.add_argument("--commit", help="name of this checkout, where git cannot tell")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with process_of_one() as device:
        for name in track(given.size, "sizes"):
            rank = Rank(SIZES[name], device)
            for row in rank.measure(given.steps):
                rows.append({"size": name, **row})
                print(rows[-1], flush=True)
            for exchange in rank.exchanges:
                exchange.mailbox.close()
            del rank  # its memory, before the next has its own
    if given.json:
        write_result_of_one(given.json, rows, given.commit)


if __name__ == "__main__":
    main()
