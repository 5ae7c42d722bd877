"""Weights and optimizer states of experts over replicas: torchrun --nproc-per-node 4 examples/recipes/zero.py"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from small import small_model, words_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeplan.runtime_client import ExpertGradients, ExpertGroup, ResidentExperts, replace_experts


def train(steps: int = 20, size: int = 2) -> nn.Module:
    meshes = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("replicas", "experts"))
    groups = [ExpertGroup.create(ranks) for ranks in meshes.mesh.tolist()]  # every rank makes all of them
    (group,) = filter(None, groups)
    model = small_model()
    layers = replace_experts(model, partial(ResidentExperts, group=group))
    gradients = ExpertGradients(model)
    for layer in layers.values():
        fully_shard(layer, mesh=meshes["replicas"])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)  # foreach does not mix meshes
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
