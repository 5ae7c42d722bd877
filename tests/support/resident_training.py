"""A small model of resident experts in two link domains, in double precision: what moves of homes disturb.

Run under torchrun it is a training script with checkpoints, of which a rank is killed in the middle of a move.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.dividing import Division, PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.home_moves import HomeMoves
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.models.checkpoint import TrainingState
from moeplan.solvers import Cluster, ExpertSpec, Layout, QuotaPlanner, SpillOptions

RANKS, EXPERTS, LAYERS = 4, 12, 2
SHAPE = ExpertShape(6, 4)
MOVED, SAVED, KILLED, LAST = 3, 5, 6, 12
"""Steps: homes are planned, a checkpoint is written, a rank does not survive, the end."""


class Model(nn.Module):
    """Layers with residuals; routing is part of the batch."""

    def __init__(self, group: ExpertGroup) -> None:
        super().__init__()
        options = SpillOptions.uniform(EXPERTS, group.size, 1, domain=max(1, group.size // 2))
        self.layers = nn.ModuleList(
            ResidentExperts(SHAPE, EXPERTS, group, planner=QuotaPlanner(options, group.size), dtype=torch.float64)
            for _ in range(LAYERS)
        )
        torch.manual_seed(0)
        for layer in self.experts:
            layer.load_experts(0, 0.4 * torch.randn(EXPERTS, SHAPE.elements, dtype=torch.float64))

    @property
    def experts(self) -> list[ResidentExperts]:
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden, index, weight)
        return hidden


def batch(step: int, part: int, group: ExpertGroup) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, choices and weights; some ranks have none, and most tokens want the same experts."""
    rng = np.random.default_rng([step, part])
    sizes = rng.integers(0, 12, RANKS) * (rng.random(RANKS) < 0.8) + (np.arange(RANKS) == step % RANKS)
    scores = np.log(rng.dirichlet(np.full(EXPERTS, 0.2)) + 1e-9) + rng.gumbel(size=(sizes.sum(), EXPERTS))
    hidden = torch.from_numpy(rng.standard_normal((sizes.sum(), SHAPE.hidden)))
    weight = torch.from_numpy(rng.random((sizes.sum(), 2)))
    edge = np.concatenate([[0], np.cumsum(sizes)])
    own = slice(*(edge[rank * RANKS // group.size] for rank in (group.rank, group.rank + 1)))
    return hidden[own], torch.from_numpy(scores).topk(2, dim=1).indices[own], weight[own]


def planned(seed: int, size: int) -> list[PlannedLayer]:
    """Homes at random, as many on every rank as ever."""
    rng = np.random.default_rng(seed)
    division = Division(Cluster.uniform(size, EXPERTS // size), ExpertSpec(), "optimal")
    return [
        PlannedLayer(Layout(rng.permutation(EXPERTS).reshape(size, -1).astype(np.int32), EXPERTS), division)
        for _ in range(LAYERS)
    ]


def train_step(
    model: Model, optimizer: torch.optim.Optimizer, step: int, group: ExpertGroup, between: Callable[[], object]
) -> float:
    """The loss over all ranks of a step of two micro-batches, with a call between them."""
    total = torch.zeros((), dtype=torch.float64)
    for part in range(2):
        loss = model(*batch(step, part, group)).square().sum() / 100
        loss.backward()
        total += loss.detach()
        if part == 0:
            between()
    optimizer.step()
    optimizer.zero_grad()
    if group.size > 1:
        dist.all_reduce(total)
    return float(total)


def main() -> None:
    """Under torchrun; in the first start rank 1 dies while the others exchange experts with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    group, start = ExpertGroup.create(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    assert group is not None
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    moves = HomeMoves(model.experts, optimizer)
    state = {"training": TrainingState(model, optimizer), "homes": moves}
    first = 0
    if start != "0":
        load_checkpoint(state, checkpoint_id=folder / "checkpoint")
        first = SAVED
    with (folder / f"{start}-{group.rank}.jsonl").open("w") as lines:
        for step in range(first, LAST):
            if step in (MOVED, LAST - 2):
                moves.take(planned(step, group.size))
            loss = train_step(model, optimizer, step, group, lambda: None)
            line = {"step": step, "loss": loss, "moving": moves.moving}
            print(json.dumps(line), file=lines, flush=True)
            if start == "0" and step == KILLED and group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            moves.step()
            if step == SAVED - 1:
                save_checkpoint(state, checkpoint_id=folder / "checkpoint")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # as at the end of examples/train_moe_lm.py
