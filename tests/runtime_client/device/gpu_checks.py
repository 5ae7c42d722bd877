"""Passes without the host, and copies of sharded experts, on real GPUs, against the same layers on NCCL. One process
for each GPU:

torchrun --nproc-per-node 2 tests/runtime_client/device/gpu_checks.py

Where there are fewer GPUs than processes they share one, on gloo instead of NCCL, which is slower and no less exact.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.device.break_even import measure_transfer
from moeplan.runtime_client.device.exchange import DeviceExchange, SlotsOfLayouts
from moeplan.runtime_client.device.shard_memory import ShardMemory
from moeplan.runtime_client.errors import LayoutMismatchError, MissedPassError, PassError, RouterError
from moeplan.runtime_client.group import ExpertGroup, switched_to
from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.models.gradients import ExpertGradients, expert_parameters
from moeplan.runtime_client.models.optimizers import watch_optimizers
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.errors import InfeasibleError
from moeplan.solvers.problem.layout import Layout

SHAPE, EXPERTS, CHOICES, TOKENS = ExpertShape(256, 384), 12, 2, 1000
ROUNDING = 2**-8  # of bfloat16
L = TypeVar("L", bound=ExpertLayer)


@dataclass(frozen=True)
class Ranks:
    """This rank, and what all make their layers of."""

    group: ExpertGroup
    device: torch.device

    def layers(
        self, *, dtype: torch.dtype = torch.float32, spare: int = 2, count: int = 1, **limits: object
    ) -> tuple[list[ResidentExperts], list[ResidentExperts], DeviceExchange]:
        """Layers on NCCL, and without the host, with equal weights."""
        group = self.group
        planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, spare), group.size)
        arguments = {"max_tokens": TOKENS, "choices": CHOICES, "device": self.device, "weights": dtype} | limits
        exchange = DeviceExchange(group, planner, SHAPE, **arguments)  # type: ignore[arg-type]

        def layer(own: DeviceExchange | None) -> ResidentExperts:
            return ResidentExperts(
                SHAPE, EXPERTS, group, planner=planner, exchange=own, compute_dtype=torch.bfloat16, dtype=dtype,
                device=self.device,
            )  # fmt: skip

        nccl, own = (self.load([layer(shared) for _ in range(count)]) for shared in (None, exchange))
        return nccl, own, exchange

    def load(self, layers: list[L]) -> list[L]:
        """The layers, with the same experts for those of the same number."""
        for number, layer in enumerate(layers):
            random = torch.Generator(self.device).manual_seed(number)
            flat = torch.randn(EXPERTS, SHAPE.elements, generator=random, device=self.device)
            layer.load_experts(0, flat / SHAPE.hidden**0.5)
        return layers

    def sharded(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        reshard: bool = True,
        count: int = 3,
        exchange: DeviceExchange | None = None,
        **limits: object,
    ) -> tuple[list[FullyShardedExperts], list[FullyShardedExperts], ShardMemory]:
        """Layers on NCCL, and by copy engines, whose passes may run by an exchange, with equal weights."""
        group = self.group
        arguments = {"slots": EXPERTS, "device": self.device} | limits
        memory = ShardMemory(group, SHAPE.elements, EXPERTS, **arguments)  # type: ignore[arg-type]

        def layer(own: ShardMemory | None) -> FullyShardedExperts:
            return FullyShardedExperts(
                SHAPE, EXPERTS, group, memory=own, exchange=exchange if own else None, reshard=reshard,
                compute_dtype=torch.bfloat16, dtype=dtype, device=self.device,
            )  # fmt: skip

        nccl, own = (self.load([layer(shared) for _ in range(count)]) for shared in (None, memory))
        chain(nccl)
        chain(own)
        return nccl, own, memory

    def sharded_by_device(
        self, *, reshard: bool = True, count: int = 3
    ) -> tuple[list[FullyShardedExperts], list[FullyShardedExperts], DeviceExchange]:
        """Layers on NCCL, and by copy engines without the host, with equal weights."""
        exchange = DeviceExchange(
            self.group, SlotsOfLayouts(EXPERTS, EXPERTS), SHAPE, max_tokens=TOKENS, choices=CHOICES, device=self.device
        )  # fmt: skip
        nccl, own, _ = self.sharded(reshard=reshard, count=count, exchange=exchange)
        return nccl, own, exchange

    def place(self, layers: list[FullyShardedExperts], seed: int) -> None:
        """Give each layer a layout with any number of replicas, and at least one on every rank."""
        rng, devices = np.random.default_rng(seed), self.group.size
        for layer in layers:
            placed = rng.random((devices, EXPERTS)) < rng.choice([0.0, 0.3, 0.8])
            owners = rng.permutation(np.append(np.arange(devices), rng.integers(devices, size=EXPERTS - devices)))
            placed[owners, np.arange(EXPERTS)] = True
            slots = np.full((devices, EXPERTS), -1, np.int32)
            for device, held in enumerate(placed):
                slots[device, : held.sum()] = rng.permutation(np.flatnonzero(held))
            layer.layout = Layout(slots, EXPERTS)

    def exact(self, layers: list[ResidentExperts]) -> list[ResidentExperts]:
        """The same layers in double precision, on NCCL."""
        doubles = []
        for layer in layers:
            double = ResidentExperts(
                SHAPE, EXPERTS, self.group, planner=layer.planner, dtype=torch.float64, device=self.device
            )
            double.flat.data.copy_(layer.flat.data)
            doubles.append(double)
        return doubles

    def batch(self, seed: int, tokens: int = TOKENS, skew: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, choices, weights and a gradient; the larger the skew, the more go to the first experts."""
        random = torch.Generator(self.device).manual_seed(1000 * seed + self.group.rank)
        hidden, gradient = torch.randn(2, tokens, SHAPE.hidden, generator=random, device=self.device).bfloat16()
        weight, place = torch.rand(2, tokens, CHOICES, generator=random, device=self.device)
        return hidden, (place**skew * EXPERTS).long().clamp_(max=EXPERTS - 1), weight.bfloat16(), gradient


def answers(layers: Sequence[ExpertLayer], batch: tuple[Tensor, ...], *, again: bool = False) -> list[Tensor]:
    """Output and gradients of layers one after the other."""
    hidden, index, weight, gradient = batch
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = hidden
    for layer in layers:
        step = (
            layer(output, index, weight) if not again else checkpoint(layer, output, index, weight, use_reentrant=False)
        )
        output = output + step
    output.backward(gradient)
    found = [output.detach(), hidden.grad, weight.grad, *(layer.weights.grad for layer in layers)]
    for layer in layers:
        layer.weights.grad = None
    return [part for part in found if part is not None]


def error(exact: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((exact - found).abs().max() / exact.abs().max().clamp(min=1e-6)) if exact.numel() else 0.0


def compare(exact: list[Tensor], nccl: list[Tensor], own: list[Tensor]) -> tuple[float, float]:
    """Largest errors of both, of which ours may be larger by one rounding to bfloat16."""
    worst = [0.0, 0.0]
    for one, theirs, ours in zip(exact, nccl, own, strict=True):
        errors = error(one, theirs), error(one, ours)
        assert errors[1] <= errors[0] + ROUNDING, errors
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst[0], worst[1]


@dataclass(frozen=True)
class Known:
    """Layers with the same weights in double precision, and on NCCL."""

    exact: Sequence[ExpertLayer]
    nccl: Sequence[ExpertLayer]

    def errors(self, batch: tuple[Tensor, ...], found: list[Tensor]) -> tuple[float, float]:
        """Largest errors of a batch's answers on NCCL, and of those that were found; see `compare`."""
        doubles = tuple(part.double() if part.is_floating_point() else part for part in batch)
        return compare(answers(self.exact, doubles), answers(self.nccl, batch), found)


def largest(errors: list[tuple[float, float]]) -> str:
    theirs, ours = (max(each) for each in zip(*errors, strict=True))
    return f"largest error on NCCL {theirs:.1e}, without the host {ours:.1e}"


def equals_nccl(ranks: Ranks) -> str:
    told = []
    for dtype in (torch.float32, torch.bfloat16):
        for spare in (0, 2):
            nccl, own, exchange = ranks.layers(dtype=dtype, spare=spare)
            known = Known(ranks.exact(nccl), nccl)
            for seed in range(4):
                tokens = (TOKENS, 7, 0)[(seed + ranks.group.rank) % 3]
                batch = ranks.batch(seed, tokens, skew=(1, 3, 10, 1000)[seed])
                told.append(known.errors(batch, answers(own, batch)))
            exchange.check()
            exchange.mailbox.close()
    return largest(told)


def rounds_equal_nccl(ranks: Ranks) -> str:
    told = []
    for dtype in (torch.float32, torch.bfloat16):
        for spare in (0, 2):
            nccl, own, exchange = ranks.layers(dtype=dtype, spare=spare, capacity=704, rounds=4)
            known = Known(ranks.exact(nccl), nccl)
            for seed, tokens in enumerate((TOKENS, 7)):
                batch = ranks.batch(seed, tokens, skew=1.2)
                found = answers(own, batch)
                told.append(known.errors(batch, found))
                for one, other in zip(found, answers(own, batch, again=True), strict=True):
                    assert torch.equal(one, other)
            exchange.check()
            exchange.mailbox.close()
    return f"rows of three rounds and of one: {largest(told)}"


def many_rows_equal_nccl(ranks: Ranks) -> str:
    """Gradients of experts with so many rows that some of their tiles are summed in parts."""
    told = []
    for spare in (0, 2):
        nccl, own, exchange = ranks.layers(spare=spare, max_tokens=9 * TOKENS)
        assert len(exchange.products._sums), "there is room for too few rows"
        known = Known(ranks.exact(nccl), nccl)
        for seed, skew in enumerate((3, 1000)):
            batch = ranks.batch(seed, 9 * TOKENS, skew=skew)
            found = answers(own, batch)
            told.append(known.errors(batch, found))
            for one, other in zip(found, answers(own, batch), strict=True):
                assert torch.equal(one, other)
        exchange.check()
        exchange.mailbox.close()
    return f"{largest(told)}, the same bits each time"


def deterministic(ranks: Ranks) -> str:
    _, own, exchange = ranks.layers(count=3)
    batch = ranks.batch(5)
    first = answers(own, batch)
    for again in (False, True, False):
        for one, other in zip(first, answers(own, batch, again=again), strict=True):
            assert torch.equal(one, other), again
    exchange.check()
    exchange.mailbox.close()
    return "the same bits each time, and under activation checkpointing"


def under_way(ranks: Ranks, layers: Sequence[ExpertLayer]) -> list[Tensor]:
    """Gradients of experts after three micro-batches, sharded ones with layouts of their own, whose passes overlap."""
    outputs = []
    for seed in range(3):
        ranks.place([layer for layer in layers if isinstance(layer, FullyShardedExperts)], seed)
        hidden, index, weight, _ = ranks.batch(seed)
        for layer in layers:
            hidden = hidden + layer(hidden, index, weight)
        outputs.append(hidden)
    for seed in (1, 0, 2):
        outputs[seed].backward(ranks.batch(seed)[3])
    return [part for layer in layers if (part := layer.weights.grad) is not None]


def in_flight(ranks: Ranks) -> str:
    nccl, own, exchange = ranks.layers(count=2)
    worst = max(map(error, under_way(ranks, nccl), under_way(ranks, own)))
    assert worst <= 8 * ROUNDING, worst
    exchange.check()
    exchange.mailbox.close()
    return f"three micro-batches through two layers, gradients added up: {worst:.1e} from those on NCCL"


def host_is_free(ranks: Ranks) -> str:
    _, own, exchange = ranks.layers(count=6)
    told = launched_ahead(ranks, own)
    exchange.check()
    exchange.mailbox.close()
    return told


def launched_ahead(ranks: Ranks, layers: Sequence[ExpertLayer]) -> str:
    batch = ranks.batch(0)
    for _ in range(2):
        answers(layers, batch)
    torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    torch.cuda._sleep(4_000_000_000)  # two seconds
    answers(layers, batch)
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    slept = time.perf_counter() - start
    assert launched < 0.5 * slept, (launched, slept)
    return f"six layers launched in {1e3 * launched:.0f} ms while the device slept {slept:.1f} s"


def rehearse(step: Callable[[], object], times: int) -> None:
    """Run what will be captured some times before, on a stream of its own, as torch asks."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    dist.barrier()


def replays(ranks: Ranks) -> str:
    _, own, exchange = ranks.layers(count=2)
    hidden, index, weight, gradient = ranks.batch(0)
    for _ in range(3):
        answers(own, (hidden, index, weight, gradient))
    for layer in own:
        layer.flat.grad = torch.zeros_like(layer.flat)
    still = hidden.clone().requires_grad_()

    def step() -> Tensor:
        output = still
        for layer in own:
            output = output + layer(output, index, weight)
        output.backward(gradient)
        return output.detach()

    rehearse(step, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for seed in range(1, 6):
        batch = ranks.batch(seed, skew=seed)
        for into, value in zip((still, index, weight, gradient), batch, strict=True):
            into.data.copy_(value)
        still.grad = None if still.grad is None else still.grad.zero_()
        for layer in own:
            assert layer.flat.grad is not None
            layer.flat.grad.zero_()
        graph.replay()
        torch.cuda.synchronize()
        gradients = [layer.flat.grad for layer in own]
        found = [part.clone() for part in (output, *gradients) if part is not None]
        for layer in own:
            layer.flat.grad = None
        expected = answers(own, batch)
        for layer, gradient_of_graph in zip(own, gradients, strict=True):
            layer.flat.grad = gradient_of_graph
        for one, other in zip([expected[0], *expected[3:]], found, strict=True):
            assert torch.equal(one, other), seed
    exchange.check()
    exchange.mailbox.close()
    return "a replayed graph with other routing gives the bits of an eager pass"


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self, experts: ResidentExperts) -> None:
        super().__init__()
        self.router = nn.Linear(SHAPE.hidden, EXPERTS, device=experts.flat.device)
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        weight, index = self.router(hidden).softmax(dim=-1).topk(CHOICES)
        return hidden + self.experts(hidden, index, weight)


def captured_steps_train(ranks: Ranks) -> str:
    """Steps with clipped gradients and an optimizer leave the weights that eager ones do."""
    if dist.get_backend() != "nccl":
        return "skipped: ranks share a GPU, and so are on gloo, whose collectives no graph can hold"
    for eager, replayed in zip(trained(ranks, captured=False), trained(ranks, captured=True), strict=True):
        assert torch.equal(eager, replayed)
    return "the bits of eager training after six replayed steps"


def trained(ranks: Ranks, *, captured: bool) -> list[Tensor]:
    """Weights of a model after some steps."""
    _, own, exchange = ranks.layers(count=2)
    torch.manual_seed(3)
    model = nn.Sequential(*(Block(layer) for layer in own))
    watch_optimizers(own, ())
    experts = set(expert_parameters(model).values())
    shared = [weights for weights in model.parameters() if weights not in experts]
    gradients = ExpertGradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
    hidden = ranks.batch(0)[0].float()

    def step() -> None:
        optimizer.zero_grad()
        model(hidden).square().mean().backward()
        for weights in shared:
            assert weights.grad is not None
            dist.all_reduce(weights.grad.div_(ranks.group.size))
        gradients.clip_grad_norm_(0.1)
        optimizer.step()

    rehearse(step, 3)  # so that a fourth is captured, in which ranks compare their weights where it is not
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    for seed in range(1, 7):
        hidden.copy_(ranks.batch(seed)[0])
        if captured:
            graph.replay()
        else:
            step()
    torch.cuda.synchronize()
    exchange.check()
    if captured:
        said = refusal(ValueError, lambda: exchange.charge(1000))
        assert "a CUDA graph holds passes of this exchange" in said, said
        graph.reset()
    exchange.mailbox.close()
    return [weights.detach().clone() for weights in model.parameters()]


def others_do_not_replay(ranks: Ranks) -> str:
    """Layers whose passes the host takes part in are not captured."""
    (nccl,), _, exchange = ranks.layers()
    hidden, index, weight, _ = ranks.batch(0)
    exchange.mailbox.close()
    nccl(hidden, index, weight)
    torch.cuda.synchronize()
    dist.barrier()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            nccl(hidden, index, weight)

    said = refusal(RuntimeError, capture)
    assert "a CUDA graph cannot hold its passes" in said, said
    return "a layer on NCCL is not captured"


def refusal(kind: type[Exception], act: Callable[[], object]) -> str:
    """What the error of this kind says that an act must raise."""
    try:
        act()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def fails(ranks: Ranks, kind: type[Exception], act: Callable[[ResidentExperts], Tensor], **limits: object) -> str:
    """All ranks get numbers that are none, and the same error."""
    _, own, exchange = ranks.layers(**limits)  # type: ignore[arg-type]
    output = act(own[0])
    torch.cuda.synchronize()
    assert output.isnan().all(), output
    try:
        return refusal(kind, exchange.check)
    finally:
        exchange.mailbox.close()


def bad_router(ranks: Ranks) -> str:
    hidden, index, weight, _ = ranks.batch(0)
    if ranks.group.rank == 1:
        index[3, 0], weight[5, 1] = EXPERTS, float("inf")
    return fails(ranks, RouterError, lambda layer: layer(hidden, index, weight))


def too_many_tokens(ranks: Ranks) -> str:
    hidden, index, weight, _ = ranks.batch(0, TOKENS + 5 * ranks.group.rank)
    return fails(ranks, PassError, lambda layer: layer(hidden, index, weight))


def too_little_room(ranks: Ranks) -> str:
    hidden, index, weight, _ = ranks.batch(0, skew=1000)
    return fails(ranks, InfeasibleError, lambda layer: layer(hidden, index, weight), spare=0, capacity=TOKENS * CHOICES)


def other_layer(ranks: Ranks) -> str:
    _, own, exchange = ranks.layers(count=2)
    hidden, index, weight, _ = ranks.batch(0)
    assert own[ranks.group.rank % 2](hidden, index, weight).isnan().all()
    try:
        return refusal(MissedPassError, exchange.check)
    finally:
        exchange.mailbox.close()


def rank_missing(ranks: Ranks) -> str:
    hidden, index, weight, _ = ranks.batch(0)

    def act(layer: ResidentExperts) -> Tensor:
        if ranks.group.rank == 0:
            return layer(hidden, index, weight)
        time.sleep(2)
        return layer(hidden, index, weight)

    return fails(ranks, MissedPassError, act, time_limit=timedelta(seconds=0.5))


def beside_an_all_reduce(ranks: Ranks) -> str:
    _, own, exchange = ranks.layers(count=2)
    batch = ranks.batch(0)
    expected = answers(own, batch)
    large = torch.ones(2**26, device=ranks.device)
    works = [dist.all_reduce(large, async_op=True) for _ in range(4)]
    found = answers(own, batch)
    for work in works:
        assert work is not None
        work.wait()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    exchange.check()
    exchange.mailbox.close()
    return "the same bits as without"


def streams_nest(ranks: Ranks) -> str:
    """Layers switch to the streams that they share within each other, and in several threads at a time."""
    stream, both_in = torch.cuda.Stream(ranks.device), threading.Barrier(2)

    def enter(_: int) -> None:
        torch.cuda.set_device(ranks.device)
        before = torch.cuda.current_stream()
        with switched_to(stream):
            both_in.wait()
            with switched_to(stream):
                assert torch.cuda.current_stream() == stream
            assert torch.cuda.current_stream() == stream
            both_in.wait()
        assert torch.cuda.current_stream() == before

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(enter, range(2)))
    return "within each other and in two threads"


def loan_has_a_price(ranks: Ranks) -> str:
    _, own, exchange = ranks.layers()
    price = measure_transfer(exchange)
    prices = torch.zeros(ranks.group.size, dtype=torch.float64, device=ranks.device)
    dist.all_gather_into_tensor(prices, torch.tensor([price], dtype=torch.float64, device=ranks.device))
    assert price >= 0
    assert price > 0 or torch.cuda.device_count() < ranks.group.size  # ranks that share a GPU wait for each other
    assert bool((prices == price).all())
    batch = ranks.batch(0, skew=1)  # nearly even
    lent = []
    for cost in (1e-6, TOKENS, 1e-6):
        exchange.charge(cost)
        answers(own, batch)
        torch.cuda.synchronize()
        lent.append(int(exchange.mailbox.answer[2:4].sum()))
    assert lent[0] > 0
    assert lent[1:] == [0, lent[0]]
    exchange.check()
    exchange.mailbox.close()
    return f"a loan costs {price:.0f} tokens; nearly even loads lend {lent[0]} experts for nothing, none for its price"


def copies_equal_nccl(ranks: Ranks) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        for reshard in (True, False):
            nccl, own, memory = ranks.sharded(dtype=dtype, reshard=reshard)
            optimizers = [torch.optim.SGD([layer.shard for layer in layers], lr=1e-6) for layers in (nccl, own)]
            for seed in range(6):
                found = []
                for layers, optimizer in zip((nccl, own), optimizers, strict=True):
                    ranks.place(layers, seed)
                    batch = ranks.batch(seed, (TOKENS, 7, 0)[(seed + ranks.group.rank) % 3], skew=1 + seed)
                    found.append(answers(layers, batch, again=seed % 3 == 2 and layers is own))
                    for layer, gradient in zip(layers, found[-1][-len(layers) :], strict=True):
                        layer.shard.grad = gradient
                    optimizer.step()
                    optimizer.zero_grad()
                for one, other in zip(*found, strict=True):
                    assert one.isfinite().all(), (dtype, reshard, seed)
                    assert torch.equal(one, other), (dtype, reshard, seed, error(one, other))
            memory.check()
    return "steps with other weights and layouts each, recomputed or not: the bits of NCCL"


def copies_lend(ranks: Ranks) -> str:
    for reshard in (True, False):
        nccl, own, memory = ranks.sharded(reshard=reshard, slots=EXPERTS + 2)
        options = SpillOptions.uniform(EXPERTS, ranks.group.size, 2)
        for layer in (*nccl, *own):
            layer.planner = QuotaPlanner(options, ranks.group.size)
        for seed in range(4):
            batch = ranks.batch(seed, skew=(1, 3, 10, 1000)[seed])
            for again in (False, True):
                for one, other in zip(answers(nccl, batch), answers(own, batch, again=again), strict=True):
                    assert torch.equal(one, other), (reshard, seed, again, error(one, other))
        memory.check()
    return "replicas beyond layouts, recomputed or not: the bits of NCCL"


def copies_in_flight(ranks: Ranks) -> str:
    nccl, own, memory = ranks.sharded(count=2)
    for one, other in zip(under_way(ranks, nccl), under_way(ranks, own), strict=True):
        assert torch.equal(one, other)
    memory.check()
    return "three micro-batches through two layers with layouts of their own: the bits of NCCL"


def copies_beside_products(ranks: Ranks) -> str:
    """Ranks that come late, GPUs that are busy, and hosts that are far ahead change nothing."""
    nccl, own, memory = ranks.sharded()
    batch = ranks.batch(0)
    expected = answers(nccl, batch)
    large = torch.randn(8192, 8192, dtype=torch.bfloat16, device=ranks.device)
    side = torch.cuda.Stream()
    for step in range(8):
        if (step + ranks.group.rank) % 2:
            torch.cuda._sleep(100_000_000)
        with torch.cuda.stream(side):
            for _ in range(10):
                torch.mm(large, large)
        own[0].prefetch()
        for one, other in zip(expected, answers(own, batch), strict=True):
            assert torch.equal(one, other), step
    memory.check()
    return "the same bits each time"


def copies_miss_a_rank(ranks: Ranks) -> str:
    _, own, memory = ranks.sharded(count=1, time_limit=timedelta(seconds=3))
    hidden, index, weight, _ = ranks.batch(0)
    own[0](hidden, index, weight)
    torch.cuda.synchronize()
    dist.barrier()
    if ranks.group.rank:
        time.sleep(6)
    own[0].prefetch()
    torch.cuda.synchronize()
    refusal(MissedPassError, memory.check)
    return refusal(MissedPassError, lambda: own[0](hidden, index, weight))


def sharded_equals_nccl(ranks: Ranks) -> str:
    told = []
    for reshard in (True, False):
        nccl, own, exchange = ranks.sharded_by_device(reshard=reshard, count=1)
        exact = []
        for layer in nccl:
            exact.append(FullyShardedExperts(SHAPE, EXPERTS, ranks.group, dtype=torch.float64, device=ranks.device))
            exact[-1].shard.data.copy_(layer.shard.data)
        for seed in range(5):
            tokens = (TOKENS, 7, 0)[(seed + ranks.group.rank) % 3]
            batch = ranks.batch(seed, tokens, skew=(1, 3, 10, 1000, 2)[seed])
            for layers in (exact, nccl, own):
                ranks.place(layers, seed)
            found = answers(own, batch)
            told.append(Known(exact, nccl).errors(batch, found))
            for again in (False, True):
                for one, other in zip(found, answers(own, batch, again=again), strict=True):
                    assert torch.equal(one, other), (reshard, seed, again)
        exchange.check()
        exchange.mailbox.close()
    return f"{largest(told)}, the same bits each time"


def sharded_in_flight(ranks: Ranks) -> str:
    worst = 0.0
    for reshard in (True, False):
        nccl, own, exchange = ranks.sharded_by_device(reshard=reshard)
        worst = max(worst, *map(error, under_way(ranks, nccl), under_way(ranks, own)))
        assert worst <= 8 * ROUNDING, worst
        exchange.check()
        exchange.mailbox.close()
    return f"three micro-batches through three layers with layouts of their own: {worst:.1e} from those on NCCL"


def sharded_host_is_free(ranks: Ranks) -> str:
    _, own, exchange = ranks.sharded_by_device(count=6)
    told = launched_ahead(ranks, own)
    exchange.check()
    exchange.mailbox.close()
    return told


def sharded_layouts_differ(ranks: Ranks) -> str:
    _, own, exchange = ranks.sharded_by_device(count=1)
    if ranks.group.rank:
        ranks.place(own, 1)
    hidden, index, weight, _ = ranks.batch(0)
    output = own[0](hidden, index, weight)
    torch.cuda.synchronize()
    assert output.isnan().all()
    return refusal(LayoutMismatchError, exchange.check)


CHECKS = (
    streams_nest, sharded_equals_nccl, sharded_in_flight, sharded_host_is_free, sharded_layouts_differ,
    copies_equal_nccl, copies_lend, copies_in_flight, copies_beside_products, copies_miss_a_rank, equals_nccl,
    rounds_equal_nccl, many_rows_equal_nccl, deterministic, in_flight, host_is_free, beside_an_all_reduce, replays,
    captured_steps_train, others_do_not_replay, loan_has_a_price, bad_router, too_many_tokens, too_little_room,
    other_layer, rank_missing,
)  # fmt: skip


def main() -> None:
    """Run all checks, or those named; the first rank tells."""
    local, limit = int(os.environ["LOCAL_RANK"]), timedelta(minutes=2)
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count():
        dist.init_process_group("nccl", device_id=device, timeout=limit)
    else:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        dist.init_process_group("cpu:gloo,cuda:gloo", timeout=limit)
    group = ExpertGroup.create()
    assert group is not None
    ranks = Ranks(group, device)
    names = sys.argv[1:]
    if unknown := set(names) - {check.__name__ for check in CHECKS}:
        sys.exit(
            f"{', '.join(sorted(unknown))}: no such check; there are {', '.join(each.__name__ for each in CHECKS)}"
        )
    for check in CHECKS:
        if not names or check.__name__ in names:
            torch.manual_seed(0)
            start = time.perf_counter()
            told = check(ranks)
            torch.cuda.synchronize()
            dist.barrier()
            if group.rank == 0:
                print(f"{check.__name__}: {told} ({time.perf_counter() - start:.1f} s)", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
