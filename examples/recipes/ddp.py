"""DistributedDataParallel: torchrun --nproc-per-node 2 examples/recipes/ddp.py"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from small import small_model, words_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client import ExpertGradients, ExpertGroup, FullyShardedExperts, replace_experts


def train(steps: int = 20) -> nn.Module:
    group = ExpertGroup.create()
    model = small_model()  # or AutoModelForCausalLM.from_pretrained(...)
    replace_experts(model, partial(FullyShardedExperts, group=group))
    gradients = ExpertGradients(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for step in range(steps):
        wrapped(words_of(step)).backward()
        gradients.clip_grad_norm_(0.1)  # not torch.nn.utils.clip_grad_norm_
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    train()
    dist.destroy_process_group()
