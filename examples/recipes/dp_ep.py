"""Data times expert parallelism, in groups of two: torchrun --nproc-per-node 4 examples/recipes/dp_ep.py"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from small import EXPERTS, small_model, words_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client import ExpertGradients, ExpertGroup, ResidentExperts, replace_experts
from moeplan.solvers import QuotaPlanner, SpillOptions


def train(steps: int = 20, size: int = 2) -> nn.Module:
    firsts = range(0, dist.get_world_size(), size)
    groups = [ExpertGroup.create(range(first, first + size)) for first in firsts]  # every rank makes all of them
    (group,) = filter(None, groups)
    planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, size, 1), size)  # lends experts, where tokens are uneven
    model = small_model()
    replace_experts(model, partial(ResidentExperts, group=group, planner=planner))
    gradients = ExpertGradients(model)  # averages those of experts over the groups
    wrapped = DistributedDataParallel(model)
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
