"""A small Mixtral in transformers' own Trainer, its experts shared out over ranks: with moeplan five lines are new.

    python examples/integrations/transformers_trainer.py MODEL_FOLDER
    torchrun --nproc-per-node 2 examples/integrations/transformers_trainer.py MODEL_FOLDER spill

The first command makes the model. The second trains it for 20 steps, saves it with `Trainer.save_model`, and prints a
line of JSON; the last word is static (without moeplan), record, spill or planned.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")  # of libraries that transformers imports
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

STEPS, WORDS, LENGTH = 20, 64, 32


class SkewedText(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of a few words, so that some experts have far more tokens than others."""

    def __len__(self) -> int:
        return 16 * STEPS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(number)
        words = (torch.rand(LENGTH, generator=rng) ** 4 * WORDS).long()
        return {"input_ids": words, "labels": words}


class Imbalances(TrainerCallback):
    """Keeps the imbalance of every step, and gives a planner time for its first layouts: these steps are short."""

    def __init__(self, balancer: Any) -> None:
        self.balancer = balancer
        self.seen: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.balancer.imbalance)
        session = self.balancer.session
        end = time.monotonic() + 60
        while session is not None and session.status.newest == 0 and self.balancer.steps == 5:
            time.sleep(0.05)
            if time.monotonic() > end:
                break


def make(folder: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(folder: Path, implementation: str) -> Any:
    ranks = int(os.environ["WORLD_SIZE"])
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=implementation)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def main(folder: Path, mode: str, *options: str) -> None:
    dist.init_process_group("gloo")
    callbacks: list[TrainerCallback] = []
    if mode != "static":
        from moeplan.runtime_client.integrations.transformers import balance  # line 1

        balancer = balance(mode, spare=2, **dict(option.split("=", 1) for option in options))  # line 2
        callbacks.append(Imbalances(balancer))
    model = load(folder, "moeplan" if mode != "static" else "auto")  # line 3: ep_implementation="moeplan"
    arguments = TrainingArguments(
        output_dir=str(folder / mode), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=SkewedText(), callbacks=callbacks)
    trainer.train()
    trainer.save_model(str(folder / mode))
    again = load(folder / mode, "auto")  # by the framework's own experts
    same = all(
        torch.equal(a.to_local() if hasattr(a, "to_local") else a, b.to_local() if hasattr(b, "to_local") else b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    if dist.get_rank() == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seen = [balance for callback in callbacks for balance in getattr(callback, "seen", [])]
        print(json.dumps({"mode": mode, "losses": losses, "imbalances": seen[1:], "loaded_again": same}))
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
