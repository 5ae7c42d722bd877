"""Homes that move between steps: the losses are those of a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.support.expert_groups import make_group
from tests.support.resident_training import EXPERTS, LAYERS, RANKS, SHAPE, Model, batch, planned, train_step
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from moeplan.runtime_client.errors import RanksDifferError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.dividing import PlannedLayer
from moeplan.runtime_client.layers.home_moves import HomeMoves
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.models.checkpoint import TrainingState
from moeplan.runtime_client.models.gradients import ExpertGradients
from moeplan.solvers import Layout, QuotaPlanner, SpillOptions

Launch = Callable[..., list[Any]]
LIMIT_S = 240.0
STEPS, HALF_WAY = 14, 7
PLANS = {2: 1, 5: 2, 6: 3, 10: 4}
"""Seed of the homes that are taken before a step."""


def train(
    group: ExpertGroup, first: int, last: int, *, load: str = "", save: str = "", also_between: bool = False
) -> tuple[list[float], list[int]]:
    """Losses over all ranks of steps of two micro-batches each, and experts that moved after each."""
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    moves = HomeMoves(model.experts, optimizer)
    state = {"training": TrainingState(model, optimizer), "homes": moves}
    if load:
        load_checkpoint(state, checkpoint_id=load)
    losses: list[float] = []
    moved: list[int] = []
    for step in range(first, last):
        if step in PLANS and group.size > 1:
            moves.take(planned(PLANS[step], group.size))
        between = moves.step if also_between else lambda: 0
        losses.append(train_step(model, optimizer, step, group, between))
        moved.append(moves.step())
    if save:
        save_checkpoint(state, checkpoint_id=save)
    return losses, moved


def follow(folder: str) -> list[list[float]]:
    """A run, one that also moves between micro-batches, and one that goes on from a checkpoint half-way."""
    group = make_group()
    whole, moved = train(group, 0, STEPS)
    assert moved[:2] == [0, 0]
    assert sum(count > 0 for count in moved) > len(PLANS), "moves take several steps"
    between, _ = train(group, 0, STEPS, also_between=True)
    before, _ = train(group, 0, HALF_WAY, save=folder)
    after, rest = train(group, HALF_WAY, STEPS, load=folder)
    assert rest[0] == 0  # the plan is for those who know it to bring again; its homes half-way are in force
    return [whole, between, before + after]


def go_on(folder: str) -> tuple[list[float], list[int]]:
    return train(make_group(), HALF_WAY, STEPS, load=folder)


def test_what_moves_homes_is_looked_at() -> None:
    model = Model(ExpertGroup())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        ValueError, match=r"optimizers\[0\] = .*: must be Optimizer; write HomeMoves\(layers, optimizer"
    ):
        HomeMoves(model.experts, [optimizer])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers\[0\] = 'experts': must be ResidentExperts"):
        HomeMoves(["experts"], optimizer)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layers = none: must be the resident layers of a model"):
        HomeMoves([], optimizer)


def test_losses_are_those_of_a_single_process(ranks: Launch, tmp_path: Path) -> None:
    expected, _ = train(ExpertGroup(), 0, STEPS)
    for answers in ranks(RANKS, follow, str(tmp_path / "checkpoint"), timeout_s=LIMIT_S):
        for losses in answers:
            np.testing.assert_allclose(losses, expected, rtol=1e-10)
    ((alone, _),) = ranks(1, go_on, str(tmp_path / "checkpoint"), timeout_s=LIMIT_S)
    np.testing.assert_allclose(alone, expected[HALF_WAY:], rtol=1e-10)


def resume(folder: str) -> tuple[int, list[list[int]]]:
    model = Model(make_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    moves = HomeMoves(model.experts, optimizer)
    if not Path(folder).exists():
        moves.take(planned(7, RANKS))
        moves.finish()
        save_checkpoint({"homes": moves}, checkpoint_id=folder)
    else:
        load_checkpoint({"homes": moves}, checkpoint_id=folder)
    assert moves.moving == 0
    return moves.version, [layer.homes.device.tolist() for layer in model.experts]


def test_a_checkpoint_holds_the_homes_and_their_version(ranks: Launch, tmp_path: Path) -> None:
    folder = str(tmp_path / "homes")
    saved = ranks(RANKS, resume, folder)
    expected = [layer.layout.hosts.device.tolist() for layer in planned(7, RANKS)]
    assert saved == ranks(RANKS, resume, folder) == [(1, expected)] * RANKS
    ((version, homes),) = ranks(1, resume, folder)
    assert version == 1
    assert homes == [[0] * EXPERTS] * LAYERS


def refuse() -> None:
    group = make_group()
    model = Model(group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    moves = HomeMoves(model.experts, optimizer)
    division = planned(1, group.size)[0].division
    crowded = Layout(np.array([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, -1, -1]], np.int32), EXPERTS)
    with pytest.raises(ValueError, match="the plan gives rank 0 7 experts, and it owns 6"):
        moves.take([PlannedLayer(crowded, division)] * LAYERS)
    twice = Layout(np.array([[0, 1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11, -1]], np.int32), EXPERTS)
    with pytest.raises(ValueError, match="13 replicas of 12 experts"):
        moves.take([PlannedLayer(twice, division)] * LAYERS)
    moves.take(planned(1, group.size))
    if group.rank == 1:
        model.experts[0].flat.grad = torch.zeros_like(model.experts[0].flat)
    with pytest.raises(RanksDifferError, match=r"ranks \[1\] differ from rank 0"):
        moves.step()


def average() -> None:
    """An average of experts stays one of the same experts, if its homes move as theirs do."""
    group = make_group()
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    averaged = AveragedModel(model)
    mean = cast(Model, averaged.module)
    moves, follows = HomeMoves(model.experts, optimizer), HomeMoves(mean.experts)
    seen: list[dict[tuple[int, int], torch.Tensor]] = []
    for step in range(3):
        if step:
            for each in (moves, follows):
                each.take(planned(step, group.size))
                each.finish()
        train_step(model, optimizer, step, group, lambda: 0)
        averaged.update_parameters(model)
        seen.append(rows_of(model))
    everyone: list[list[dict[tuple[int, int], torch.Tensor]]] = [[]] * group.size
    dist.all_gather_object(everyone, seen)
    for place, row in rows_of(mean).items():
        values = [rows[place] for each in everyone for rows in each if place in rows]
        torch.testing.assert_close(row, torch.stack(values).mean(dim=0))


def rows_of(model: Model) -> dict[tuple[int, int], torch.Tensor]:
    """This rank's experts, by layer and number."""
    return {
        (nth, expert): layer.flat.detach()[row].clone()
        for nth, layer in enumerate(model.experts)
        for row, expert in enumerate(layer.homes.owned)
    }


def test_an_average_whose_homes_move_along_is_of_the_same_experts(ranks: Launch) -> None:
    ranks(2, average)


def change_a_copy(how: str) -> str:
    """A copy that stays where it was while homes move, and then is changed, or is not; and whether it runs or moves."""
    group = make_group()
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    averaged = AveragedModel(model)
    copied = cast(Model, averaged.module)
    averaged.update_parameters(model)
    moves = HomeMoves(model.experts, optimizer)
    train_step(model, optimizer, 0, group, lambda: 0)
    moves.take(planned(1, group.size))
    moves.finish()
    if "averaged" in how:
        averaged.update_parameters(model)
    elif how == "loaded":
        for layer in copied.experts:
            layer.load_experts(0, torch.ones(EXPERTS, SHAPE.elements, dtype=layer.flat.dtype))
    try:
        if "moved" in how:
            moves.take(planned(2, group.size))
            moves.step()
        else:
            with torch.no_grad():
                copied(*batch(1, 0, group))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["averaged", "averaged, moved on", "loaded", "left alone", "left alone, moved on"])
def test_a_copy_that_is_changed_after_homes_have_moved_is_refused(ranks: Launch, how: str) -> None:
    for told in ranks(2, change_a_copy, how):
        assert ("Move both alike, and whole" in told) == ("averaged" in how), told


def keep_state() -> str:
    """An optimizer takes back its own state as long as homes are the same."""
    group = make_group()
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    moves = HomeMoves(model.experts, optimizer)
    train_step(model, optimizer, 0, group, lambda: 0)
    kept = optimizer.state_dict()
    optimizer.load_state_dict(kept)
    moves.take(planned(1, group.size))
    moves.finish()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="this state of an optimizer was kept while") as refused:
        optimizer.load_state_dict(kept)
    return str(refused.value)


def test_an_optimizers_state_of_other_homes_is_refused(ranks: Launch) -> None:
    for told in ranks(2, keep_state):
        assert "TrainingState(model, optimizer)" in told


def leave_behind() -> None:
    """Experts are not moved away from what an optimizer keeps of them."""
    group = make_group()
    model = Model(group)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = HomeMoves(model.experts)
    train_step(model, plain, 0, group, lambda: 0)
    moves.take(planned(1, group.size))
    assert moves.step()  # it keeps nothing
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 1, group, lambda: 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_step(model, optimizer, 2, group, lambda: 0)
    with pytest.raises(ValueError, match="AdamW trains it, and HomeMoves was not given it"):
        moves.step()
    assert HomeMoves(model.experts, optimizer).moving == 0
    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    moves = HomeMoves(model.experts, torch.optim.AdamW(masters, lr=0.1))
    moves.take(planned(2, group.size))
    with pytest.raises(ValueError, match="AdamW does not train it"):
        moves.step()


def gather_moved() -> list[bool]:
    """Whole experts are gathered by their numbers, wherever they have moved."""
    group = make_group()
    model = Model(group)
    before = [layer.gather_experts(0) for layer in model.experts]
    moves = HomeMoves(model.experts)
    for seed in (1, 2):
        moves.take(planned(seed, group.size))
        moves.finish()
    after = [layer.gather_experts(0) for layer in model.experts]
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]


def test_experts_whose_homes_have_moved_are_gathered_by_their_numbers(ranks: Launch) -> None:
    assert ranks(RANKS, gather_moved) == [[True] * LAYERS] + [[]] * (RANKS - 1)


def test_an_optimizer_that_would_be_left_behind_is_refused(ranks: Launch) -> None:
    ranks(2, leave_behind)


def move_before_backward(spare: int, use_reentrant: bool | None) -> tuple[list[str], list[float]]:
    """Homes of ranks 0 and 1 move between a forward pass and its backward; those of others stay.

    Returns:
        What backwards told, and the sums of squared gradients of each layer's experts over the ranks.
    """
    group = make_group()
    planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, spare), group.size)
    told: list[str] = []
    sums: list[float] = []
    for moved in (False, True):
        torch.manual_seed(0)
        layer = ResidentExperts(
            SHAPE, EXPERTS, group, planner=planner, dtype=torch.float64, compute_dtype=torch.float32
        )
        layer.load_experts(0, torch.randn(EXPERTS, SHAPE.elements, dtype=torch.float64))
        moves = HomeMoves([layer])
        hidden, index, weight = (part.clone() for part in batch(0, 0, group))
        hidden.requires_grad_()
        if use_reentrant is None:
            output = layer(hidden, index, weight)
        else:
            output = checkpoint(layer, hidden, index, weight, use_reentrant=use_reentrant)
        if moved:
            swapped = layer.home_layout.slots.copy()
            swapped[[0, 1], 0] = swapped[[1, 0], 0]
            division = planned(0, group.size)[0].division
            moves.take([PlannedLayer(Layout(swapped, EXPERTS), division)])
            moves.finish()
        try:
            output.square().sum().backward()
        except RuntimeError as error:
            told.append(str(error))
        else:
            assert layer.flat.grad is not None
            everyone = [torch.zeros(EXPERTS, dtype=torch.float64) for _ in range(group.size)]
            mine = torch.zeros(EXPERTS, dtype=torch.float64)
            mine[layer.homes.owned] = layer.flat.grad.square().sum(dim=1)
            dist.all_gather(everyone, mine)
            sums.append(float((torch.stack(everyone).sum(dim=0) * torch.arange(1, EXPERTS + 1)).sum()))
    return told, sums


@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("spare", [0, 2])
def test_homes_that_move_before_a_backward_are_refused_on_all_ranks(
    ranks: Launch, spare: int, use_reentrant: bool | None
) -> None:
    for told, _ in ranks(RANKS, move_before_backward, spare, use_reentrant):
        assert len(told) == 1
        assert "its experts have moved to other homes since the forward pass" in told[0]


def test_homes_may_move_before_a_checkpoint_runs_all_of_a_pass_again(ranks: Launch) -> None:
    for told, (expected, actual) in ranks(RANKS, move_before_backward, 2, True):
        assert not told
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def move_replicas(cut: bool) -> str:
    """Two expert groups hold the same experts, and each would have homes of its own."""
    group = make_group(2)
    model = Model(group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = HomeMoves(model.experts, optimizer)
    moves.take(planned(1, group.size))  # nobody knows yet
    ExpertGradients(model)
    if cut:
        replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))["replicas"]
        for layer in model.experts:
            fully_shard(layer, mesh=replicas)
    with pytest.raises(ValueError) as refused:
        moves.take(planned(dist.get_rank() // 2, group.size))
    with pytest.raises(ValueError, match="other expert groups"):
        moves.step()
    return str(refused.value)


@pytest.mark.parametrize("cut", [False, True])
def test_homes_of_replicas_do_not_move_apart(ranks: Launch, cut: bool) -> None:
    for told in ranks(RANKS, move_replicas, cut):
        assert "layer 0: other expert groups hold the same experts" in told
        assert "Make one group of all ranks, ExpertGroup.create()" in told


def test_what_cannot_move_is_refused(ranks: Launch) -> None:
    ranks(2, refuse)
