"""A small Mixture-of-Experts language model on bytes: its sizes, its text, its layers, and the parts of a step."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moeplan.runtime_client import (
    ExpertGroup,
    ExpertShape,
    FullyShardedExperts,
    LoanBuffer,
    ResidentExperts,
    SpillPlanner,
    chain,
)
from moeplan.solvers import SpillOptions

Experts = FullyShardedExperts | ResidentExperts


@dataclass(frozen=True)
class Size:
    """A model, the text of one rank in a step (`batch` pieces of `sequence` bytes), and the learning rate."""

    experts: int
    choices: int
    hidden: int
    width: int
    heads: int
    blocks: int
    sequence: int
    batch: int
    rate: float

    @property
    def shape(self) -> ExpertShape:
        return ExpertShape(self.hidden, self.width)

    @property
    def tokens(self) -> int:
        """Tokens of one rank in a step."""
        return self.batch * self.sequence


SIZES = {
    "tiny": Size(8, 2, hidden=64, width=128, heads=2, blocks=2, sequence=64, batch=8, rate=3e-3),
    "small": Size(8, 2, hidden=128, width=512, heads=4, blocks=2, sequence=128, batch=24, rate=3e-3),
    # For GPUs: 1.2, 3.2, 2.4 and 3.2 billion parameters.
    "large": Size(32, 2, hidden=1024, width=2048, heads=8, blocks=6, sequence=512, batch=32, rate=3e-4),
    "wide": Size(32, 2, hidden=2048, width=4096, heads=16, blocks=4, sequence=512, batch=32, rate=2e-4),
    "fine": Size(128, 8, hidden=2048, width=768, heads=16, blocks=4, sequence=512, batch=32, rate=2e-4),
    # Dimensions of gpt-oss-120b, without its biases and clamps.
    "gpt-oss": Size(32, 4, hidden=2880, width=2880, heads=45, blocks=4, sequence=512, batch=32, rate=2e-4),
}


class Router(nn.Module):
    """The best experts of each token, with weights that sum to one; no loss balances them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.score = nn.Linear(size.hidden, size.experts, bias=False)
        self.choices = size.choices

    def forward(self, tokens_th: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [tokens, choices] and experts int64[tokens, choices]."""
        weight_tk, index_tk = self.score(tokens_th).softmax(dim=-1).topk(self.choices)
        return weight_tk / weight_tk.sum(dim=-1, keepdim=True), index_tk


class Block(nn.Module):
    """Attention, then experts."""

    def __init__(self, size: Size, experts: Experts) -> None:
        super().__init__()
        hidden = size.hidden
        self.heads = size.heads
        self.attention_norm, self.expert_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.inputs, self.outputs = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.router: nn.Module = Router(size)
        self.experts = experts

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        """[batch, sequence, hidden] to the same."""
        heads = self.inputs(self.attention_norm(hidden_bsh)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_bsh = hidden_bsh + self.outputs(mixed.transpose(1, 2).flatten(2))
        tokens_th = self.expert_norm(hidden_bsh).flatten(0, 1)
        weight_tk, index_tk = self.router(tokens_th)
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
        with torch.autocast(text_bs.device.type, torch.bfloat16, enabled=text_bs.is_cuda):
            hidden_bsh = self.embedding(text_bs[:, :-1]) + self.position.weight
            for block in self.blocks:
                hidden_bsh = block(hidden_bsh)
            return functional.cross_entropy(self.head(self.norm(hidden_bsh)).flatten(0, 1), text_bs[:, 1:].flatten())

    def shared(self) -> list[nn.Parameter]:
        """The parameters of which every rank has a copy: all but the experts'."""
        return [weight for name, weight in self.named_parameters() if ".experts." not in name]


def backward(loss: Tensor, shared: Sequence[nn.Parameter], group: ExpertGroup) -> None:
    """Gradients of the mean loss over the ranks; those of experts hold the tokens of all ranks already."""
    # In this thread: launched by one of autograd's own, a step of `large` takes the host 4 to 7 ms longer.
    with torch.autograd.set_multithreading_enabled(False):
        (loss / group.size).backward()
    flat = torch.cat([weight.grad.flatten() for weight in shared if weight.grad is not None])
    dist.all_reduce(flat)
    for weight, part in zip(shared, flat.split([weight.numel() for weight in shared]), strict=True):
        weight.grad = part.view_as(weight)


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


def spill_options(size: Size, ranks: int) -> SpillOptions:
    """Room on every rank for a quarter as many experts as it has, and for two at least."""
    return SpillOptions.uniform(size.experts, ranks, max(2, math.ceil(size.experts / ranks / 4)))


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def resident_layers(
    size: Size,
    group: ExpertGroup,
    device: torch.device | str,
    planner: Callable[[], SpillPlanner],
    dtype: torch.dtype,
    **shared: Any,
) -> list[ResidentExperts]:
    """The experts of each block, each at home on one rank, with one buffer for what is lent; `exchange` as there."""
    buffer = LoanBuffer()
    return [
        ResidentExperts(
            size.shape,
            size.experts,
            group,
            planner=planner(),
            buffer=buffer,
            compute_dtype=dtype,
            device=device,
            **shared,
        )
        for _ in range(size.blocks)
    ]


def sharded_layers(
    size: Size, group: ExpertGroup, device: torch.device | str, dtype: torch.dtype, **shared: Any
) -> list[FullyShardedExperts]:
    """The experts of each block, each in equal parts on all ranks; `planner` and `memory` as there."""
    layers = [
        FullyShardedExperts(
            size.shape, size.experts, group, compute_dtype=dtype, device=device, reshard=False, **shared
        )
        for _ in range(size.blocks)
    ]
    chain(layers)
    return layers


def planned_slots(size: Size, ranks: int) -> int:
    """Slots of a rank in layouts of sharded experts: one more than needed."""
    return -(-size.experts // ranks) + 1


def load_random(size: Size, layers: Sequence[Experts], device: torch.device) -> None:
    """The same first weights for either kind of experts, on any number of ranks."""
    for block, layer in enumerate(layers):
        random = torch.Generator(device).manual_seed(block)
        for expert in range(size.experts):
            flat = torch.empty(1, size.shape.elements, device=device)
            layer.load_experts(expert, flat.normal_(0, size.hidden**-0.5 / 3, generator=random))


def device_loads(layer: Experts, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64[devices]: tokens that each rank computed, from counts int64[devices, experts]."""
    if isinstance(layer, FullyShardedExperts):
        return layer.device_loads(counts)
    return layer.planner.plan(counts).load.copy()
