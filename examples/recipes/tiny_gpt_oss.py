"""A tiny gpt-oss in double precision, as transformers makes it, and sequences to train it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

WORDS, LENGTH = 32, 9


def tiny_gpt_oss() -> Any:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=64,
        layer_types=["full_attention"] * 2, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")
    exact_norms(model)
    return model


def exact_norms(model: nn.Module) -> None:
    """Norms of torch, as those of transformers compute in single precision, which no comparison to 1e-10 allows."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "GptOssRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, norm)


def sequences(number: int = 80) -> list[dict[str, torch.Tensor]]:
    """In the form that a Trainer takes."""
    words = torch.randint(WORDS, (number, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in words]
