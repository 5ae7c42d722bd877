"""A small Qwen3-MoE in torchtitan's own Trainer, on CPUs with gloo: with moeplan one flag of its command line is new.

    torchrun --nproc-per-node 2 examples/integrations/torchtitan_trainer.py FOLDER static
    torchrun --nproc-per-node 2 examples/integrations/torchtitan_trainer.py FOLDER spill '{"spare": 2}'

It trains for 20 steps from a seed, saves with torchtitan's checkpointer, loads that again in another Trainer without
moeplan, and prints a line of JSON. On GPUs nothing but the flag is needed:

    ... torchtitan.train --override.imports 'moeplan.runtime_client.integrations.torchtitan.spill={"spare": 2}'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class _Cpu(ModuleType):
    """What torchtitan asks a device for, of this machine."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, _: object) -> str:
        return "CPU"

    def get_device_properties(self, _: object) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, _: object) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


if not torch.cuda.is_available():  # then torchtitan takes CUDA all the same
    import torchtitan.tools.utils as devices

    devices.device_type, devices.device_module = "cpu", _Cpu("cpu")

    import torchtitan.distributed.fsdp as fsdp

    if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13 lacks it
        torch.distributed.set_timeout = lambda *_: None  # type: ignore[attr-defined]

    without_division = fsdp.disable_fsdp_gradient_division

    def with_plain_sums(model: Any) -> None:  # gloo has no sum with a factor
        without_division(model)
        for module in model.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = with_plain_sums

import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import DebugConfig, OverrideConfig, ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import model_registry
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

STEPS, LENGTH = 20, 32


class SkewedText(BaseDataLoader):
    """Sequences of a few words, so that some experts have far more tokens than others."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_rank: int, local_batch_size: int, **_: Any) -> None:
        self.rank, self.size, self.read = dp_rank, local_batch_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            rng = torch.Generator().manual_seed(1000 * self.read + self.rank)
            words = (torch.rand(self.size, LENGTH + 1, generator=rng) ** 4 * 64).long()
            self.read += 1
            yield {"input": words[:, :-1].contiguous()}, words[:, 1:].contiguous()

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.read = state_dict["read"]


class NoTokenizer(BaseTokenizer):
    """The words are numbers."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return 2048


def configuration(folder: Path, mode: str, options: dict[str, Any]) -> Trainer.Config:
    spec = model_registry("debugmodel_moe")
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.moe.routed_experts.inner_experts.hidden_dim = 64
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # the others need a GPU to train
    ours = f"moeplan.runtime_client.integrations.torchtitan.{mode}"
    return Trainer.Config(
        model_spec=spec,
        dump_folder=str(folder / mode),
        loss=CrossEntropyLoss.Config(global_vocab_size=2048),
        tokenizer=NoTokenizer.Config(),
        dataloader=SkewedText.Config(),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=4, seq_len=LENGTH, steps=STEPS, disable_cuda_graphs=True),
        parallelism=ParallelismConfig(
            expert_parallel_degree=int(os.environ["WORLD_SIZE"]), spmd_backend="partial_dtensor"
        ),
        activation_checkpoint=None,
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=STEPS, last_save_model_only=False),
        debug=DebugConfig(seed=1),
        override=OverrideConfig(imports=[(ours, options)] if mode != "static" else []),  # the flag
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.model_parts[0].state_dict()
    return {name: part.to_local() if hasattr(part, "to_local") else part for name, part in state.items()}


def main(folder: Path, mode: str, options: str = "{}") -> None:
    init_logger()
    trainer = configuration(folder, mode, json.loads(options)).build()
    losses: list[float] = []
    imbalances: list[tuple[float, float]] = []
    log = trainer.metrics_processor.log

    def keep(step: int, loss: float, *rest: Any, **named: Any) -> None:
        losses.append(loss)
        log(step, loss, *rest, **named)
        if mode != "static":
            imbalances.append(trainer.model_parts[0].layers["0"].moe.routed_experts.balancer.imbalance)

    trainer.metrics_processor.log = keep
    trainer.train()
    trained = weights(trainer)
    again = configuration(folder, mode, {})
    again.override = OverrideConfig()
    other = again.build()
    other.checkpointer.load(step=STEPS)
    same = all(torch.equal(part, trained[name]) for name, part in weights(other).items())
    if dist.get_rank() == 0:
        print(json.dumps({"mode": mode, "losses": losses, "imbalances": imbalances[1:], "loaded_again": same}))
    for each in (trainer, other):
        each.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
