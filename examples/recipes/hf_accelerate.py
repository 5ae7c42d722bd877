"""Hugging Face accelerate: torchrun --nproc-per-node 2 examples/recipes/hf_accelerate.py"""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from small import small_model, words_of
from torch import nn

from moeplan.runtime_client import ExpertGradients, ExpertGroup, FullyShardedExperts, replace_experts


def train(steps: int = 20) -> nn.Module:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    group = ExpertGroup.create()
    model = small_model()
    replace_experts(model, partial(FullyShardedExperts, group=group))
    gradients = ExpertGradients(model)  # before prepare, which wraps the model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for step in range(2 * steps):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(words_of(step)))
            if accelerator.sync_gradients:
                gradients.clip_grad_norm_(0.1)  # not accelerator.clip_grad_norm_
            optimizer.step()
            optimizer.zero_grad()
    return model


if __name__ == "__main__":
    train()
    Accelerator().end_training()
