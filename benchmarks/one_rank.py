"""A layer of one rank of two on one GPU: what its passes without the host take by themselves.

    python benchmarks/one_rank.py --layer gpt-oss-120b --rank 0 1 --json one-rank.json

Rank 0 has the hot experts and lends, rank 1 borrows. The other of both is made up: its counts are drawn as this one's,
and its memory is this rank's, so what would travel over a link travels through the GPU's own memory, and nobody is
waited for. The numbers of its results mean nothing. What remains is the time of this rank's kernels, with the host
ahead of them, loans included: to see what a change of them does where there is one GPU. `moe_layer_gpu.py` measures
layers on several. With `--slow`, lent experts lie in the memory of the host, over a link that takes about seven times
as long as NVLink: to see how much of their way is hidden.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from moe_layer_gpu import LOADS, ROOM, SIZES, Load, Size
from moeplan.runtime_client.device.mailbox import Turn
from moeplan.runtime_client.device.passes import run_pass
from moeplan.runtime_client.device.routes import BORROWED, LENT
from moeplan.solvers import QuotaPlanner, SpillOptions
from one_gpu import exchange_of_one, process_of_one, write_result_of_one

RANKS, WARM = 2, 4
AHEAD = 30_000_000
"""Cycles that the device sleeps while the host launches a step."""


class Rank:
    """One of both ranks."""

    def __init__(self, size: Size, device: torch.device, rank: int, *, slow: bool) -> None:
        self.size, self.device, self.rank, self.passes = size, device, rank, 0
        spare = max(size.experts // RANKS // 4, 2)
        planner = QuotaPlanner(SpillOptions.uniform(size.experts, RANKS, spare), RANKS)
        self.exchange = exchange_of_one(
            rank, RANKS, planner, size.shape, device, max_tokens=size.tokens, choices=size.choices,
            capacity=int(ROOM * size.tokens * size.choices), differ=self.tell,
        )  # fmt: skip
        if slow:
            self.exchange.offered = torch.zeros_like(self.exchange.offered, device="cpu", pin_memory=True)
        self.others = torch.zeros(size.experts, dtype=torch.int32, device=device)
        random = torch.Generator(device).manual_seed(0)
        flat = torch.randn(size.experts // RANKS, size.shape.elements, generator=random, device=device)
        self.experts = (flat / size.hidden**0.5).requires_grad_()
        self.hidden = torch.randn(size.tokens, size.hidden, generator=random, device=device).bfloat16().requires_grad_()

    def tell(self, row: Tensor) -> None:
        """The other rank has counts of its own, and otherwise tells what this one does."""
        row[: self.size.experts].copy_(self.others)

    def step(self, index: Tensor, weight: Tensor) -> tuple[float, float]:
        """Milliseconds of a forward pass and of its backward."""
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.passes += 1
        turn = Turn(0, self.passes, lambda _: None, "layer 0")
        torch.cuda._sleep(AHEAD)
        begin.record()
        output = run_pass(self.exchange, turn, [self.experts], self.hidden, index, weight, torch.bfloat16)
        middle.record()
        output.backward(torch.ones_like(output))
        end.record()
        torch.cuda.synchronize()
        self.exchange.check()
        for leaf in (self.experts, self.hidden, weight):
            leaf.grad = None
        return begin.elapsed_time(middle), middle.elapsed_time(end)

    def measure(self, load: Load, steps: int) -> dict[str, Any]:
        """One row."""
        size = self.size
        index, others = (load.draw(size, rank, RANKS, 0).to(self.device) for rank in (self.rank, 1 - self.rank))
        self.others.copy_(others.flatten().bincount(minlength=size.experts))
        weight = torch.full(index.shape, 1 / size.choices, device=self.device).requires_grad_()
        times = [self.step(index, weight) for _ in range(WARM + steps)][WARM:]
        forward, backward = (statistics.median(taken) for taken in zip(*times, strict=True))
        return {
            "load": load.name,
            "forward_ms": forward,
            "backward_ms": backward,
            "lent": int(self.exchange.mailbox.answer[LENT]),
            "borrowed": int(self.exchange.mailbox.answer[BORROWED]),
        }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="+", choices=SIZES, default=["gpt-oss-120b"])
    parser.add_argument("--rank", nargs="+", type=int, choices=range(RANKS), default=[0], help="which of both it is")
    parser.add_argument("--slow", action="store_true", help="lent experts come from the memory of the host")
    parser.add_argument("--steps", type=int, default=10, help="of each load, after some that do not count")
    parser.add_argument("--commit", help="name of this checkout, where git cannot tell")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with process_of_one() as device:
        for name, which in product(given.layer, given.rank):
            rank = Rank(SIZES[name], device, which, slow=given.slow)
            for load in track(LOADS, f"{name}, rank {which}, loads"):
                rows.append({"layer": name, "rank": which, **rank.measure(load, given.steps)})
                print(rows[-1], flush=True)
            rank.exchange.mailbox.close()
            del rank  # its memory, before the next has its own
    if given.json:
        write_result_of_one(given.json, rows, given.commit)


if __name__ == "__main__":
    main()
