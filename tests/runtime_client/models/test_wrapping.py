"""Models with experts of ours compiled, checkpointed, wrapped and cut into pipelines, in any order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.expert_groups import make_group, make_ours
from tests.support.fused_model import EXPERTS, HIDDEN, LAYERS, WORDS, FusedModel, fused_model, words_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moeplan.runtime_client.models.checkpoint import TrainingState
from moeplan.runtime_client.models.gradients import ExpertGradients

Launch = Callable[..., list[Any]]
KINDS = ["sharded", "resident"]
compiled = partial(torch.compile, backend="eager")


def quietly(function: str, *arguments: Any) -> Any:
    """A function of this file, without what the compiler says about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return globals()[function](*arguments)


def compile_whole(kind: str) -> int:
    """Compiled against not compiled; returns graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    group = make_group()
    plain, ours = fused_model(), make_ours(kind, group)
    run: Any = compiled(ours)
    for step in range(3):
        plain(words_of(step, 0, 1)).backward()
        run(words_of(step, group.rank, group.size)).backward()
        dist.all_reduce(loss := run(words_of(step, group.rank, group.size)).detach())
        torch.testing.assert_close(loss / group.size, plain(words_of(step, 0, 1)).detach(), rtol=1e-12, atol=0)
    gradient, expected = (model.get_parameter("blocks.0.gate.weight").grad for model in (ours, plain))
    assert gradient is not None
    dist.all_reduce(gradient)
    torch.testing.assert_close(gradient / group.size, expected, rtol=1e-11, atol=1e-13)
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_exact_and_breaks_once_for_each_layer(ranks: Launch, kind: str) -> None:
    assert ranks(2, quietly, "compile_whole", kind) == [LAYERS] * 2


def wrap(model: FusedModel, order: str) -> nn.Module:
    wrapped: nn.Module = model
    for wrapper in order.split():
        if wrapper == "checkpoint":
            for name, block in model.blocks.named_children():
                setattr(model.blocks, name, checkpoint_wrapper(block))
        elif wrapper == "blocks":
            for name, block in model.blocks.named_children():
                setattr(model.blocks, name, compiled(block))
        elif wrapper == "compile":
            wrapped = compiled(wrapped)  # type: ignore[assignment]
        else:
            ExpertGradients(wrapped)
            wrapped = DistributedDataParallel(wrapped)
    return wrapped


def save_wrapped(kind: str, order: str, folder: Path) -> list[str]:
    """Two steps and a checkpoint; returns the names in it."""
    torch._dynamo.reset()
    wrapped = wrap(make_ours(kind, make_group()), order)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        wrapped(words_of(step, dist.get_rank(), dist.get_world_size())).backward()
        optimizer.step()
    state = TrainingState(wrapped, optimizer)
    save({"training": state}, checkpoint_id=folder)
    return sorted(state.state_dict()["model"])


def load_wrapped(kind: str, order: str, folder: Path) -> Tensor:
    """The loss after a third step; weights were on the meta device before."""
    model = fused_model().to("meta")
    make_ours(kind, make_group(), model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    wrapped = wrap(model, order)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    load_checkpoint({"training": TrainingState(wrapped, optimizer)}, checkpoint_id=folder)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    wrapped(words_of(2, dist.get_rank(), dist.get_world_size())).backward()
    optimizer.step()
    loss = wrapped(words_of(3, dist.get_rank(), dist.get_world_size())).detach()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def train_alone() -> Tensor:
    model = fused_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        model(words_of(step, 0, 1)).backward()
        optimizer.step()
    return model(words_of(3, 0, 1)).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "order", ["ddp", "compile ddp", "ddp compile", "blocks ddp", "checkpoint blocks ddp", "checkpoint ddp compile"]
)
def test_checkpoints_under_wrappers_in_any_order(ranks: Launch, kind: str, order: str, tmp_path: Path) -> None:
    for names in ranks(2, quietly, "save_wrapped", kind, order, tmp_path):
        assert names == sorted(fused_model().state_dict())
    for loss in ranks(3, load_wrapped, "sharded", "ddp", tmp_path):
        torch.testing.assert_close(loss, train_alone(), rtol=1e-10, atol=0)


def save_products(_: object, operation: object, *__: object, **___: object) -> CheckpointPolicy:
    """What a selective activation checkpoint keeps."""
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def train_selectively(kind: str) -> None:
    group = make_group()
    plain, ours = fused_model(), make_ours(kind, group)
    contexts = partial(create_selective_checkpoint_contexts, save_products)
    for name, block in ours.blocks.named_children():
        setattr(ours.blocks, name, checkpoint_wrapper(block, context_fn=contexts))
    ExpertGradients(ours)
    wrapped = DistributedDataParallel(ours)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (plain, wrapped)]
    for step in range(4):
        plain(words_of(step, 0, 1)).backward()
        wrapped(words_of(step, group.rank, group.size)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours(words_of(5, 0, 1)), plain(words_of(5, 0, 1)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpoints_train_as_one_process(ranks: Launch, kind: str) -> None:
    ranks(2, quietly, "train_selectively", kind)


def save_later(kind: str, folder: Path) -> None:
    """An asynchronous checkpoint holds what was, and not what training makes of it meanwhile."""
    model = make_ours(kind, make_group())
    ExpertGradients(model)
    average = AveragedModel(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped(words_of(0, dist.get_rank(), dist.get_world_size())).backward()
    optimizer.step()
    average.update_parameters(model)
    before = copy.deepcopy(model)
    written = async_save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    written.result()  # type: ignore[union-attr]
    load_checkpoint({"training": TrainingState(model, optimizer)}, checkpoint_id=folder / "model")
    for actual, expected in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    save({"average": TrainingState(average)}, checkpoint_id=folder / "average")
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    load_checkpoint({"average": TrainingState(average)}, checkpoint_id=folder / "average")
    for actual, expected in zip(average.module.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_asynchronous_checkpoints_and_averages(ranks: Launch, kind: str, tmp_path: Path) -> None:
    ranks(2, save_later, kind, tmp_path)


def run_pipeline(kind: str) -> None:
    """Two stages times two ranks, whose shapes torch finds out on memory that was never written."""
    rank = dist.get_rank()
    stage, place = divmod(rank, 2)
    pipelines = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    plain = fused_model()
    whole = make_ours(kind, make_group(2))
    part = nn.Sequential(*([whole.embedding, whole.blocks[0]] if stage == 0 else [whole.blocks[1], whole.head]))
    gradients = ExpertGradients(part, ranks=stages[stage], stages=pipelines[place])

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target)

    pipelined = PipelineStage(part, stage, 2, torch.device("cpu"), group=pipelines[place])
    schedule = ScheduleGPipe(pipelined, 2, loss_fn=loss_of)
    words = words_of(0, place, 2)
    torch.use_deterministic_algorithms(True)  # fills such memory with numbers that are not numbers
    try:
        schedule.step(words) if stage == 0 else schedule.step(target=(3 * words + 1) % WORDS)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in part.named_parameters():
        if "experts" not in name:
            dist.all_reduce(parameter.grad, group=stages[stage])
            assert parameter.grad is not None
            parameter.grad /= 2
    plain(words_of(0, 0, 1)).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    torch.testing.assert_close(gradients.clip_grad_norm_(0.01), expected, rtol=1e-11, atol=0)
    name = f"blocks.{stage}.gate.weight"
    gradient = whole.get_parameter(name).grad
    assert gradient is not None
    assert gradient.shape == (EXPERTS, HIDDEN)
    torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_finds_out_shapes_and_trains_alike(ranks: Launch, kind: str) -> None:
    ranks(4, run_pipeline, kind)
