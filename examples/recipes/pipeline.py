"""A pipeline of two stages times expert parallelism: torchrun --nproc-per-node 4 examples/recipes/pipeline.py"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from small import following, small_model, words_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from moeplan.runtime_client import ExpertGradients, ExpertGroup, FullyShardedExperts, replace_experts


def train(steps: int = 20) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "experts"))
    stage, place = mesh.get_local_rank("stages"), mesh.get_local_rank("experts")
    (group,) = filter(None, map(ExpertGroup.create, mesh.mesh.tolist()))
    model = small_model()
    part = nn.Sequential(*([model.embedding, model.blocks[0]], [model.blocks[1], model.head])[stage])
    layers = replace_experts(part, partial(FullyShardedExperts, group=group))
    gradients = ExpertGradients(part, ranks=mesh.get_group("experts"), stages=mesh.get_group("stages"))
    fully_shard(part, mesh=mesh["experts"], ignored_params={layer.weights for layer in layers.values()})
    piped = PipelineStage(part, stage, 2, torch.device("cpu"), group=mesh.get_group("stages"))
    schedule = Schedule1F1B(piped, n_microbatches=2, loss_fn=nn.functional.cross_entropy)
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.01, foreach=False)
    for words in [words_of(step, place, 2) for step in range(steps)]:
        schedule.step(*[words][stage:], target=following(words))
        gradients.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
