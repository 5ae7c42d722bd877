"""A small GPT of Megatron-core in its own DDP, on CPUs with gloo: with moeplan two lines are new.

    torchrun --nproc-per-node 2 examples/integrations/megatron_loop.py FOLDER static
    torchrun --nproc-per-node 2 examples/integrations/megatron_loop.py FOLDER spill

It trains for 20 steps from a seed, saves with Megatron's distributed checkpointing, loads that into a model without
moeplan, and prints a line of JSON; the last word is static (without moeplan), record, spill or planned.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")  # of libraries that Megatron looks for

if not torch.cuda.is_available():  # Megatron asks for the current device even to make models on a CPU
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 asks for it even where Transformer Engine is not installed
    moe_utils.te_general_gemm = None

if not torch.cuda.is_available():  # nor are there random states of a GPU to fork; nothing here is dropped
    CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()

STEPS, WORDS, LENGTH, EXPERTS = 20, 64, 32, 8


def batches() -> Iterator[torch.Tensor]:
    """Sequences of a few words, so that some experts have far more tokens than others."""
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        yield (torch.rand(4, LENGTH + 1, generator=rng) ** 4 * WORDS).long()


def make(spec: Any) -> GPTModel:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, moe_ffn_hidden_size=48,
        num_moe_experts=EXPERTS, moe_router_topk=2, moe_token_dispatcher_type="allgather", moe_aux_loss_coeff=1e-2,
        moe_router_load_balancing_type="aux_loss", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, expert_model_parallel_size=dist.get_world_size(), use_cpu_initialization=True,
        init_method_std=0.2, hidden_dropout=0, attention_dropout=0, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    return GPTModel(config, spec, WORDS, LENGTH)


def loss_of(model: Any, words: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(LENGTH).expand(len(words), -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    loss: torch.Tensor = model(words[:, :-1], positions, mask, labels=words[:, 1:].contiguous()).mean()
    return loss


def main(folder: Path, mode: str, *options: str) -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    spec = plain = get_gpt_layer_local_spec(num_experts=EXPERTS)
    if mode != "static":
        from moeplan.runtime_client.integrations.megatron import balance  # line 1

        more: dict[str, Any] = dict(option.split("=", 1) for option in options)
        spec = balance(plain, mode, **more)  # line 2
    gpt = make(spec)
    model = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, imbalances = [], []
    for step, words in enumerate(batches()):
        model.zero_grad_buffer()
        loss = loss_of(model, words)
        loss.backward()
        finalize_model_grads([model])
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad.to(parameter.dtype)
        optimizer.step()
        dist.all_reduce(mean := loss.detach().clone())
        losses.append(float(mean) / dist.get_world_size())
        if mode != "static":
            balancer = gpt.decoder.layers[0].mlp.balancer
            imbalances.append(balancer.imbalance)
            end = time.monotonic() + 60  # these steps are short: a planner gets time for its first layouts
            while step == 5 and balancer.session and not balancer.session.status.newest and time.monotonic() < end:
                time.sleep(0.05)
    saved = folder / mode
    if dist.get_rank() == 0:
        saved.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(gpt.sharded_state_dict(), str(saved))
    other = make(plain)
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(saved)))
    same = all(torch.equal(a, b) for a, b in zip(gpt.parameters(), other.parameters(), strict=True))
    if dist.get_rank() == 0:
        print(json.dumps({"mode": mode, "losses": losses, "imbalances": imbalances[1:], "loaded_again": same}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
