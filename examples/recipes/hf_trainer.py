"""The Trainer of transformers: torchrun --nproc-per-node 2 examples/recipes/hf_trainer.py FOLDER"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from tiny_gpt_oss import sequences, tiny_gpt_oss
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from moeplan.runtime_client import ExpertGradients, ExpertGroup, ResidentExperts, replace_experts, save_pretrained


@dataclass
class Clipping(TrainerCallback):
    gradients: ExpertGradients

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients.clip_grad_norm_(0.1)


def train(folder: str, steps: int = 20) -> nn.Module:
    settings: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    settings |= {"save_strategy": "no", "report_to": "none", "train_sampling_strategy": "sequential"}
    settings |= {"lr_scheduler_type": "constant", "use_cpu": True}
    arguments = TrainingArguments(folder, max_grad_norm=0, **settings)  # 0, as the callback clips
    model = tiny_gpt_oss()
    replace_experts(model, partial(ResidentExperts, group=ExpertGroup.create()))
    Trainer(model, arguments, train_dataset=sequences(), callbacks=[Clipping(ExpertGradients(model))]).train()
    save_pretrained(model, folder)
    return model


if __name__ == "__main__":
    train(sys.argv[1])
