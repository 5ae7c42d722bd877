"""How long a pass without the host waits for its plan, on one GPU.

    python benchmarks/plan_latency.py --json plan-latency.json

One GPU is one rank of many: the counts of all ranks lie in its memory, as if the others had just written theirs. From
then on the clock of the GPU runs, until the last byte of the rank's plan, loans included, is in the memory of the GPU:
the counts go to the host, a thread plans, its answer comes back. With `busy`, all other cores of the host compute
meanwhile. Every plan is compared, bit for bit, with that of a planner of its own on the same counts.

Counts are drawn anew in every pass: experts of a zipf-like popularity in an order of its own, multinomial over them for
each rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from rich.progress import track

from moeplan.runtime_client.device.exchange import DeviceExchange
from moeplan.runtime_client.device.routes import BORROWED, LENT, LOAN, AnswerShape, Owners, write_answer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.arrays import Int32
from one_gpu import exchange_of_one, process_of_one, write_result_of_one

SPARE, TOKENS, CHOICES, AT_ONCE = 2, 16_384, 8, 20


@triton.jit  # type: ignore[untyped-decorator]
def stamp(times: tl.tensor, at: tl.tensor) -> None:
    """Write the GPU's nanoseconds."""
    tl.store(times + at, tl.extra.cuda.globaltimer().to(tl.int64))


def draw(ranks: int, experts: int, number: int) -> Int32:
    """int32[number, ranks, experts]."""
    rng = np.random.default_rng(0)
    drawn = np.empty((number, ranks, experts), np.int32)
    for counts in drawn:
        popularity = rng.permutation((1 + np.arange(experts)) ** -rng.uniform(0.0, 1.2))
        counts[:] = rng.multinomial(TOKENS * CHOICES, popularity / popularity.sum(), size=ranks)
    return drawn


class Reference:
    """A planner of its own, and what the kernels would read of its plans."""

    def __init__(self, exchange: DeviceExchange) -> None:
        self.exchange = exchange
        options = exchange.options
        self.planner = QuotaPlanner(options, options.devices, dtype=np.int32, quick=True)
        self.owners = Owners.of(options)
        width = max(options.experts, options.devices)
        self.scratch = np.zeros((4, width), np.int64), np.zeros((3, exchange.mailbox.shape.slots), np.int64)

    def answer(self, counts: Int32) -> Int32:
        """int32[words]."""
        shape, owners, plan = self.exchange.mailbox.shape, self.owners, self.planner.plan(counts)
        answer = np.zeros(shape.words, np.int32)
        write_answer(
            answer, shape.places(), self.exchange.mailbox.planning.numbering, plan.replicas, plan.expert,
            plan.device, plan.home_quota, np.ascontiguousarray(plan.sent.T), plan.kept,
            owners.home, owners.row, owners.order, owners.first, *self.scratch,
        )  # fmt: skip
        return answer


def read_by_kernels(answer: Int32, shape: AnswerShape) -> list[slice]:
    """The parts of an answer that its plan fills."""
    replicas, borrowed = int(answer[shape.first + shape.experts]), int(answer[BORROWED])
    return [
        slice(shape.begin + replicas),
        slice(shape.target, shape.target + replicas),
        slice(shape.home_ends, shape.shared + borrowed + 1),
        slice(shape.loans, shape.loans + LOAN * int(answer[LENT])),
        slice(shape.sharers, shape.sharers + 2 * int(answer[shape.shared + borrowed])),
        slice(shape.owners, shape.owners + 2 * borrowed),
        slice(shape.fills, shape.words),
    ]


def measure(ranks: int, experts: int, number: int, busy: bool, device: torch.device) -> dict[str, Any]:
    """One row."""
    planner = QuotaPlanner(SpillOptions.uniform(experts, ranks, SPARE), ranks)
    exchange = exchange_of_one(
        ranks // 2, ranks, planner, ExpertShape(64, 64), device, max_tokens=TOKENS, choices=CHOICES,
        capacity=2 * TOKENS * CHOICES,
    )  # fmt: skip
    shape, counts = exchange.mailbox.shape, draw(ranks, experts, number)
    tables = torch.zeros(AT_ONCE, *exchange.table.shape, dtype=torch.int32, device=device)
    answers = torch.zeros(AT_ONCE, shape.words, dtype=torch.int32, device=device)
    times = torch.zeros(AT_ONCE, 2, dtype=torch.int64, device=device)
    reference, equal = Reference(exchange), 0
    waited: list[float] = []
    planned: list[float] = []
    with all_cores_busy(busy):
        for first in track(range(0, number, AT_ONCE), f"{ranks} ranks, other cores {'busy' if busy else 'idle'}"):
            now = counts[first : first + AT_ONCE]
            tables[: len(now), :, :experts] = torch.from_numpy(now).to(device)
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # all is launched before the first begins
            for nth in range(len(now)):
                exchange.table.copy_(tables[nth])
                stamp[(1,)](times.view(-1), 2 * nth)
                exchange._launches.plan(
                    (1, 1, 1), *exchange._signals, exchange.table, answers[nth], exchange.mailbox.words,
                    exchange.mailbox.table, exchange.mailbox.answer, 0,
                )  # fmt: skip
                stamp[(1,)](times.view(-1), 2 * nth + 1)
            torch.cuda.synchronize()
            exchange.check()
            if first:  # the first compiles
                waited += (times[: len(now)].diff(dim=1).flatten() / 1e3).tolist()
            for own, theirs in zip(now, answers.cpu().numpy(), strict=False):
                begin = perf_counter()
                expected = reference.answer(own)
                planned.append(1e6 * (perf_counter() - begin))
                equal += all((expected[part] == theirs[part]).all() for part in read_by_kernels(expected, shape))
    exchange.mailbox.close()
    return {
        "ranks": ranks,
        "experts": experts,
        "other_cores": "busy" if busy else "idle",
        "median_us": float(np.median(waited)),
        "p99_us": float(np.quantile(waited, 0.99)),
        "planning_us": float(np.median(planned)),
        "plans": number,
        "bit_equal": equal,
    }


@contextmanager
def all_cores_busy(busy: bool) -> Iterator[None]:
    """A process that computes on every core but two."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_compute, daemon=True) for _ in range(busy * (len(os.sched_getaffinity(0)) - 2))]
    for each in others:
        each.start()
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.join()


def _compute() -> None:
    numbers = np.random.default_rng(0).random(100_000)
    while True:
        numbers = np.sqrt(numbers + 1.0)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--plans", type=int, default=10_000, help="of each row with idle cores; a fifth with busy ones")
    parser.add_argument("--commit", help="name of this checkout, where git cannot tell")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with process_of_one() as device:
        for ranks in options.ranks:
            for busy in (False, True):
                number = options.plans // (5 if busy else 1)
                rows.append(measure(ranks, options.experts, number, busy, device))
                print(rows[-1], flush=True)
    if options.json:
        write_result_of_one(options.json, rows, options.commit, cores=os.cpu_count())


if __name__ == "__main__":
    main()
