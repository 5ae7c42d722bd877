"""FSDP2 for all but the experts: torchrun --nproc-per-node 2 examples/recipes/fsdp2.py"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from small import small_model, words_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeplan.runtime_client import ExpertGradients, ExpertGroup, ResidentExperts, expert_parameters, replace_experts


def train(steps: int = 20) -> nn.Module:
    group = ExpertGroup.create()
    model = small_model()
    replace_experts(model, partial(ResidentExperts, group=group))
    gradients = ExpertGradients(model)
    experts = set(expert_parameters(model).values())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda"
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=experts)
    fully_shard(model, mesh=mesh, ignored_params=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)  # foreach does not mix cut and whole ones
    for step in range(steps):
        model(words_of(step)).backward()
        gradients.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()
