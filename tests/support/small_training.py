"""A small model of moeplan's own layers, trained in double precision with a planner: what the fault tests disturb.

Run under torchrun it is a training script like any other; `train` can also be called in ranks that exist already.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moeplan.api.jobs import Forecast, Replan
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.sharded import FullyShardedExperts, chain
from moeplan.runtime_client.planning.session import PlannerSession
from moeplan.runtime_client.recording.recorder import record
from moeplan.solvers.problem.layout import Layout

LAYERS, EXPERTS, TOP_K, SLOTS = 2, 8, 2, 6
HIDDEN, WIDTH, WORDS, TOKENS, SHIFT = 16, 8, 24, 64, 8
LIMIT_S = 70.0
HOLD = "hold"
"""A run goes on while its folder has a file of this name."""

Tables = list[list[list[int]]]
"""Slots of the layout of each layer."""


class Block(nn.Module):
    """Router and experts, beside an identity."""

    def __init__(self, experts: FullyShardedExperts) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        weight, index = self.router(hidden).softmax(dim=-1).topk(TOP_K)
        output: Tensor = hidden + self.experts(hidden, index, weight)
        return output


class Model(nn.Module):
    """Predicts the next word from the one before."""

    def __init__(self, layers: Sequence[FullyShardedExperts]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS)
        self.blocks = nn.Sequential(*map(Block, layers))

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.blocks(self.embedding(words))), following)


def make_model(group: ExpertGroup) -> tuple[Model, list[FullyShardedExperts]]:
    """The same weights on every rank and in every run."""
    torch.manual_seed(0)
    shape = ExpertShape(HIDDEN, WIDTH)
    layers = [FullyShardedExperts(shape, EXPERTS, group, dtype=torch.float64) for _ in range(LAYERS)]
    for layer in layers:
        layer.load_experts(0, 0.2 * torch.randn(EXPERTS, shape.elements, dtype=torch.float64))
    chain(layers)
    return Model(layers).double(), layers


def make_batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Words of a third of the vocabulary, another one every `SHIFT` steps, so that other experts become busy."""
    rng = np.random.default_rng([rank, step])
    words = torch.from_numpy(rng.integers(0, WORDS // 3, TOKENS) ** 2 % (WORDS // 3) + WORDS // 3 * (step // SHIFT % 3))
    return words, (5 * words + 3) % WORDS


def train(
    folder: str,
    *,
    steps: int,
    switches: int = 0,
    address: str | None = None,
    job: str = "small",
    replay: Mapping[int, Tables] | None = None,
    slow: float = 0.0,
    dies: bool = False,
) -> Any:
    """Train for so many steps, and on until there have been so many switches and nothing holds the run.

    Args:
        folder: For a file of each rank with a line of JSON per step.
        steps: Steps at least; exactly, without a planner.
        switches: Switches at least.
        address: The planner, if there is one.
        job: Id of the job there.
        replay: Layouts to put into force before a step, without a planner.
        slow: Seconds that rank 1 sleeps in each step.
        dies: Whether rank 1 kills itself when `steps` and `switches` are reached.

    Returns:
        The status of the line to the planner.
    """
    rank, group = dist.get_rank(), ExpertGroup.create(timeout=timedelta(seconds=30))
    assert group is not None
    model, layers = make_model(group)
    shared = [weight for name, weight in model.named_parameters() if ".experts." not in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = record(model)
    session = None

    def apply(plan: Sequence[PlannedLayer]) -> None:
        for layer, planned in zip(layers, plan, strict=True):
            layer.plan = planned

    if address is not None:
        session = PlannerSession(
            address,
            job,
            [layer.layout for layer in layers],
            apply,
            slots=SLOTS,
            forecast=Forecast(window_steps=4),
            replan=Replan(every_steps=5),
            timeout=timedelta(seconds=30),
        )
    step, end, over = 0, time.monotonic() + LIMIT_S, False
    with (Path(folder) / f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{rank}.jsonl").open("w") as lines:
        while not over:
            if replay and step in replay:
                for layer, slots in zip(layers, replay[step], strict=True):
                    layer.layout = Layout(np.array(slots, np.int32), EXPERTS)
            loss = model(*make_batch(rank, step))
            loss.backward()
            for weight in shared:
                dist.all_reduce(weight.grad)
            for weight in model.parameters():
                assert weight.grad is not None
                weight.grad /= group.size
            optimizer.step()
            optimizer.zero_grad()
            line = {
                "step": step,
                "loss": float(loss.detach()),
                "version": 0 if session is None else session.version,
                "layouts": [layer.layout.slots.tolist() for layer in layers],
            }
            print(json.dumps(line), file=lines, flush=True)
            counts = recorder.step()
            enough = session is None or session.switches >= switches  # before this step, so that the lines show them
            if session is not None:
                session.step(counts)
                time.sleep(0.01 + slow * rank)
            step += 1
            reached = step >= steps and enough
            if reached and dies and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            held = (Path(folder) / HOLD).exists()
            verdict = torch.tensor([int((reached and not held) or time.monotonic() > end)])
            dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
            over = bool(verdict)
    recorder.close()
    if session is None:
        return None
    session.close()
    return session.status


def main() -> None:
    """Under torchrun; the first start of the group loses a rank."""
    parser = argparse.ArgumentParser()
    for name in ("folder", "address", "job"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    switches = 1 if first else 2  # the second start takes over a plan of the first, and waits for one of its own
    train(arguments.folder, steps=12, switches=switches, address=arguments.address, job=arguments.job, dies=first)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # as at the end of examples/train_moe_lm.py
