"""What the recipes train: a small MoE model in double precision, whose experts are made like those of transformers.

Any model of transformers can take its place. Each rank takes its part of a batch that depends on the step alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

HIDDEN, WIDTH, EXPERTS, TOP_K, WORDS, LAYERS, TOKENS = 8, 6, 4, 2, 16, 2, 48


class Experts(nn.Module):
    """A fused experts module."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.3 * torch.randn(EXPERTS, 2 * WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            token, choice = torch.where(index == expert)
            gate, up = functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            results = functional.linear(functional.silu(gate) * up, self.down_proj[expert])
            out = out.index_add(0, token, results * weight[token, choice, None])
        return out


class Block(nn.Module):
    """Router and experts, beside an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), Experts()

    def forward(self, hidden: Tensor) -> Tensor:
        weight, index = self.gate(hidden).softmax(dim=-1).topk(TOP_K)
        output: Tensor = hidden + self.experts(hidden, index, weight)
        return output


class SmallModel(nn.Module):
    """Predicts the next word from the one before; calling it gives the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, words: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.blocks(self.embedding(words))), following(words))


def small_model() -> SmallModel:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return SmallModel().double()


def following(words: Tensor) -> Tensor:
    """The words to predict."""
    return (3 * words + 1) % WORDS


def words_of(step: int, rank: int | None = None, ranks: int | None = None) -> Tensor:
    """The part of a step's words that is this rank's."""
    words = torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(step))
    rank = (dist.get_rank() if dist.is_initialized() else 0) if rank is None else rank
    ranks = (dist.get_world_size() if dist.is_initialized() else 1) if ranks is None else ranks
    return words.tensor_split(ranks)[rank]
