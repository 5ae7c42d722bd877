"""Activation checkpointing and torch.compile: torchrun --nproc-per-node 2 examples/recipes/checkpointing.py

A model of transformers does the same with model.gradient_checkpointing_enable().
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from small import small_model, words_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client import ExpertGradients, ExpertGroup, FullyShardedExperts, replace_experts


def train(steps: int = 20, backend: str = "inductor") -> nn.Module:
    group = ExpertGroup.create()
    model = small_model()
    replace_experts(model, partial(FullyShardedExperts, group=group))
    for name, block in model.blocks.named_children():
        setattr(model.blocks, name, checkpoint_wrapper(block))
    gradients = ExpertGradients(model)  # after its blocks are wrapped, before the whole is
    wrapped = DistributedDataParallel(torch.compile(model, backend=backend))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for step in range(steps):
        wrapped(words_of(step)).backward()
        gradients.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()
