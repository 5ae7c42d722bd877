"""A small model whose MoE blocks are made like those of transformers 5, in double precision throughout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN, WIDTH, EXPERTS, TOP_K, WORDS, LAYERS = 8, 6, 4, 2, 16, 2


class FusedExperts(nn.Module):
    """Experts with the parameters, attributes and call of transformers' own, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(0.3 * torch.randn(EXPERTS, 2 * WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(0.3 * torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            gate, up = functional.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            results = functional.linear(self.gated(gate, up), self.down_proj[expert])
            out = out.index_add(0, token, (results * top_k_weights[token, choice, None]).to(out.dtype))
        return out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        activated: Tensor = self.act_fn(gate) * up
        return activated


class Block(nn.Module):
    """Router and experts, beside an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), FusedExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        weight, index = self.gate(hidden).softmax(dim=-1).topk(TOP_K)
        output: Tensor = hidden + self.experts(hidden, index, weight)
        return output


class FusedModel(nn.Module):
    """Predicts the next word from the one before; calling it gives the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, words: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.blocks(self.embedding(words))), (3 * words + 1) % WORDS)


def fused_model(dtype: torch.dtype = torch.float64) -> FusedModel:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return FusedModel().to(dtype)


def words_of(step: int, rank: int, ranks: int, tokens: int = 48) -> Tensor:
    """A rank's equal part of the words of a step."""
    words = torch.randint(WORDS, (tokens,), generator=torch.Generator().manual_seed(step))
    return words.tensor_split(ranks)[rank]
