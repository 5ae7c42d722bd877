"""LoRA by peft beside frozen experts: torchrun --nproc-per-node 2 examples/recipes/lora.py FOLDER"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_gpt_oss import sequences, tiny_gpt_oss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client import ExpertGradients, ExpertGroup, ResidentExperts, replace_experts


def train(folder: str, steps: int = 20) -> nn.Module:
    words = torch.stack([row["input_ids"] for row in sequences()]).view(steps, dist.get_world_size(), -1, 9)
    model = tiny_gpt_oss()
    replace_experts(model, partial(ResidentExperts, group=ExpertGroup.create()))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    gradients = ExpertGradients(adapted)
    wrapped = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for batch in words[:, dist.get_rank()]:
        wrapped(input_ids=batch, labels=batch).loss.backward()
        gradients.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:  # with what to save, as peft would ask for all weights, of which a rank has a part
        adapted.save_pretrained(folder, state_dict={n: p for n, p in adapted.named_parameters() if p.requires_grad})
    return adapted


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(sys.argv[1])
    dist.destroy_process_group()
