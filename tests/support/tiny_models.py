"""Tiny random models of transformers, the same in every process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

EXPERTS, WORDS, HIDDEN, WIDTH = 5, 32, 16, 12

_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": WIDTH, "num_local_experts": EXPERTS},
    "qwen3_moe": {"intermediate_size": 24, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "head_dim": 8},
    "gpt_oss": {
        "intermediate_size": WIDTH, "num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2,
    },
    "llama4_text": {  # calls experts with rows of all tokens for each
        "intermediate_size": WIDTH, "intermediate_size_mlp": 24, "num_local_experts": EXPERTS, "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    "longcat_flash": {  # with choices that are the identity, and layers of one MoE block and two dense ones
        "num_layers": 2, "num_key_value_heads": 2, "n_routed_experts": EXPERTS, "zero_expert_num": 3, "moe_topk": 2,
        "expert_ffn_hidden_size": WIDTH, "ffn_hidden_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    },
    "deepseek_v3": {  # with shared experts, and a dense layer before
        "intermediate_size": 24, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip


def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of two layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that transformers imports
        import transformers
    torch.manual_seed(0)
    sizes = {
        "vocab_size": WORDS, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **sizes | _FAMILIES[family])
    make: Callable[..., nn.Module] = transformers.AutoModelForCausalLM.from_config
    model = make(config, experts_implementation="eager").to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # zeros in a fresh model
            nn.init.normal_(parameter, std=0.1)
        if name.endswith("gate_up_proj"):  # of LongCat-Flash, for choices that are the identity: nothing uses them
            nn.init.zeros_(parameter[EXPERTS:])
    return model
