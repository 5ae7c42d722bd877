"""Train a small Mixture-of-Experts language model on bytes, with static expert parallelism or with moeplan.

    torchrun --nproc-per-node 2 examples/train_moe_lm.py --mode static
    moeplan serve &
    torchrun --nproc-per-node 2 examples/train_moe_lm.py --mode planned --planner 127.0.0.1:7433
    torchrun --nproc-per-node 4 examples/train_moe_lm.py --mode spill
    torchrun --nproc-per-node 8 examples/train_moe_lm.py --mode spill --size large    # on eight GPUs

The text is what every Python has: the sources of its standard library, and its documentation. The kind of text changes
every `--shift` steps, and with it the experts that are busy. No loss balances them.

``static`` is plain expert parallelism: each expert at home on one rank. ``spill`` lends experts to idle ranks, planned
in each pass from known counts. ``planned`` shards every expert over the ranks, and a planner's daemon decides which
rank computes which; without a daemon it trains all the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moeplan.api import Forecast, Replan
from moeplan.runtime_client import (
    AgreementError,
    ExpertGroup,
    ExpertShape,
    FullyShardedExperts,
    LoanBuffer,
    PlannedLayer,
    PlannerSession,
    ResidentExperts,
    chain,
    record,
)
from moeplan.solvers import QuotaPlanner, SolveParameters, SpillOptions

TOP_K = 2
Experts = FullyShardedExperts | ResidentExperts


@dataclass(frozen=True)
class Size:
    """A model, the text of one rank in a step (`batch` pieces of `sequence` bytes), and the learning rate."""

    experts: int
    hidden: int
    width: int
    heads: int
    blocks: int
    sequence: int
    batch: int
    rate: float


SIZES = {
    "small": Size(experts=8, hidden=128, width=512, heads=4, blocks=2, sequence=128, batch=24, rate=3e-3),
    # For GPUs: 1.2 billion parameters.
    "large": Size(experts=32, hidden=1024, width=2048, heads=8, blocks=6, sequence=512, batch=32, rate=3e-4),
}


class Block(nn.Module):
    """Attention, then experts."""

    def __init__(self, size: Size, experts: Experts) -> None:
        super().__init__()
        hidden = size.hidden
        self.heads = size.heads
        self.attention_norm, self.expert_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.inputs, self.outputs = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.router = nn.Linear(hidden, experts.experts, bias=False)
        self.experts = experts

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        """[batch, sequence, hidden] to the same."""
        heads = self.inputs(self.attention_norm(hidden_bsh)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_bsh = hidden_bsh + self.outputs(mixed.transpose(1, 2).flatten(2))
        tokens_th = self.expert_norm(hidden_bsh).flatten(0, 1)
        weight_tk, index_tk = self.router(tokens_th).softmax(dim=-1).topk(TOP_K)
        weight_tk = weight_tk / weight_tk.sum(dim=-1, keepdim=True)
        # What experts compute in is what tokens travel in.
        tokens_th, weight_tk = (part.to(self.experts.compute_dtype) for part in (tokens_th, weight_tk))
        return hidden_bsh + self.experts(tokens_th, index_tk, weight_tk).view_as(hidden_bsh)


class Model(nn.Module):
    """A causal language model on bytes."""

    def __init__(self, size: Size, layers: Sequence[Experts]) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, size.hidden), nn.Embedding(size.sequence, size.hidden)
        self.blocks = nn.ModuleList(Block(size, experts) for experts in layers)
        self.norm, self.head = nn.LayerNorm(size.hidden), nn.Linear(size.hidden, 256)

    def forward(self, text_bs: Tensor) -> Tensor:
        """Mean loss of predicting each next byte of int64[batch, sequence + 1]."""
        hidden_bsh = self.embedding(text_bs[:, :-1]) + self.position.weight
        for block in self.blocks:
            hidden_bsh = block(hidden_bsh)
        return functional.cross_entropy(self.head(self.norm(hidden_bsh)).flatten(0, 1), text_bs[:, 1:].flatten())


def read_domains() -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """Bytes of each kind of text: programs, prose, tables of characters, tests of numbers."""
    library = Path(sysconfig.get_paths()["stdlib"])
    import pydoc_data.topics

    prose = "\n".join(pydoc_data.topics.topics.values()).encode()
    programs = b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:60])
    tables = b"".join(path.read_bytes() for path in sorted((library / "encodings").glob("cp*.py")))
    page = b"".join(path.read_bytes() for path in sorted((library / "idlelib").glob("*.html")))
    kinds = [programs, prose, tables, page or bytes(reversed(prose))]
    return [np.frombuffer(kind, np.uint8) for kind in kinds]


def batches(size: Size, rank: int, ranks: int, shift: int) -> Iterator[Tensor]:
    """int64[batch, sequence + 1] of this rank, for ever; the kind of text changes every `shift` steps."""
    domains = read_domains()
    step = 0
    while True:
        text = domains[step // shift % len(domains)]
        rng = np.random.default_rng([step, rank, ranks])
        starts = rng.integers(0, len(text) - size.sequence - 1, size.batch)
        yield torch.from_numpy(np.stack([text[start : start + size.sequence + 1] for start in starts]).astype(np.int64))
        step += 1


def make_layers(mode: str, size: Size, group: ExpertGroup, device: torch.device) -> list[Experts]:
    """The experts of each block, with the same weights in every mode and on any number of ranks."""
    shape, buffer = ExpertShape(size.hidden, size.width), LoanBuffer()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers: list[Experts] = []
    for block in range(size.blocks):
        layer: Experts
        if mode == "planned":
            layer = FullyShardedExperts(shape, size.experts, group, compute_dtype=dtype, device=device, reshard=False)
        else:
            spare = 2 if mode == "spill" else 0
            planner = QuotaPlanner(SpillOptions.uniform(size.experts, group.size, spare), group.size)
            layer = ResidentExperts(
                shape, size.experts, group, planner=planner, buffer=buffer, compute_dtype=dtype, device=device
            )
        random = torch.Generator(device).manual_seed(block)
        for expert in range(size.experts):
            flat = torch.empty(1, shape.elements, device=device)
            layer.load_experts(expert, flat.normal_(0, size.hidden**-0.5 / 3, generator=random))
        layers.append(layer)
    chain([layer for layer in layers if isinstance(layer, FullyShardedExperts)])
    return layers


def device_loads(layer: Experts, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64[devices]: tokens that each rank computed, from counts int64[devices, experts]."""
    if isinstance(layer, FullyShardedExperts):
        return layer.device_loads(counts)
    return layer.planner.plan(counts).load.copy()


def main() -> None:
    """Train; the first rank writes one line of JSON per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mode", choices=("static", "spill", "planned"), default="static")
    parser.add_argument("--planner", help="address of the daemon, with --mode planned")
    parser.add_argument("--job", default="train-moe-lm", help="id of the job at the daemon")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--shift", type=int, default=20, help="steps of one kind of text")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--experts", type=int, help="experts of a layer, if not the size's own")
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
    torch.manual_seed(0)
    layers = make_layers(arguments.mode, size, group, device)
    model = Model(size, layers).to(device)
    shared = [weight for name, weight in model.named_parameters() if ".experts." not in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate)
    session = connect(arguments, size, layers, group) if arguments.mode == "planned" and arguments.planner else None
    recorder = record(model)
    text = batches(size, group.rank, group.size, arguments.shift)
    lines = arguments.out.open("w") if arguments.out and group.rank == 0 else sys.stdout
    try:
        for step in range(arguments.steps):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(next(text).to(device))
            loss.backward()
            average(model, shared, group)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            recorder.step()
            counts = recorder.finish()
            assert counts is not None
            everyone = [torch.empty(counts.shape, dtype=torch.int64) for _ in range(group.size)]
            dist.all_gather(everyone, torch.from_numpy(counts))
            table = torch.stack(everyone, dim=1).numpy()
            loads = [device_loads(layer, counts) for layer, counts in zip(layers, table, strict=True)]
            mean_loss = loss.detach() / group.size
            dist.all_reduce(mean_loss)
            if group.rank == 0:
                line = {
                    "step": step,
                    "loss": float(mean_loss),
                    "seconds": seconds,
                    "tokens_per_second": group.size * size.batch * size.sequence / seconds,
                    "imbalance": float(np.mean([load.max() / load.mean() for load in loads])),
                    "version": 0 if session is None else session.version,
                }
                print(json.dumps(line), file=lines, flush=True)
            if session is not None:
                session.step(counts)
        if session is not None:
            session.close()
    except AgreementError as error:
        print(f"rank {group.rank}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        recorder.close()
    dist.destroy_process_group()


def connect(arguments: argparse.Namespace, size: Size, layers: Sequence[Experts], group: ExpertGroup) -> PlannerSession:
    """A session with the daemon: new layouts from the last steps whenever they are better, as moving is free."""
    sharded = [layer for layer in layers if isinstance(layer, FullyShardedExperts)]

    def apply(plan: Sequence[PlannedLayer]) -> None:
        for layer, planned in zip(sharded, plan, strict=True):
            layer.plan = planned

    slots = -(-size.experts // group.size) + 1
    # Few candidates and a look at every fifth step: here the daemon has no cores of its own.
    return PlannerSession(
        arguments.planner,
        arguments.job,
        [layer.layout for layer in sharded],
        apply,
        slots=slots,
        parameters=SolveParameters(work_limit=500),
        forecast=Forecast(window_steps=4),
        replan=Replan(every_steps=5),
        timeout=timedelta(minutes=2),
    )


def average(model: nn.Module, shared: Sequence[nn.Parameter], group: ExpertGroup) -> None:
    """Average gradients over the ranks; those of experts hold the tokens of all ranks already."""
    flat = torch.cat([weight.grad.flatten() for weight in shared if weight.grad is not None])
    dist.all_reduce(flat)
    for weight, part in zip(shared, flat.split([weight.numel() for weight in shared]), strict=True):
        weight.grad = part.view_as(weight) / group.size
    for name, weight in model.named_parameters():
        if ".experts." in name and weight.grad is not None:
            weight.grad /= group.size


if __name__ == "__main__":
    main()
    # Layers refer to each other and to their process groups, whose threads must end before the interpreter does: one
    # that lets go of a tensor after that aborts the process.
    gc.collect()
