"""A rank of one checkout, for `training.py`, which starts it: a request a line on its standard input, answers likewise.

It holds one set of expert weights for all modes. Fully sharded experts have their parts in the same memory, between
which and whole experts `Memory` exchanges them, and one optimizer serves both.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moe_lm import (
    SIZES,
    Experts,
    Model,
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
from moeplan.runtime_client import ExpertGroup, FullyShardedExperts, ResidentExperts, Traffic
from moeplan.solvers import Layout, LlepPlanner, QuotaPlanner, SpillOptions

Counts = npt.NDArray[np.int64]

TRACE = Path(__file__).resolve().parents[1] / "examples" / "traces" / "moe-e64-cut.npz"
SHIFT = 5
"""Steps of one kind of text."""

COPIED = ("sharded-copies", "sharded-device")
"""Modes in which experts travel by copy engines."""

CAPTURED = "-graph"
"""End of modes whose steps are those of ``-device`` modes, captured in a CUDA graph."""

ASLEEP = 250_000_000
"""Cycles that a device sleeps: an eighth of a second, longer than the host needs to be steps ahead."""

WAITING = re.compile("allgather|barrier|wait", re.IGNORECASE)
"""Kernels that only wait for other ranks, as far as a name can tell."""

PAIRED = re.compile("sendrecv|alltoall|allreduce|reducescatter", re.IGNORECASE)
"""Kernels that wait for the same kernel of every other rank before they move data."""

ASIDE = re.compile("nccl:|Memset|Memcpy (HtoD|DtoH)")
"""What a profile lists beside kernels."""


# Routing


def deal(share: npt.NDArray[np.float64], tokens: int, choices: int, rng: np.random.Generator) -> Tensor:
    """int64[tokens, choices]: experts, no token's twice, in the numbers that `share` asks for.

    Args:
        share: float64[experts], part of all pairs that each expert gets; at most ``1 / choices`` can be had.
        tokens: Number of tokens.
        choices: Experts of each.
        rng: Shuffles the tokens.
    """
    pairs = tokens * choices
    count = np.minimum((share / share.sum() * pairs).astype(np.int64), tokens)
    room = tokens - count  # what is missing goes to the first experts that have room
    count += np.clip(pairs - count.sum() - (np.cumsum(room) - room), 0, room)
    # Experts in order fill one column after the other, so only one with more than `tokens` could meet a token twice.
    columns = np.repeat(np.arange(len(share)), count).reshape(choices, tokens)
    return torch.from_numpy(columns.T[rng.permutation(tokens)].copy())


def recorded(experts: int, ranks: int, steps: int) -> npt.NDArray[np.float64]:
    """float64[steps, layers, ranks, experts]: the last steps of the recorded trace, folded to this model and its ranks.

    Experts are ordered by their load, so that the first ranks have the busiest: the trace's own load of 16 ranks, on
    fewer, is nearly even in any other order. Fewer experts: neighbours in that order are one. More: those of the two
    layers are side by side.
    """
    counts = np.load(TRACE)["counts"][-steps:].astype(np.float64)
    counts = np.stack([part.sum(axis=2) for part in np.array_split(counts, ranks, axis=2)], axis=2)
    if experts > counts.shape[3]:
        counts = np.concatenate([counts[:, :1], counts[:, 1:]], axis=3)
    order = np.argsort(-counts.sum(axis=(0, 2)), axis=1, kind="stable")
    counts = np.take_along_axis(counts, order[None, :, None], axis=3)
    return counts.reshape(*counts.shape[:3], experts, -1).sum(axis=4)


class Dealt(nn.Module):
    """A router whose choices are replaced, if there is something to replace them with; it does all its work before."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.index_tk: Tensor | None = None

    def forward(self, tokens_th: Tensor) -> tuple[Tensor, Tensor]:
        weight_tk, index_tk = self.router(tokens_th)
        return weight_tk, index_tk if self.index_tk is None else self.index_tk


# Experts of all modes


class Memory:
    """The weights of one block's experts: whole ones of this rank, or parts of all, in the same memory."""

    def __init__(self, resident: ResidentExperts, sharded: FullyShardedExperts) -> None:
        self.whole, self.parts, self.group = resident.flat, sharded.shard, sharded.group
        if self.parts.numel() != self.whole.numel():
            raise SystemExit(f"{sharded.experts} experts on {self.group.size} ranks: parts and homes differ in size")
        self.parts.data = self.whole.data.view_as(self.parts)

    def shard(self) -> None:
        """From whole experts to parts of all."""
        rows = self.whole.data.unflatten(1, (self.group.size, -1)).transpose(0, 1).flatten(0, 1)
        self.parts.data.copy_(self._exchange(rows))

    def gather(self) -> None:
        """From parts of all experts to whole ones."""
        rows = self._exchange(self.parts.data).unflatten(0, (self.group.size, -1)).transpose(0, 1)
        self.whole.data.copy_(rows.flatten(1))

    def _exchange(self, rows: Tensor) -> Tensor:
        each = [len(self.whole)] * self.group.size
        return self.group.exchange(rows, each, each, weights=True, traffic=Traffic(), purpose="").wait()


def nothing() -> None:
    """In place of `Times.mark`, where no times are taken."""


class Times:
    """When the parts of steps were over, on the device if there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def parts(self) -> list[float]:
        """Mean milliseconds of forward, backward, optimizer, and what lies between steps; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            spans = [one.elapsed_time(other) for one, other in itertools.pairwise(self.marks)]
        else:
            spans = [1e3 * (other - one) for one, other in itertools.pairwise(self.marks)]
        return [float(np.mean(spans[part::4] or [0.0])) for part in range(4)]


class Graph:
    """A captured step, whose text and choices are put in place before each replay.

    Args:
        step: What is captured, with a text; it returns its loss.
        routers: Of all blocks. Choices that replace theirs are put in place, too.
        text: Of some step.
        chosen: For each block, the list that a step adds its choices to.
        pool: Memory, which graphs that take turns share.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        routers: Sequence[Dealt],
        text: Tensor,
        chosen: Sequence[list[Tensor]],
        pool: Any,
    ) -> None:
        self.text = text.clone()
        self.routers, self.chosen = routers, chosen
        dealt = [router.index_tk for router in routers]
        self.dealt = [None if index is None else index.clone() for index in dealt]
        lengths = [len(seen) for seen in chosen]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # as torch asks of what will be captured
            for _ in range(2):
                step(self.text)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        dist.barrier()
        self.graph = torch.cuda.CUDAGraph()
        for router, index in zip(routers, self.dealt, strict=True):
            router.index_tk = index
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = step(self.text)
        for router, index in zip(routers, dealt, strict=True):
            router.index_tk = index
        self.seen = [seen[-1] for seen in chosen]
        for seen, length in zip(chosen, lengths, strict=True):
            del seen[length:]

    def replay(self, text: Tensor) -> Tensor:
        """The loss of a step."""
        self.text.copy_(text)
        for router, place in zip(self.routers, self.dealt, strict=True):
            if place is not None and router.index_tk is not None:
                place.copy_(router.index_tk)
        self.graph.replay()
        for seen, index in zip(self.chosen, self.seen, strict=True):
            seen.append(index.clone())
        return self.loss.clone()


class Bench:
    """One model in all modes. Its public methods are requests; all ranks get the same.

    Args:
        group: The ranks.
        device: What this one computes on.
        size: Name of the model.
        batch: Pieces of text in a step, if not the size's own.
        train: Steps of `train`.
        rounds: How many rounds of samples there will be.
        steps: Measured steps in each of them.
        ahead: Whether the device sleeps before measured steps, so that the host is ahead of it.
    """

    def __init__(
        self,
        group: ExpertGroup,
        device: torch.device,
        size: str,
        batch: int | None,
        train: int,
        rounds: int,
        steps: int,
        ahead: bool,
    ) -> None:
        torch.manual_seed(0)
        self.ahead = ahead
        self.group, self.device, self.size = group, device, SIZES[size]
        self.size = replace(self.size, batch=batch or self.size.batch)
        self.train_steps, self.steps = train, steps
        self.layers, self.memory = self._make_layers()
        self.is_sharded = False
        self.copied: Sequence[FullyShardedExperts] = ()
        self.model = Model(self.size, self.layers["static"]).to(device)
        self.routers = [Dealt(block.get_submodule("router")) for block in self.model.blocks]
        for block, router in zip(self.model.blocks, self.routers, strict=True):
            block.router = router
        self.shared = self.model.shared()
        weights = [*self.shared, *(memory.whole for memory in self.memory)]
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(weights, lr=self.size.rate, fused=cuda, capturable=cuda)
        self.mode = "static"
        self.graphs: dict[tuple[str, bool], Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if cuda else None
        self.chosen: list[list[Tensor]] = [[] for _ in self.memory]
        text = itertools.islice(batches(self.size, group.rank, group.size, SHIFT), train + rounds * (steps + 1))
        self.text = [batch.to(device) for batch in text]
        trace = recorded(self.size.experts, group.size, steps + 1)[:, :, group.rank]
        self.tables = {"text": [], "trace": self._deal(trace), "skewed": self._deal(trace**2)}
        self.tables["even"] = self._deal(np.ones((1, 1, self.size.experts)))
        for mode in ("static", "quota", "sharded"):  # compiles what they need, on a little text
            self._enter(mode)
            self._choose("text", 0)
            self._backward(self.model(self.text[0][:2]))
            self.optimizer.zero_grad()

    def describe(self) -> dict[str, Any]:
        """The machine and the model."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU core"
        machine = {"device": name, "ranks": self.group.size, "torch": torch.__version__, "cores": os.cpu_count()}
        return {"machine": machine, "size": asdict(self.size) | {"tokens": self.size.tokens}}

    def train(self) -> float:
        """Train static experts on text, so that routers have learned; the loss. After that weights stay as they are."""
        self._enter("static")
        self._choose("text", 0)
        for text in self.text[: self.train_steps]:
            loss = self._step(text)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        gc.collect()
        gc.freeze()  # what is here stays, so no collection in the middle of a step need look at it
        return float(loss)

    def sample(self, mode: str, routing: str, nth: int, layouts: Sequence[Any] | None) -> dict[str, Any]:
        """Times of a round's steps after one that warms up, the same for all modes.

        Args:
            mode: Which experts.
            routing: `even`, `text`, `trace` or `skewed`.
            nth: The round.
            layouts: Slots of each block, for sharded experts.

        Returns:
            ``ms`` of a step, ``forward``, ``backward``, ``optimizer``, ``memory`` in bytes (all of the slowest or
            largest rank); ``imbalance``, the mean of blocks and steps; ``loss``, the sum of this rank's; ``counts``
            [blocks, ranks, experts] of the step that warms up.
        """
        self._enter(mode)
        self._set_layouts(mode, layouts)
        first, *texts = self._texts(nth)
        self._forget()
        self._choose(routing, 0)
        self._step(first)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = Times(self.device)
        self._finish()
        if self.ahead:
            torch.cuda._sleep(ASLEEP)
        start = time.perf_counter()
        losses = []
        for step, text in enumerate(texts):
            self._choose(routing, 1 + step)
            losses.append(self._step(text, times))
        self._finish()
        ms = 1e3 * (time.perf_counter() - start) / len(texts)
        parts = times.parts()
        if self.ahead:
            ms = sum(parts)  # the device's own
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        if mode.endswith(CAPTURED):
            memory = 0  # that of a graph is not told
        names = ("ms", "forward", "backward", "optimizer", "memory")
        values = torch.tensor([ms, *parts[:3], memory], dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        warm, *timed = self._counts()
        loads = [
            device_loads(layer, counts) for step in timed for layer, counts in zip(self.layers[mode], step, strict=True)
        ]
        imbalance = float(np.mean([load.max() / load.mean() for load in loads]))
        sample = dict(zip(names, values.tolist(), strict=True))
        return sample | {"imbalance": imbalance, "loss": float(sum(losses)), "counts": warm.tolist()}

    def planned(self, mode: str, routing: str, address: str, job: str, steps: int, shift: int) -> dict[str, Any]:
        """Train sharded experts with a planner beside them, from the layout in order on.

        Args:
            mode: ``sharded``, or one of `COPIED`.
            routing: As of `sample`; the kind of text changes every `shift` steps.
            address: The daemon.
            job: Id of the job there.
            steps: Number of steps.
            shift: Steps of one kind of text.

        Returns:
            ``ms`` of the slowest rank, the session included, ``imbalance`` and ``version``, of each step. Times are
            means of as many steps as in a sample, between which nobody waits for the device.
        """
        from moeplan.api import Forecast, Replan  # other checkouts may not have them
        from moeplan.runtime_client import PlannedLayer, PlannerSession, record
        from moeplan.solvers import SolveParameters

        self._enter(mode)
        layers = [layer for layer in self.layers[mode] if isinstance(layer, FullyShardedExperts)]
        width = -(-self.size.experts // self.group.size)
        for layer in layers:
            layer.layout = Layout.contiguous(self.size.experts, np.full(self.group.size, width, np.int32))

        def apply(plan: Sequence[PlannedLayer]) -> None:
            for layer, planned in zip(layers, plan, strict=True):
                layer.plan = planned

        run: dict[str, Any] = {"ms": [], "imbalance": [], "version": []}
        text = batches(self.size, self.group.rank, self.group.size, shift)
        with (
            record(self.model) as recorder,
            PlannerSession(
                address,
                job,
                [layer.layout for layer in layers],
                apply,
                slots=width + 1,
                parameters=SolveParameters(work_limit=500),
                forecast=Forecast(window_steps=4),
                replan=Replan(every_steps=1),
                timeout=timedelta(minutes=2),
            ) as session,
        ):
            for first in range(0, steps, self.steps):
                several = range(first, min(first + self.steps, steps))
                pieces = [next(text).to(self.device) for _ in several]
                plans = []
                self._forget()
                self._finish()
                start = time.perf_counter()
                for step, piece in zip(several, pieces, strict=True):
                    run["version"].append(session.version)
                    plans.append([layer.plan for layer in layers])
                    self._choose(routing, step)
                    self._step(piece)
                    session.step(recorder.step())
                self._finish()
                run["ms"] += [1e3 * (time.perf_counter() - start) / len(several)] * len(several)
                for planned, counts in zip(plans, self._counts(), strict=True):
                    loads = [
                        plan.division.divide(plan.layout, each).device_loads()
                        for plan, each in zip(planned, counts, strict=True)
                    ]
                    run["imbalance"].append(float(np.mean([load.max() / load.mean() for load in loads])))
        slowest = torch.tensor(run["ms"], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return run | {"ms": slowest.tolist()}

    def profile(self, mode: str, routing: str, layouts: Sequence[Any] | None) -> dict[str, Any]:
        """What the device does in a step.

        Returns:
            ``busy``: milliseconds in which a kernel runs that does more than wait, of the busiest rank; ``busy_share``:
            the same as part of the time from the first kernel to the end of the last, which a profiler makes longer;
            ``kernels``: how many ran, and ``longest``: [name, milliseconds, calls] of those with most time, on this
            rank. None of them without a device.
        """
        if self.device.type != "cuda":
            return {"busy": None, "busy_share": None}
        self._enter(mode)
        self._set_layouts(mode, layouts)
        first, text, *_ = self._texts(0)
        self._choose(routing, 0)
        self._step(first)
        self._choose(routing, 1)
        self._finish()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self._step(text)
            self._finish()
        kernels = [
            (event.name, event.device_resource_id, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type.name == "CUDA" and not ASIDE.match(event.name)
        ]
        worked = union(self._working(kernels))
        span = max(end for *_, end in kernels) - min(start for _, _, start, _ in kernels)
        busy = torch.tensor([worked / 1e3, worked / span], dtype=torch.float64, device=self.device)
        dist.all_reduce(busy, dist.ReduceOp.MAX)
        busy_ms, busy_share = busy.tolist()
        spent, calls = Counter[str](), Counter(name[:80] for name, *_ in kernels)
        for name, _, start, end in kernels:
            spent[name[:80]] += (end - start) / 1e3
        longest = [[name, round(milliseconds, 3), calls[name]] for name, milliseconds in spent.most_common(12)]
        return {"busy": busy_ms, "busy_share": busy_share, "kernels": len(kernels), "longest": longest}

    # Parts of the requests

    def _step(self, text: Tensor, times: Times | None = None) -> Tensor:
        mark = times.mark if times else nothing
        if not self.mode.endswith(CAPTURED):
            return self._run(text, mark)
        key = self.mode, self.routers[0].index_tk is not None
        if key not in self.graphs:
            self.graphs[key] = Graph(self._run, self.routers, text, self.chosen, self.pool)
        mark()
        loss = self.graphs[key].replay(text)
        for _ in range(3):  # its parts cannot be told apart
            mark()
        return loss

    def _run(self, text: Tensor, mark: Callable[[], None] = nothing) -> Tensor:
        mark()
        for first in self.copied[:1]:  # its weights arrive beside what comes before it
            first.prefetch()
        loss: Tensor = self.model(text)
        mark()
        self._backward(loss)
        mark()
        self.optimizer.step()
        mark()
        self.optimizer.zero_grad()
        return loss.detach()

    def _backward(self, loss: Tensor) -> None:
        backward(loss, self.shared, self.group)
        if self.is_sharded:
            for memory in self.memory:
                assert memory.parts.grad is not None
                memory.whole.grad, memory.parts.grad = memory.parts.grad.view_as(memory.whole), None

    def _make_layers(self) -> tuple[dict[str, Sequence[Experts]], list[Memory]]:
        """The layers of each mode, and the memory that those of one block share."""
        size, group, dtype = self.size, self.group, compute_dtype(self.device)
        spill, none = spill_options(size, group.size), SpillOptions.uniform(size.experts, group.size, 0)
        static = resident_layers(size, group, self.device, lambda: QuotaPlanner(none, group.size), dtype)
        load_random(size, static, self.device)
        quota = resident_layers(size, group, "meta", lambda: QuotaPlanner(spill, group.size), dtype)
        llep = resident_layers(size, group, "meta", lambda: LlepPlanner(spill, group.size), dtype)
        for layers in (quota, llep):
            for layer, first in zip(layers, static, strict=True):
                layer.flat = first.flat
        sharded = sharded_layers(size, group, self.device, dtype)
        for each in (static, quota, llep, sharded):
            self._watch(each)
        memory = [Memory(*pair) for pair in zip(static, sharded, strict=True)]
        return {"force-balanced": static, "static": static, "quota": quota, "llep": llep, "sharded": sharded}, memory

    def _watch(self, layers: Sequence[Experts]) -> None:
        for block, module in enumerate(layers):
            module.register_forward_pre_hook(partial(self._see, block))

    def _device_layers(self, spare: int) -> list[ResidentExperts]:
        """Layers whose passes run without the host, and which lend what earns its transfer."""
        from moeplan.runtime_client import DeviceExchange, measure_transfer  # other checkouts may not have them

        size, group = self.size, self.group
        planner = QuotaPlanner(SpillOptions.uniform(size.experts, group.size, spare), group.size)
        exchange = DeviceExchange(
            group, planner, size.shape, max_tokens=size.tokens, choices=size.choices, device=self.device
        )
        if spare:
            exchange.charge(measure_transfer(exchange))
        planner = QuotaPlanner(exchange.options, group.size, quick=True)
        layers = resident_layers(size, group, "meta", lambda: planner, torch.bfloat16, exchange=exchange)
        for layer, first in zip(layers, self.layers["static"], strict=True):
            layer.flat = first.weights
        self._watch(layers)
        return layers

    def _more_sharded(self, **shared: Any) -> list[FullyShardedExperts]:
        """The sharded experts, whose layers share a planner, a memory or an exchange."""
        layers = sharded_layers(self.size, self.group, "meta", compute_dtype(self.device), **shared)
        for layer, first in zip(layers, self.layers["sharded"], strict=True):
            layer.shard = first.weights
        self._watch(layers)
        return layers

    def _make_layers_of(self, mode: str) -> None:
        """The layers of a mode that other checkouts may not have."""
        size, group = self.size, self.group
        spill = spill_options(size, group.size)
        if mode == "sharded-quota":
            self.layers[mode] = self._more_sharded(planner=QuotaPlanner(spill, group.size))
        elif mode in COPIED:
            from moeplan.runtime_client import DeviceExchange, ShardMemory, SlotsOfLayouts

            slots = planned_slots(size, group.size)
            shared: dict[str, Any] = {
                "memory": ShardMemory(group, size.shape.elements, size.experts, slots=slots, device=self.device)
            }
            if mode == "sharded-device":
                shared["exchange"] = DeviceExchange(
                    group, SlotsOfLayouts(size.experts, slots), size.shape, max_tokens=size.tokens,
                    choices=size.choices, device=self.device,
                )  # fmt: skip
            self.layers[mode] = self._more_sharded(**shared)
        else:
            static = self._device_layers(0)
            self.layers |= {"force-balanced-device": static, "static-device": static}
            self.layers["quota-device"] = self._device_layers(int(spill.spare[0]))

    def _enter(self, mode: str) -> None:
        self.mode, mode = mode, mode.replace(CAPTURED, "-device")
        if mode not in self.layers:
            self._make_layers_of(mode)
        self.layers[self.mode] = self.layers[mode]
        copied = self.layers[mode] if mode in COPIED else ()
        self.copied = [layer for layer in copied if isinstance(layer, FullyShardedExperts)]
        if self.is_sharded != mode.startswith("sharded"):
            self.is_sharded = mode.startswith("sharded")
            for memory in self.memory:
                if self.is_sharded:
                    memory.shard()
                else:
                    memory.gather()
        for block, experts in zip(self.model.blocks, self.layers[mode], strict=True):
            block.experts = experts

    def _set_layouts(self, mode: str, layouts: Sequence[Any] | None) -> None:
        for layer, slots in zip(self.layers[mode], layouts or (), strict=bool(layouts)):
            layer.layout = Layout(np.array(slots, np.int32), self.size.experts)

    def _texts(self, nth: int) -> list[Tensor]:
        start = self.train_steps + nth * (self.steps + 1)
        return self.text[start : start + self.steps + 1]

    def _choose(self, routing: str, step: int) -> None:
        """Have all blocks choose experts by `routing`, for the given step of a round."""
        tables = self.tables[routing]
        for block, router in enumerate(self.routers):
            router.index_tk = tables[step % len(tables)][block] if tables else None

    def _deal(self, share: npt.NDArray[np.float64]) -> list[list[Tensor]]:
        """This rank's choices in every step and block, from shares float64[steps, layers, experts]."""
        size, rng = self.size, np.random.default_rng(self.group.rank)
        return [
            [
                deal(layers[block % len(layers)], size.tokens, size.choices, rng).to(self.device)
                for block in range(size.blocks)
            ]
            for layers in share
        ]

    def _see(self, block: int, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.chosen[block].append(arguments[1])

    def _forget(self) -> None:
        for seen in self.chosen:
            seen.clear()

    def _counts(self) -> Iterator[Counts]:
        """int64[blocks, ranks, experts] of every step since `_forget`."""
        for step in zip(*self.chosen, strict=True):
            mine = torch.stack([torch.bincount(index.flatten(), minlength=self.size.experts) for index in step])
            every = [torch.empty_like(mine) for _ in range(self.group.size)]
            dist.all_gather(every, mine)
            yield torch.stack(every, dim=1).cpu().numpy()
        self._forget()

    def _finish(self) -> None:
        """Wait for the device, then for all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _working(self, kernels: Sequence[tuple[str, int, float, float]]) -> list[tuple[float, float]]:
        """Start and end of each kernel, less the time in which it can be told that it waits for other ranks."""
        paired = sorted((kernel for kernel in kernels if PAIRED.search(kernel[0])), key=lambda kernel: kernel[1:3])
        starts: list[list[float]] = [[] for _ in range(self.group.size)]
        dist.all_gather_object(starts, [start for _, _, start, _ in paired])
        told = len({len(each) for each in starts}) == 1
        since = (
            {kernel: max(begun) for kernel, begun in zip(paired, zip(*starts, strict=True), strict=True)}
            if told
            else {}
        )
        return [
            (min(since.get(kernel, kernel[2]), kernel[3]), kernel[3])
            for kernel in kernels
            if not WAITING.search(kernel[0])
        ]


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what the spans cover."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def main() -> None:
    """Answer requests until there are no more."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=3))
    group = ExpertGroup.create()
    assert group is not None
    bench: Bench | None = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        if name == "build":
            bench = None
            gc.unfreeze()
            gc.collect()  # frees the model before
            torch._dynamo.reset()  # it keeps functions for a limited number of widths
            if cuda:
                torch.cuda.empty_cache()
            bench, name, arguments = Bench(group, device, **arguments), "describe", {}
        answer = getattr(bench, name)(**arguments)
        if cuda and torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
            torch.cuda.empty_cache()  # the ranks of another checkout need as much
        print(json.dumps(answer), file=answers, flush=True)
    bench = None
    gc.unfreeze()
    gc.collect()  # graphs hold on to the process group, which would wait for them
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # as at the end of train_moe_lm.py
