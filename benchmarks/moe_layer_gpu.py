"""One MoE layer on real ranks, GPUs or CPU cores: static expert parallelism, `llep`, `quota`, fully sharded experts.

On GPUs also `device`, which is `quota` in passes without the host, where there are spare slots.

    torchrun --nproc-per-node 8 benchmarks/moe_layer_gpu.py --layer gpt-oss-120b        # NCCL, one process per GPU
    torchrun --nproc-per-node 2 benchmarks/moe_layer_gpu.py --layer small --device cpu  # gloo, one core per process

Prints tables last; first it checks outputs and gradients of all methods against a dense model in one process, and ends
there if they differ. `--check` stops after that, and ``--trace FILE.npz`` (``counts[step, layer, source, expert]``)
adds the real loads of its last step, for layers with as many experts.

Loads: `balanced` deals all (token, choice) pairs out evenly, in random order; ``80 % on 4`` sends each pair with
probability 0.8 to one of the first four experts, otherwise to one of the others. Either way a token may choose an
expert twice, and its experts are on any ranks. Every step draws anew. Fully sharded experts use the layout planned
from the step before, off the critical path as a daemon would plan it.

Times are the fastest of rounds that visit all methods in turn; a step is forward and backward, until the slowest rank
is done. What a method reaches of its speed under even loads is told by the same rounds, which have those in turn, too,
as clocks of GPUs change with what they did before. `ideal` is the imbalance of static expert parallelism: the speed-up
if time were proportional to the largest load. `gain` is the share of it that was reached,
``(speed-up - 1) / (ideal - 1)``. Memory is the largest rank's weights and what a step allocates beside them, gradients
included. Planning is what a pass waits for before it can dispatch. On CPUs memory is the growth of the resident set,
and every process is pinned to one core together with gloo's threads.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moeplan.runtime_client.device.break_even import measure_transfer
from moeplan.runtime_client.device.exchange import DeviceExchange
from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.layers.feed_forward import ExpertShape, feed_forward
from moeplan.runtime_client.layers.lending import Loan
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.routing import gather_counts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.solvers import (
    Cluster,
    Demand,
    Layout,
    Link,
    LlepPlanner,
    Problem,
    QuotaPlanner,
    SpillOptions,
    solve,
    transfer_tokens,
)
from moeplan.solvers.problem.arrays import Int64
from result_file import write_result

Layer = ResidentExperts | FullyShardedExperts


@dataclass(frozen=True)
class Size:
    """A layer and the tokens of one rank."""

    experts: int
    choices: int
    hidden: int
    width: int
    tokens: int

    @property
    def shape(self) -> ExpertShape:
        return ExpertShape(self.hidden, self.width)


SIZES = {
    "gpt-oss-120b": Size(128, 4, 2880, 2880, 32768),
    "deepseek-v3": Size(256, 8, 7168, 2048, 16384),
    "kimi-k2": Size(384, 8, 7168, 2048, 16384),
    "small": Size(64, 4, 256, 1024, 4096),
    "few": Size(16, 4, 256, 2048, 4096),  # tokens per expert on a rank weigh against its weights as in the large ones
    "narrow": Size(64, 4, 128, 1024, 4096),  # for many ranks on cores, where a step of the wider ones takes long
}


@dataclass(frozen=True)
class Load:
    """`share` of the pairs on the first `hot` experts; balanced without hot experts; or as in a trace."""

    hot: int = 0
    share: float = 0.0
    trace: Int64 | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        if self.trace is not None:
            return "trace"
        return "balanced" if self.is_even else f"{self.share:.0%} on {self.hot}".replace("%", " %")

    @property
    def is_even(self) -> bool:
        """Whether all experts get as many pairs."""
        return self.trace is None and not self.hot

    def draw(self, size: Size, rank: int, ranks: int, step: int) -> Tensor:
        """int64[tokens, choices], the experts of one rank's tokens."""
        random = torch.Generator().manual_seed(1000 * step + rank)
        pairs = size.tokens * size.choices
        if self.trace is not None:
            row = self.trace[rank * len(self.trace) // ranks].astype(np.float64) + 1e-9
            chosen = torch.multinomial(torch.from_numpy(row), pairs, replacement=True, generator=random)
        elif self.hot:
            hot = torch.rand(pairs, generator=random) < self.share
            others = torch.randint(self.hot, size.experts, (pairs,), generator=random)
            chosen = torch.where(hot, torch.randint(self.hot, (pairs,), generator=random), others)
        else:
            chosen = (torch.randperm(pairs, generator=random) + rank * pairs) % size.experts
        return chosen.view(size.tokens, size.choices)


LOADS = [Load(), *(Load(hot, share) for hot in (16, 4, 1) for share in (0.3, 0.5, 0.8, 0.95))]

PUBLISHED = {
    "gpt-oss-120b": "1.07 | 1.73 2.85 4.37 5.19 | 2.09 3.05 4.47 5.22 | 2.41 3.48 5.26 6.11",
    "deepseek-v3": "0.92 | 1.69 2.65 3.83 4.59 | 1.76 2.83 3.64 4.64 | 1.96 2.77 4.23 5.13",
    "kimi-k2": "1.03 | 1.80 2.73 4.01 4.83 | 1.94 2.85 3.96 4.67 | 1.48 2.74 4.09 5.03",
}
"""Forward speed-up of LLEP on 8 H200s in the order of `LOADS` (arXiv 2601.17111, figure 4; DeepSeek-R1 for V3)."""

ROOM = 1.25
"""Rows that a GPU has room for in passes without the host, as a multiple of those of even loads."""

PUBLISHED_MEMORY = "1.27 | 1.9 2.4 3.5 4.1 | 2.3 3.0 3.8 4.2 | 2.5 3.1 3.9 4.2"
"""Its peak memory for gpt-oss-120b: EP over LLEP, read off figure 4's bars."""


@dataclass(eq=False)
class Method:
    """A way to run the layer, and what was measured of it under one load."""

    name: str
    layer: Layer
    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    planning: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    memory: int = 0

    def clear(self) -> None:
        for values in (self.forward, self.step, self.planning, self.imbalance, self.sent):
            values.clear()
        self.memory = 0


class Bench:
    """The ranks, their device, and what they agree on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        group = ExpertGroup.create()
        assert group is not None
        self.group = group

    def machine(self) -> dict[str, Any] | None:
        """The GPUs, if it runs on them."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name()
        return {"device": name, "ranks": self.group.size, "torch": torch.__version__, "cores": os.cpu_count()}

    def largest(self, value: float) -> float:
        """The largest value of all ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def mean(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor) / self.group.size

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Time from a common start until the last rank is done."""
        self.finish()
        dist.barrier()
        start = perf_counter()
        work()
        self.finish()
        return self.largest(perf_counter() - start)

    def start_peak(self) -> int:
        """Forget the peak of memory; returns the bytes in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        _libc().malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status("VmHWM")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layer", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="tokens per rank, if not the layer's own")
    parser.add_argument("--experts", type=int, help="experts, if not the layer's own")
    parser.add_argument("--spare", type=int, help="spare slots of each rank; a quarter of its experts, at least 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", nargs="+", metavar="NAME", help='only these, for instance "80 %% on 4"')
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--check", action="store_true", help="only compare with the dense model")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--commit", help="name of this checkout, where git cannot tell")
    arguments = parser.parse_args()

    bench = join_ranks(arguments.device)
    console = Console(width=170, quiet=bench.group.rank != 0)
    try:
        for line in check(bench):
            console.print(line)
        if arguments.check:
            return
        tables: list[Table] = []
        rows: list[dict[str, Any]] = []
        for name in arguments.layer:
            own = SIZES[name]
            size = replace(own, tokens=arguments.tokens or own.tokens, experts=arguments.experts or own.experts)
            size = fit(bench, size)
            spare = (
                max(2, math.ceil(size.experts / bench.group.size / 4)) if arguments.spare is None else arguments.spare
            )
            loads = [load for load in LOADS if load.hot < size.experts]
            if arguments.trace:
                counts = np.load(arguments.trace)["counts"]
                if counts.shape[3] == size.experts:
                    loads.append(Load(trace=counts[-1, 0]))
            chosen = [load for load in loads if not arguments.loads or load.name in arguments.loads]
            tables.append(measure(bench, name, size, chosen, spare, arguments.rounds, console, rows))
            if arguments.out and bench.group.rank == 0:
                write_result(arguments.out, rows, commit=arguments.commit, machine=bench.machine())
        for table in tables:
            console.print(table)
    finally:
        dist.destroy_process_group()


def join_ranks(kind: str) -> Bench:
    local = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=2))
        return Bench(device)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[local % len(cores)]})
    torch.set_num_threads(1)
    # Keep freed memory, as any allocator for training does: glibc's would return it and fault it in again every step.
    _libc().mallopt(-4, 0)  # M_MMAP_MAX
    _libc().mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    return Bench(torch.device("cpu"))


def make_methods(bench: Bench, size: Size, dtype: torch.dtype, spare: int, cost: float, least: int) -> list[Method]:
    """All methods with the same weights; the resident ones share one parameter."""
    group, experts = bench.group, size.experts
    exact = SpillOptions.uniform(
        experts, group.size, spare if group.size > 1 else 0, tolerance=0.002, min_tokens=least, transfer_tokens=cost
    )
    static = ResidentExperts(size.shape, experts, group, dtype=dtype, device=bench.device)
    spilling = [
        ResidentExperts(size.shape, experts, group, planner=planner, buffer=static.buffer, dtype=dtype, device="meta")
        for planner in (LlepPlanner(exact, group.size, min_tokens=least), QuotaPlanner(exact, group.size, quick=True))
    ]
    sharded = FullyShardedExperts(size.shape, experts, group, dtype=dtype, device=bench.device, reshard=False)
    methods = [
        Method("static", static),
        Method("llep", spilling[0]),
        Method("quota", spilling[1]),
        Method("sharded", sharded),
    ]
    if dtype == torch.bfloat16 and group.size > 1 and spare:
        spilling.append(on_device(bench, size, exact))
        methods.append(Method("device", spilling[-1]))
    for spiller in spilling:
        spiller.flat = static.flat
    random = torch.Generator(bench.device).manual_seed(0)
    for expert in range(experts):
        flat = torch.randn(1, size.shape.elements, generator=random, device=bench.device, dtype=torch.float32)
        for layer in (static, sharded):
            assert isinstance(layer, ResidentExperts | FullyShardedExperts)
            layer.load_experts(expert, (flat / size.hidden**0.5).to(dtype))
    return methods


def on_device(bench: Bench, size: Size, options: SpillOptions) -> ResidentExperts:
    """Spilling in passes without the host, which lends what earns the transfer that is measured here.

    All ranks wait until loans have arrived, so none computes less for those that it borrows.
    """
    group, pairs = bench.group, size.tokens * size.choices
    planner = QuotaPlanner(replace(options, transfer_tokens=0.0), group.size, quick=True)
    exchange = DeviceExchange(
        group, planner, size.shape, max_tokens=size.tokens, choices=size.choices, device=bench.device,
        weights=torch.bfloat16, capacity=min(int(ROOM * pairs), group.size * pairs),
    )  # fmt: skip
    exchange.charge(measure_transfer(exchange))
    planner = QuotaPlanner(exchange.options, group.size, quick=True)
    return ResidentExperts(
        size.shape, size.experts, group, planner=planner, exchange=exchange, dtype=torch.bfloat16, device="meta"
    )


def plan_layout(layer: FullyShardedExperts, counts: Int64, spare: int) -> float:
    """Set the layout for the counts of the step before; every rank finds the same. Returns the seconds it took."""
    devices, experts = layer.group.size, layer.experts
    slots = -(-experts // devices) + (spare if devices > 1 else 0)
    plan = solve(Problem(Cluster.uniform(devices, slots), Demand.of(counts[None])))
    layer.layout = plan.layout
    return plan.seconds


def fit(bench: Bench, size: Size) -> Size:
    """`size` with fewer experts and tokens if the GPU's memory would not do for static EP with 95 % on one rank."""
    if bench.device.type != "cuda":
        return size
    memory = torch.cuda.get_device_properties(bench.device).total_memory
    # In bfloat16: both kinds of layer with gradients, and the gathered weights with theirs.
    of_expert = 6 * 2 * size.shape.elements / bench.group.size
    experts = min(size.experts, int(0.4 * memory / of_expert) // 64 * 64)
    of_row = 2 * (5 * size.hidden + 7 * size.width)
    rows = (0.85 * memory - experts * of_expert) / of_row
    tokens = min(size.tokens, int(rows / bench.group.size / size.choices) // 1024 * 1024)
    return replace(size, experts=experts, tokens=tokens)


# Correctness


def check(bench: Bench) -> Iterator[str]:
    """Every method against a dense model of one process, on skewed loads with an empty rank and an unused expert.

    Raises:
        SystemExit: an error is beyond the tolerance.
    """
    kinds = [(torch.float64, 1e-12, Size(2 * bench.group.size + 3, 2, 24, 16, 40))]
    if bench.device.type == "cuda":
        kinds.append((torch.bfloat16, 0.02, Size(2 * bench.group.size + 3, 2, 256, 128, 1024)))
    for dtype, tolerance, size in kinds:
        worst: dict[str, float] = {}
        for method in make_methods(bench, size, dtype, 2, 0.0, 1):
            for step in range(3):
                worst[method.name] = max(worst.get(method.name, 0), deviation(bench, size, method.layer, dtype, step))
        yield f"largest relative error in {str(dtype)[6:]}: " + ", ".join(f"{n} {e:.1e}" for n, e in worst.items())
        if max(worst.values()) > tolerance:
            sys.exit(f"wrong: the limit is {tolerance:g}")


def deviation(bench: Bench, size: Size, layer: Layer, dtype: torch.dtype, step: int) -> float:
    """Largest error of output, gradients of tokens and weights, over the largest value of each."""
    group = bench.group
    random = torch.Generator().manual_seed(step)
    sizes = [0 if group.size > 1 and rank == step % group.size else size.tokens - rank for rank in range(group.size)]
    total = sum(sizes)
    wide = torch.promote_types(dtype, torch.float32)
    hidden = torch.randn(total, size.hidden, generator=random, dtype=torch.float64).to(bench.device, dtype)
    target = torch.randn(total, size.hidden, generator=random, dtype=torch.float64).to(bench.device, dtype)
    skew = torch.arange(size.experts - 1, -1, -1, dtype=torch.float64) ** (2 * step + 0.1)  # the last one gets nothing
    index = torch.multinomial(skew.expand(total, -1), size.choices, generator=random).to(bench.device)
    weight = torch.rand(total, size.choices, generator=random).to(bench.device, dtype)
    if isinstance(layer, FullyShardedExperts):
        rng = np.random.default_rng(step)
        slots = np.full((group.size, size.experts), -1, np.int32)
        held = rng.random((group.size, size.experts)) < 0.3
        held[rng.integers(group.size, size=size.experts), np.arange(size.experts)] = True
        for device in range(group.size):
            slots[device, : held[device].sum()] = rng.permutation(np.flatnonzero(held[device]))
        layer.layout = Layout(slots, size.experts)

    whole = whole_weights(bench, layer).to(wide).requires_grad_()
    tokens = hidden.to(wide, copy=True).requires_grad_()
    expected = dense(size.shape, whole, tokens, index, weight.to(wide))
    (expected * target).sum().backward()

    mine = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
    own = hidden[mine].clone().requires_grad_()
    layer.zero_grad()
    actual = layer(own, index[mine], weight[mine])
    (actual * target[mine]).sum().backward()
    (parameter,) = layer.parameters()
    assert own.grad is not None
    assert tokens.grad is not None
    assert whole.grad is not None
    assert parameter.grad is not None
    parts = rows_of(layer, whole.grad)
    pairs = ((actual, expected[mine]), (own.grad, tokens.grad[mine]), (parameter.grad[:, : parts.shape[1]], parts))
    errors = [_error(one.detach(), other.detach()) for one, other in pairs]
    layer.zero_grad()
    return bench.largest(max(errors))


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1)) if expected.numel() else 0.0


def whole_weights(bench: Bench, layer: Layer) -> Tensor:
    """[experts, elements] on every rank."""
    (parameter,) = layer.parameters()
    whole = torch.zeros(layer.experts, layer.shape.elements, dtype=torch.float64, device=bench.device)
    part = rows_of(layer, whole)
    part += parameter.detach()[:, : part.shape[1]]
    if isinstance(layer, ResidentExperts):
        whole[layer.homes.owned] = part
    dist.all_reduce(whole)
    return whole


def rows_of(layer: Layer, whole: Tensor) -> Tensor:
    """This rank's part of all weights."""
    if isinstance(layer, ResidentExperts):
        return whole[layer.homes.owned]
    width = layer.shard.shape[1]
    return whole[:, layer.group.rank * width : (layer.group.rank + 1) * width]


def dense(shape: ExpertShape, whole: Tensor, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The layer in one process, written apart from the code under test."""
    result = torch.zeros_like(hidden)
    for expert, flat in enumerate(whole):
        inner, outer = flat.split([shape.inner_rows * shape.hidden, shape.hidden * shape.width])
        token, choice = torch.where(index == expert)
        gate, up = (hidden[token] @ inner.view(-1, shape.hidden).T).chunk(2, dim=1)
        output = nn.functional.silu(gate) * up @ outer.view(shape.hidden, -1).T
        result = result.index_add(0, token, output * weight[token, choice, None])
    return result


# Measurement


def measure(
    bench: Bench,
    name: str,
    size: Size,
    loads: Sequence[Load],
    spare: int,
    rounds: int,
    console: Console,
    rows: list[dict[str, Any]],
) -> Table:
    """The table of all loads; what it shows is added to `rows` as figures."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    cost, per_token = calibrate(bench, size, dtype)
    least = 1024 if bench.device.type == "cuda" else 64
    methods = make_methods(bench, size, dtype, spare, cost, least)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU core"
    title = (
        f"{name} on {bench.group.size} x {device}: "
        f"{size.experts} experts, top-{size.choices}, {size.hidden} x {size.width}, {size.tokens} tokens per rank, "
        f"{str(dtype)[6:]}; {spare} spare slots; {per_token * 1e6:.2f} us per token, {cost:.0f} tokens per transfer"
    )
    table = new_table(title)
    evens = [Method(method.name, method.layer) for method in methods]
    published = dict(zip((load.name for load in LOADS), PUBLISHED.get(name, "").replace("|", "").split(), strict=False))
    memory = dict(zip((load.name for load in LOADS), PUBLISHED_MEMORY.replace("|", "").split(), strict=True))
    for load in loads:
        for method in (*methods, *evens):
            method.clear()
        turns = [(load, methods)] if load.is_even else [(load, methods), (Load(), evens)]
        visit(bench, size, turns, spare, rounds, dtype)
        found = figures(methods)
        even = found if load.is_even else figures(evens)
        add_rows(table, load, methods, even, published, memory if name == "gpt-oss-120b" else {})
        static, *others = methods
        shares = {f"{method.name}_of_even": even[method.name] / found[method.name] for method in methods}
        rows.append({"layer": name, "ranks": bench.group.size, "tokens": load.name} | found | shares)
        reached = (
            f"{method.name} {min(static.step) / min(method.step):.2f}x, memory {static.memory / method.memory:.2f}x"
            for method in others
        )
        ideal = statistics.median(static.imbalance)
        seconds = ", ".join(f"{method.name} {1e3 * min(method.step):.1f}" for method in methods)
        console.print(f"measured {load.name}: {'; '.join(reached)}; ideal {ideal:.2f}x; ms {seconds}", style="dim")
    return table


@dataclass(frozen=True)
class Batch:
    """Tokens of a rank, their experts and weights, and the gradient of what comes out."""

    hidden: Tensor
    index: Tensor
    weight: Tensor
    target: Tensor


def visit(
    bench: Bench,
    size: Size,
    turns: Sequence[tuple[Load, Sequence[Method]]],
    spare: int,
    rounds: int,
    dtype: torch.dtype,
) -> None:
    """Run all methods in turn under each load, round after round; the first round only warms up."""
    group = bench.group
    hidden = torch.randn(size.tokens, size.hidden, device=bench.device, dtype=dtype).requires_grad_()
    weight = torch.full((size.tokens, size.choices), 1 / size.choices, device=bench.device, dtype=dtype)
    target = torch.randn_like(hidden)

    def drawn(load: Load, step: int) -> tuple[Batch, Int64]:
        index = load.draw(size, group.rank, group.size, step).to(bench.device)
        return Batch(hidden, index, weight, target), gather_counts(group, index, weight, size.experts)

    before = [drawn(load, 0)[1] for load, _ in turns]
    for nth in range(rounds + 1):
        for turn, (load, methods) in enumerate(turns):
            batch, counts = drawn(load, nth + 1)
            for method in methods:
                if isinstance(method.layer, FullyShardedExperts):
                    plan_layout(method.layer, before[turn], spare)
                run(bench, method, batch, warming=nth == 0)
            before[turn] = counts


def run(bench: Bench, method: Method, batch: Batch, *, warming: bool) -> None:
    """Measure a step and a forward pass of a method; or, while it is `warming`, its memory."""
    layer, tokens = method.layer, (batch.hidden, batch.index, batch.weight)
    layer.zero_grad()
    batch.hidden.grad = None
    (parameter,) = layer.parameters()

    def forward() -> None:
        with torch.no_grad():
            layer(*tokens)

    def step() -> None:
        layer(*tokens).backward(batch.target)

    if warming:
        start = bench.start_peak()
        step()
        method.memory = int(bench.largest(bench.peak() - start + parameter.nbytes)) + lasting(layer)
        forward()
        return
    method.forward.append(bench.seconds(forward))
    layer.traffic.clear()
    method.step.append(bench.seconds(step))
    method.sent.append(bench.mean(layer.traffic.total()))
    planning, loads = plan_again(bench, layer, batch.index, batch.weight)
    method.planning.append(planning)
    method.imbalance.append(float(loads.max() / loads.mean()))


def lasting(layer: Layer) -> int:
    """Bytes that passes without the host hold between passes, too."""
    return layer.exchange.memory.own.nbytes if isinstance(layer, ResidentExperts) and layer.exchange else 0


def plan_again(bench: Bench, layer: Layer, index: Tensor, weight: Tensor) -> tuple[float, Int64]:
    """Seconds of what a pass does before it can dispatch, on its own, and the load of each rank."""
    group = layer.group
    bench.finish()
    dist.barrier()
    bench.finish()
    start = perf_counter()
    counts = gather_counts(group, index, weight, layer.experts)
    if isinstance(layer, ResidentExperts):
        plan = layer.planner.plan(counts)
        Loan.of(plan, layer.homes, group.rank)
        return bench.largest(perf_counter() - start), plan.load.copy()
    layer.route(counts)
    return bench.largest(perf_counter() - start), layer.device_loads(counts)


def calibrate(bench: Bench, size: Size, dtype: torch.dtype) -> tuple[float, float]:
    """Tokens that a rank computes while it receives one expert, and seconds of one token; the same on all ranks."""
    rows = torch.randn(2048, size.hidden, device=bench.device, dtype=dtype)
    flat = torch.randn(1, size.shape.elements, device=bench.device, dtype=dtype)
    group = bench.group
    ahead = [int(rank == (group.rank + 1) % group.size) for rank in range(group.size)]
    behind = [int(rank == (group.rank - 1) % group.size) for rank in range(group.size)]

    def send() -> None:
        group.exchange(flat, ahead, behind, weights=True, traffic=Traffic(), purpose="weights.forward").wait()

    with torch.no_grad():
        per_token = min(bench.seconds(lambda: feed_forward(size.shape, flat, rows, [2048])) for _ in range(5)) / 2048
    latency = min(bench.seconds(lambda: dist.barrier()) for _ in range(5)) / 2
    transfer = min(bench.seconds(send) for _ in range(5))
    bytes_per_s = flat.nbytes / max(transfer - latency, 1e-6)
    return transfer_tokens(flat.nbytes, Link(bytes_per_s), per_token), per_token


def new_table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    names = ("load", "method", "imbalance", "forward ms", "step ms", "forward x", "step x", "ideal x", "gain", "LLEP x")
    for column in (*names, "GiB", "EP/this", "LLEP", "of balanced", "planning us", "MB sent"):
        table.add_column(column, justify="left" if column in ("load", "method") else "right")
    return table


def figures(methods: list[Method]) -> dict[str, float]:
    """Of one load: the imbalance of static experts, and of each method milliseconds of a step and of a forward pass,
    and its peak of memory in GiB.
    """
    found: dict[str, float] = {"ideal": statistics.median(methods[0].imbalance)}
    for method in methods:
        found[method.name] = 1e3 * min(method.step)
        found[f"{method.name}_forward"] = 1e3 * min(method.forward)
        found[f"{method.name}_gib"] = method.memory / 2**30
    return found


def add_rows(
    table: Table,
    load: Load,
    methods: list[Method],
    even: dict[str, float],
    published: dict[str, str],
    memory: dict[str, str],
) -> None:
    static = methods[0]
    ideal = statistics.median(static.imbalance)
    for method in methods:
        forward = min(static.forward) / min(method.forward)
        step = min(static.step) / min(method.step)
        is_static, is_llep = method is static, method.name == "llep"
        table.add_row(
            load.name if is_static else "",
            method.name,
            f"{statistics.median(method.imbalance):.3f}",
            f"{1e3 * min(method.forward):.1f}",
            f"{1e3 * min(method.step):.1f}",
            f"{forward:.2f}",
            f"{step:.2f}",
            f"{ideal:.2f}",
            "" if is_static or ideal < 1.05 else f"{(step - 1) / (ideal - 1):.0%}",
            published.get(load.name, "") if is_llep else "",
            f"{method.memory / 2**30:.3f}",
            f"{static.memory / method.memory:.2f}",
            memory.get(load.name, "") if is_llep else "",
            f"{method.memory / 2**30 / even['static_gib']:.2f}",
            f"{1e6 * statistics.median(method.planning):.0f}",
            "" if method.name == "device" else f"{statistics.median(method.sent) / 1e6:.1f}",
            end_section=method is methods[-1],
        )


if __name__ == "__main__":
    main()
