"""gpt-oss, from a checkpoint to a checkpoint: torchrun --nproc-per-node 2 examples/recipes/gpt_oss.py FROM TO"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
from tiny_gpt_oss import exact_norms, sequences
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from moeplan import runtime_client as moeplan


def train(source: str, target: str, steps: int = 20) -> nn.Module:
    words = torch.stack([row["input_ids"] for row in sequences()]).view(steps, dist.get_world_size(), -1, 9)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float64)
    exact_norms(model)
    moeplan.replace_experts(model, partial(moeplan.FullyShardedExperts, group=moeplan.ExpertGroup.create()))
    moeplan.load_pretrained(model, source)  # device="cuda"
    gradients = moeplan.ExpertGradients(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for batch in words[:, dist.get_rank()]:
        wrapped(input_ids=batch, labels=batch).loss.backward()
        gradients.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    moeplan.save_pretrained(wrapped, target)
    return model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(sys.argv[1], sys.argv[2])
    dist.destroy_process_group()
