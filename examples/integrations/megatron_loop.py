"""A small GPT of Megatron-core in its own DDP and schedules, on CPUs with gloo: with moeplan two lines are new.

    torchrun --nproc-per-node 2 examples/integrations/megatron_loop.py FOLDER static
    torchrun --nproc-per-node 2 examples/integrations/megatron_loop.py FOLDER spill
    torchrun --nproc-per-node 4 examples/integrations/megatron_loop.py FOLDER spill expert=2 pipeline=2

It trains for 20 steps of four micro-batches from a seed, saves with Megatron's distributed checkpointing, loads that
into a model without moeplan, saves again, loads that with moeplan, and prints a line of JSON. The word is static
(without moeplan), record, spill or planned. There are `pipeline` stages of data-parallel ranks, over `expert` of which
the experts are spread; by default there is one stage, and its experts are spread over all. `router` is aux_loss or
expert_bias. Other options go to `balance`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

warnings.filterwarnings("ignore")  # of libraries that Megatron looks for

if not torch.cuda.is_available():  # Megatron asks for the current device even to make models on a CPU
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what Megatron's schedules make on a GPU by name, which is a counter of tokens."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 asks for it even where Transformer Engine is not installed
    moe_utils.te_general_gemm = None

if not torch.cuda.is_available():  # nor are there random states of a GPU to fork; nothing here is dropped
    CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()

STEPS, MICRO_BATCHES, WORDS, LENGTH, EXPERTS = 20, 4, 64, 32, 8


def batches() -> Iterator[torch.Tensor]:
    """Micro-batches of a few words, so that some experts have far more tokens than others; stages see the same ones."""
    rank = parallel_state.get_data_parallel_rank()
    for step in range(STEPS * MICRO_BATCHES):
        rng = torch.Generator().manual_seed(1000 * step + rank)
        yield (torch.rand(1, LENGTH + 1, generator=rng) ** 4 * WORDS).long()


ROUTERS: dict[str, dict[str, Any]] = {
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2},
    "expert_bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_z_loss_coeff": 1e-3,
    },
}
"""What evens the load in training, beside us."""


def make(spec: Any, router: str) -> GPTModel:
    torch.manual_seed(parallel_state.get_pipeline_model_parallel_rank())
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, moe_ffn_hidden_size=48,
        num_moe_experts=EXPERTS, moe_router_topk=2, moe_token_dispatcher_type="allgather", **ROUTERS[router],
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
         use_cpu_initialization=True, init_method_std=0.2, hidden_dropout=0, attention_dropout=0,
        bias_dropout_fusion=False, gradient_accumulation_fusion=False, pipeline_dtype=torch.float32,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )  # fmt: skip
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    return GPTModel(config, spec, WORDS, LENGTH, pre_process=first, post_process=last)


def forward(data: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """What the schedules ask for: a stage's output of a micro-batch, and how a loss is made of the last one's."""
    words = next(data)
    positions = torch.arange(LENGTH).expand(len(words), -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    output: torch.Tensor = model(words[:, :-1], positions, mask, labels=words[:, 1:].contiguous())
    return output, mean


def mean(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = output.mean()
    return loss, loss.detach().clone()


def mean_of_ranks(losses: list[torch.Tensor]) -> float:
    """The mean over micro-batches and data-parallel ranks, of which the last stages know theirs."""
    both = torch.tensor([float(sum(losses)), len(losses)])
    dist.all_reduce(both)
    return float(both[0] / both[1])


def a_batch() -> dict[str, Any]:
    return {"data_iterator": batches(), "num_microbatches": 1, "micro_batch_size": 1, "forward_only": True}


def save(model: GPTModel, folder: Path) -> str:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))
    return str(folder)


def load(model: GPTModel, folder: str) -> None:
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))


def main(folder: Path, mode: str, *given: str) -> None:
    options: dict[str, Any] = dict(option.split("=", 1) for option in given)
    pipeline = int(options.pop("pipeline", 1))
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=int(options.pop("expert", dist.get_world_size() // pipeline)),
    )
    router = options.pop("router", "aux_loss")
    spec = plain = get_gpt_layer_local_spec(num_experts=EXPERTS)
    if mode != "static":
        from moeplan.runtime_client.integrations.megatron import balance  # line 1

        spec = balance(plain, mode, **options)  # line 2
    gpt = make(spec, router)
    model = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
    gpt.config.finalize_model_grads_func = finalize_model_grads
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = partial(get_forward_backward_func(), forward_step_func=forward, model=[model], seq_length=LENGTH)
    data = batches()
    losses, imbalances = [], []
    for step in range(STEPS):
        model.zero_grad_buffer()
        losses.append(mean_of_ranks(run(data_iterator=data, num_microbatches=MICRO_BATCHES, micro_batch_size=1)))
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad.to(parameter.dtype)
        optimizer.step()
        if mode != "static":
            balancer = gpt.decoder.layers[0].mlp.balancer
            imbalances.append(balancer.imbalance)
            end = time.monotonic() + 60  # these steps are short: a planner gets time for its first layouts
            while step == 5 and balancer.session and not balancer.session.status.newest and time.monotonic() < end:
                time.sleep(0.05)
    other, again = make(plain, router), make(spec, router)
    load(other, save(gpt, folder / mode))
    load(again, save(other, folder / f"{mode}-and-back"))
    checks = [mean_of_ranks(run(model=[checked.eval()], **a_batch())) for checked in (gpt, other)]
    same = all(torch.equal(a, b) for a, b in zip(gpt.parameters(), again.parameters(), strict=True))
    mine = {
        "imbalances": imbalances[1:],
        "biases": [layer.mlp.router.expert_bias.tolist() for layer in gpt.decoder.layers if router == "expert_bias"],
        "same": same and abs(checks[0] - checks[1]) < 1e-5,
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        steps = zip(*(rank["imbalances"] for rank in ranks), strict=True)
        answer = {
            "losses": losses,
            "imbalances": [tuple(sum(rank) / len(ranks) for rank in zip(*step, strict=True)) for step in steps],
            "biases": [rank["biases"] for rank in ranks],
            "loaded_again": all(rank["same"] for rank in ranks),
        }
        print(json.dumps({"mode": mode} | answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.nullcontext() if torch.cuda.is_available() else OnCpu():
        main(Path(sys.argv[1]), *sys.argv[2:])
