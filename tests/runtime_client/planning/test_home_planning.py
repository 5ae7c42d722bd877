"""A daemon plans homes, ranks move there, and training goes on as in a single process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import resident_training
from tests.support.daemon import Start, eventually, started
from tests.support.expert_groups import make_group
from tests.support.resident_training import EXPERTS, LAYERS, RANKS, Model, train_step
from tests.support.torchrun import torchrun

from moeplan.api.jobs import Forecast, Replan
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.home_moves import HomeMoves
from moeplan.runtime_client.planning.session import PlannerSession
from moeplan.solvers import Cluster

Launch = Callable[..., list[Any]]
LIMIT_S = 180.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from started(lambda: tmp_path / "data")


def follow(address: str, job: str, folder: str) -> tuple[list[float], list[int], list[list[int]]]:
    """Train until homes have moved; once they move, say so, and go on without a planner until the move is over."""
    group = make_group()
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    moves = HomeMoves(model.experts, optimizer)
    seen: list[np.ndarray[Any, Any]] = []
    for layer in model.experts:
        layer.register_forward_pre_hook(
            lambda _, given: seen.append(np.bincount(given[1].flatten(), minlength=EXPERTS))
        )
    session = PlannerSession(
        address,
        job,
        moves.layouts,
        moves.take,
        slots=EXPERTS // group.size,
        cluster=Cluster.uniform(group.size, EXPERTS // group.size, nodes=2),
        forecast=Forecast(window_steps=4),
        replan=Replan(every_steps=4),
        spill_slots=1,
        timeout=timedelta(seconds=LIMIT_S / 2),
    )
    losses: list[float] = []
    moved: list[int] = []
    end = time.monotonic() + LIMIT_S
    with session:
        while not (sum(moved) and not moves.moving and len(moved) > 10):
            assert time.monotonic() < end, "no homes came"
            losses.append(train_step(model, optimizer, len(losses), group, lambda: None))
            session.step(np.stack([sum(seen[layer::LAYERS]) for layer in range(LAYERS)]))
            seen.clear()
            moved.append(moves.step())
            if moved[-1]:
                Path(folder, f"moves-{group.rank}").touch()
            time.sleep(0.02)
    return losses, moved, [layer.homes.device.tolist() for layer in model.experts]


def alone(steps: int) -> list[float]:
    model, group = Model(ExpertGroup()), ExpertGroup()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return [train_step(model, optimizer, step, group, lambda: None) for step in range(steps)]


def test_planned_homes_move_and_the_planner_may_die_meanwhile(ranks: Launch, start: Start, tmp_path: Path) -> None:

    daemon = start().serving()
    with ThreadPoolExecutor(1) as pool:
        run = partial(ranks, 2, follow, daemon.address, "homes", str(tmp_path), timeout_s=2 * LIMIT_S)
        training = pool.submit(run)
        eventually(lambda: training.done() or list(tmp_path.glob("moves-*")), LIMIT_S)
        with daemon.client() as client:
            job = client.job("jobs/homes")
            plan = client.plan(f"jobs/homes/plans/{job.status.plan_version}")
        daemon.kill()
        answers = training.result(LIMIT_S)
    assert job.spec.spill_slots == 1
    assert any(layer.moved_replicas for layer in plan.layers)
    for layer in plan.layers:
        if layer.moved_replicas:
            assert layer.imbalance is not None
            assert layer.imbalance_before is not None
            assert layer.imbalance < layer.imbalance_before
    first, *others = answers
    assert all(homes == first[2] and moved == first[1] for _, moved, homes in others)
    expected = alone(len(first[0]))
    for losses, _, _ in answers:
        np.testing.assert_allclose(losses, expected, rtol=1e-10)


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_a_move_loses_nothing(tmp_path: Path) -> None:
    torchrun("--max-restarts", "1", resident_training.__file__, str(tmp_path), ranks=RANKS)
    runs = [
        [json.loads(line) for line in (tmp_path / f"{restart}-0.jsonl").read_text().splitlines()]
        for restart in range(2)
    ]
    killed, again = runs
    assert killed[-1]["step"] == resident_training.KILLED
    assert killed[-1]["moving"] > 0
    assert [line["step"] for line in again] == list(range(resident_training.SAVED, resident_training.LAST))
    expected = alone(resident_training.LAST)
    for line in killed + again:
        np.testing.assert_allclose(line["loss"], expected[line["step"]], rtol=1e-10)
    assert os.path.isdir(tmp_path / "checkpoint")
