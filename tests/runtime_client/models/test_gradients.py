"""Training with gradients of experts under DDP, FSDP2 or neither, against one process; and what is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.expert_groups import make_group, make_ours
from tests.support.fused_model import EXPERTS, FusedModel, fused_model, words_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.errors import RanksDifferError
from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.runtime_client.models.checkpoint import TrainingState
from moeplan.runtime_client.models.gradients import ExpertGradients, expert_parameters
from moeplan.runtime_client.models.replacing import replace_experts

Launch = Callable[..., list[Any]]
KINDS = ["sharded", "resident"]
STEPS, MAX_NORM = 4, 0.05


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def average(model: nn.Module) -> None:
    """What a user without wrappers does for all but the experts."""
    experts = expert_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in experts:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def train_in_one_process() -> tuple[FusedModel, list[float]]:
    model = fused_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for half in range(2):
            (model(words_of(2 * step + half, 0, 1)) / 2).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    assert min(norms) > 2 * MAX_NORM
    return model, norms


def shard_over_replicas(model: FusedModel) -> None:
    """Weights and states of experts on the ranks that hold the same ones, the others on all ranks."""
    size = dist.get_world_size() // 2
    meshes = init_device_mesh("cpu", (size, 2), mesh_dim_names=("replicas", "experts"))
    for block in model.blocks:
        fully_shard(block.get_submodule("experts"), mesh=meshes["replicas"])
    fully_shard(model, mesh=init_device_mesh("cpu", (2 * size,)))


def train_on_ranks(kind: str, wrapper: str, group_size: int | None) -> None:
    """As in one process, each step of two backward passes."""
    expected, norms = train_in_one_process()
    model = make_ours(kind, make_group(group_size))
    gradients = ExpertGradients(model)
    wrapped: nn.Module = model
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=set(expert_parameters(model).values()))
        fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model).values()))
    elif wrapper == "zero":
        shard_over_replicas(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=2.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        for half in range(2):
            later = wrapper == "ddp" and half == 0
            with wrapped.no_sync() if later else contextlib.nullcontext():  # type: ignore[operator]
                (wrapped(words_of(2 * step + half, dist.get_rank(), dist.get_world_size())) / 2).backward()
        if wrapper == "plain":
            average(model)
        norm = float(gradients.clip_grad_norm_(MAX_NORM))
        assert norm == pytest.approx(norms[step], rel=1e-11)
        optimizer.step()
    for name in ("embedding.weight", "head.weight", "blocks.0.gate.weight", "blocks.1.gate.weight"):
        actual, reference = whole(model.get_parameter(name)), expected.get_parameter(name)
        torch.testing.assert_close(actual, reference.detach(), rtol=1e-11, atol=1e-11)
    for step in range(3):
        actual = model(words_of(step, 0, 1))
        torch.testing.assert_close(actual, expected(words_of(step, 0, 1)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp"])
@pytest.mark.parametrize(("size", "group_size"), [(2, None), (4, 2), (2, 1)])
def test_training_with_clipping_equals_one_process(
    ranks: Launch, kind: str, wrapper: str, size: int, group_size: int | None
) -> None:
    ranks(size, train_on_ranks, kind, wrapper, group_size)


def test_states_of_experts_over_replicas(ranks: Launch) -> None:
    ranks(4, train_on_ranks, "resident", "zero", 2)


def checkpoint_over_replicas(folder: Path) -> float:
    """Save where weights of experts are spread over replicas; read where they are not, and where they are."""
    spread = make_ours("resident", make_group(2))
    ExpertGradients(spread)
    shard_over_replicas(spread)
    optimizer = torch.optim.AdamW(spread.parameters(), lr=0.1)
    spread(words_of(0, dist.get_rank(), 4)).backward()
    optimizer.step()
    flat = spread.get_parameter("blocks.0.experts.flat")
    assert isinstance(flat, DTensor)
    assert flat.to_local().shape[0] == EXPERTS // 4
    assert optimizer.state[flat]["exp_avg"].to_local().shape == flat.to_local().shape
    save_checkpoint({"training": TrainingState(spread, optimizer)}, checkpoint_id=folder)
    expected = spread(words_of(1, 0, 1)).detach()
    for kind in ("sharded", "resident", "spread"):
        model = make_ours("sharded" if kind == "sharded" else "resident", make_group(None if kind == "sharded" else 2))
        ExpertGradients(model)
        if kind == "spread":
            shard_over_replicas(model)
        other = torch.optim.AdamW(model.parameters(), lr=0.1)
        load_checkpoint({"training": TrainingState(model, other)}, checkpoint_id=folder)
        torch.testing.assert_close(model(words_of(1, 0, 1)).detach(), expected, rtol=1e-12, atol=0)
    return float(expected)


def test_checkpoints_of_experts_over_replicas(ranks: Launch, tmp_path: Path) -> None:
    assert len(set(ranks(4, checkpoint_over_replicas, tmp_path))) == 1


def sum_gradients(norm_type: float) -> None:
    """Without means, over replicas, and with another norm."""
    words = [words_of(step, 0, 1) for step in range(2)]
    plain, ours = fused_model(), make_ours("resident", make_group(1))
    for batch in words:
        (len(batch) * plain(batch)).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1, norm_type)
    gradients = ExpertGradients(ours, mean=False)
    for batch in words:
        mine = batch.tensor_split(2)[dist.get_rank()]
        (len(mine) * ours(mine)).backward()
    average(ours)
    for name, parameter in ours.named_parameters():
        if name not in expert_parameters(ours):
            assert parameter.grad is not None
            parameter.grad *= 2
    torch.testing.assert_close(gradients.clip_grad_norm_(0.1, norm_type), expected, rtol=1e-11, atol=0)
    flat = ours.get_parameter("blocks.0.experts.flat").grad
    inner = plain.get_parameter("blocks.0.experts.gate_up_proj").grad
    assert flat is not None
    assert inner is not None
    torch.testing.assert_close(flat[:, : inner[0].numel()], inner.flatten(1), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("norm_type", [1.0, float("inf")])
def test_sums_over_replicas_and_other_norms(ranks: Launch, norm_type: float) -> None:
    ranks(2, sum_gradients, norm_type)


def make_gradients_twice() -> None:
    """Also between two steps, as for another phase of training."""
    group = make_group()
    plain, ours = fused_model(), make_ours("sharded", group)
    wrapped = None
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (plain, ours)]
    for step in range(2):
        ExpertGradients(ours)
        wrapped = wrapped or DistributedDataParallel(ours)
        plain(words_of(step, 0, 1)).backward()
        wrapped(words_of(step, group.rank, group.size)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours(words_of(2, 0, 1)), plain(words_of(2, 0, 1)), rtol=1e-11, atol=1e-11)


def test_gradients_made_again_are_scaled_once(ranks: Launch) -> None:
    ranks(2, make_gradients_twice)


def train_replicas(kind: str, line: str) -> str:
    """The first error of steps on two expert groups of two ranks, with an ordinary line that parts them."""
    group = make_group(2)
    model = make_ours(kind, group)
    if line == "a seed of each group":
        torch.manual_seed(dist.get_rank() // 2)
        layer = model.blocks[1].get_submodule("experts")
        assert isinstance(layer, FullyShardedExperts | ResidentExperts)
        layer.load_experts(0, torch.randn(EXPERTS, layer.shape.elements, dtype=torch.float64))
    ExpertGradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        if line == "a step in the backward" and step == 1:
            for parameter in expert_parameters(model).values():
                parameter.register_post_accumulate_grad_hook(lambda p: p.sub_(p.grad))
        try:
            wrapped(words_of(step, dist.get_rank(), 4)).backward()
        except RuntimeError as error:
            return f"{step}: {error}"
        if line != "a step that one group leaves out" or dist.get_rank() < 2:
            optimizer.step()
        else:
            for name, parameter in model.named_parameters():
                if "experts" not in name and parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.1)
        optimizer.zero_grad()
    return "nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("none", ["nothing"]),
        ("a seed of each group", ["0: blocks.1.experts: ranks", "Draw experts from one seed on all ranks"]),
        ("a step that one group leaves out", ["1: blocks.1.experts: ranks", "only some of them have made a step"]),
        ("a step in the backward", ["1: blocks.1.experts: ", "Step optimizers once loss.backward() is over"]),
    ],
)
def test_replicas_that_would_part_are_refused(ranks: Launch, kind: str, line: str, words: list[str]) -> None:
    for told in ranks(4, train_replicas, kind, line):
        for each in words:
            assert each in told


def fail(_: Tensor) -> None:
    raise ZeroDivisionError


def part_in_backwards(line: str) -> list[str]:
    """What replicas are told where they run other backward passes: each rank is an expert group of its own."""
    rank = dist.get_rank()
    model = make_ours("resident", make_group(1))
    ExpertGradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    told = []
    if "failed" in line:  # once everything has been averaged
        failing = model.get_parameter("embedding.weight").register_hook(fail)
        for step in range(2):
            with pytest.raises(ZeroDivisionError):
                model(words_of(step, rank, 2)).backward()
        failing.remove()
        model.zero_grad()
    for step in range(4):
        try:
            if "another layer" in line and step == 2:
                model.blocks[rank].requires_grad_(False)
            elif line == "more micro-batches" and step == 2:
                for nth in range(1 + rank):
                    with wrapped.no_sync():
                        wrapped(words_of(10 + nth, rank, 2)).backward()
            wrapped(words_of(step, rank, 2)).backward()
        except RanksDifferError as error:
            told.append(f"{step}: {error}")
            break
        optimizer.step()
        optimizer.zero_grad()
    return told


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nothing", []),
        (
            "another layer",
            ["2: ranks [0, 1] hold", "rank 0 blocks.1.experts after 2 steps; rank 1 blocks.0"],
        ),
        (
            "another layer after a backward that failed",
            ["2: ranks [0, 1] hold", "rank 0 blocks.1.experts after 2 steps; rank 1 blocks.0"],
        ),
        (
            "more micro-batches",
            ["ranks [0, 1] hold", "0.experts after 3 steps; rank 1 blocks.1.experts, blocks.0.experts after 2"],
        ),
    ],
)
def test_replicas_that_average_what_does_not_belong_together_are_refused(
    ranks: Launch, line: str, words: list[str]
) -> None:
    for told in ranks(2, part_in_backwards, line):
        assert len(told) == bool(words)
        assert all(each in told[0] for each in words)


def train_with_penalty(kind: str, how: str, mean: bool, group_size: int | None) -> None:
    """Weight decay written as a loss, in one process and on ranks."""
    models = [fused_model(), make_ours(kind, make_group(group_size))]
    ExpertGradients(models[1], mean=mean)
    for model, rank, ranks in zip(models, (0, dist.get_rank()), (1, dist.get_world_size()), strict=True):
        times = 1.0 if mean else 1 / ranks
        for step in range(3):
            model.zero_grad()
            loss = model(words_of(step, rank, ranks)) * times
            penalty = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum() * (0.05 * times)
            if how == "in the loss":
                loss = loss + penalty
            else:
                penalty.backward()
            loss.backward()
            if ranks > 1:
                average(model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    summed = ranks if ranks > 1 and not mean and "experts" not in name else 1
                    parameter.sub_(parameter.grad, alpha=summed)
    torch.testing.assert_close(models[1](words_of(5, 0, 1)), models[0](words_of(5, 0, 1)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["in the loss", "in a pass of its own"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(("size", "group_size"), [(2, None), (4, 2)])
def test_a_penalty_on_weights_counts_once(
    ranks: Launch, kind: str, how: str, mean: bool, size: int, group_size: int | None
) -> None:
    ranks(size, train_with_penalty, kind, how, mean, group_size)


def take_gradients(kind: str, group_size: int | None) -> str:
    """Gradients by ``torch.autograd.grad``, which gives them to its caller."""
    group = make_group(group_size)
    plain, ours = fused_model(), make_ours(kind, group)
    ExpertGradients(ours)
    for _ in range(2):
        loss = ours(words_of(0, dist.get_rank(), dist.get_world_size()))
        try:
            gradients = torch.autograd.grad(loss, list(ours.parameters()))
        except RuntimeError as error:
            told = str(error)
            ours(words_of(0, dist.get_rank(), dist.get_world_size())).backward()  # and goes on
            continue
        told = ""
        for parameter, gradient in zip(ours.parameters(), gradients, strict=True):
            parameter.grad = gradient
    if not told:
        average(ours)
        plain(words_of(0, 0, 1)).backward()
        for model in (plain, ours):
            torch.optim.SGD(model.parameters(), lr=1.0).step()
        torch.testing.assert_close(ours(words_of(1, 0, 1)), plain(words_of(1, 0, 1)), rtol=1e-11, atol=1e-11)
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_a_parameter_is_not_given_are_right_or_refused(ranks: Launch, kind: str) -> None:
    assert ranks(2, take_gradients, kind, None) == ["", ""]
    for size, group_size in ((4, 2), (2, 1)):
        for told in ranks(size, take_gradients, kind, group_size):
            assert "experts: torch.autograd.grad gives gradients" in told
            assert "Write loss.backward()" in told


def train_a_copy(kind: str, prepared: bool) -> str:
    """A copy, made once training has begun: of a model, or of a block to make it deeper."""
    group = make_group()
    model = make_ours(kind, group)
    ExpertGradients(model)
    model(words_of(0, group.rank, group.size)).backward()
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    if prepared:
        ExpertGradients(model)
    loss = model(words_of(1, group.rank, group.size))  # as of a teacher, whose gradients nobody wants
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_copies_that_are_trained_have_their_gradients_scaled_too(ranks: Launch, kind: str) -> None:
    assert ranks(2, train_a_copy, kind, True) == ["", ""]
    for told in ranks(2, train_a_copy, kind, False):
        assert told.startswith("blocks.0.experts: is trained as a copy of a layer that has an ExpertGradients")
    assert ranks(1, train_a_copy, kind, False) == [""]


def call_with_parameters(kind: str) -> str:
    """Gradients of a model's own parameters, of others put in their place for a pass, and of its own again."""
    group = make_group()
    model = make_ours(kind, group)
    ExpertGradients(model)
    words = words_of(0, group.rank, group.size)
    found = []
    for others in (False, True, False):
        model.zero_grad()
        given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = functional_call(model, given, (words,)) if others else model(words)
        loss.backward()
        source = given if others else dict(model.named_parameters())
        found.append([source[name].grad for name in expert_parameters(model)])
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-14, atol=0)
    other = {name: (p.detach() / 2).requires_grad_() for name, p in model.named_parameters()}
    functional_call(model, other, (words,)).backward()
    changed = copy.deepcopy(model)
    ExpertGradients(changed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.div_(2)
    changed.zero_grad()
    changed(words).backward()
    for name, parameter in changed.named_parameters():
        torch.testing.assert_close(other[name].grad, parameter.grad, rtol=1e-14, atol=0)
    half = {name: p / 2 for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError) as refused:
        functional_call(model, half, (words,))
    return str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_put_in_their_place_are_scaled_once(ranks: Launch, kind: str) -> None:
    for told in ranks(2, call_with_parameters, kind):
        assert told.startswith("blocks.0.experts: its weights are computed from others")


def test_an_optimizer_made_before_the_experts_were_replaced_is_refused() -> None:
    model = fused_model()
    before = torch.optim.AdamW(model.parameters())
    replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    model(words_of(0, 0, 1)).backward()
    with pytest.raises(RuntimeError, match=r"AdamW: was made before replace_experts.* Make the optimizer after it"):
        before.step()
    torch.optim.AdamW(model.parameters()).step()


def test_an_optimizer_of_whole_tensors_is_refused() -> None:
    model = fused_model()
    replace_experts(model, partial(ResidentExperts, group=ExpertGroup()))
    model(words_of(0, 0, 1)).backward()
    with pytest.raises(RuntimeError, match=r"Muon: takes the weights of blocks\.0\.experts for a tensor"):
        torch.optim.Muon([parameter for parameter in model.parameters() if parameter.ndim == 2]).step()
    experts = set(expert_parameters(model).values())
    torch.optim.Muon([p for p in model.parameters() if p.ndim == 2 and p not in experts]).step()
    for optimizer in (torch.optim.Adafactor(model.parameters()), torch.optim.LBFGS(model.parameters())):
        with pytest.raises(RuntimeError, match=r"AdamW or SGD"):
            optimizer.step(lambda: model(words_of(0, 0, 1)))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself and others
def test_a_compiled_step_of_an_optimizer_is_looked_at_too() -> None:
    model = fused_model()
    replace_experts(model, partial(ResidentExperts, group=ExpertGroup()))
    for wrong in (False, True):
        optimizer: torch.optim.Optimizer = (torch.optim.Adafactor if wrong else torch.optim.SGD)(model.parameters())
        model(words_of(0, 0, 1)).backward()
        step = torch.compile(optimizer.step, backend="eager")
        with pytest.raises(RuntimeError, match="AdamW or SGD") if wrong else contextlib.nullcontext():
            step()


class Outer(nn.Module):
    """Wrapped under another name than the model that `replace_experts` was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words: Tensor) -> Tensor:
        loss: Tensor = self.inner(words)
        return loss


def wrapped_by(line: str, model: nn.Module) -> nn.Module:
    """A model wrapped as an ordinary line says, for data parallelism over all ranks."""
    if line == "ddp that does not broadcast":
        return DistributedDataParallel(Outer(model), init_sync=False)
    if "ddp of an outer module" in line:
        ExpertGradients(model)
        return DistributedDataParallel(Outer(model))
    if line.startswith("fsdp"):
        ignored = set(expert_parameters(model).values()) if "ignores" in line else None
        model = Outer(model) if "outer" in line else model
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params=ignored)
        return model
    return DistributedDataParallel(model) if "ddp" in line or line == "validation first" else model


def refusal_of(kind: str, line: str) -> str:
    """The first error of up to three steps after an ordinary line."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = make_ours(kind, make_group(1 if "whole experts" in line else None))
    if line == "validation first":
        with torch.no_grad():
            for step in range(4):
                model(words_of(step, rank, size))
    for parameter in model.parameters():
        if "clipped by values" in line:
            parameter.register_hook(lambda gradient: gradient.clamp(-1e3, 1e3))
        if line == "broadcast":
            dist.broadcast(parameter.data if kind == "sharded" else parameter.detach(), 0)
    try:
        model = wrapped_by(line, model)
    except ValueError as error:  # at once
        return f"{type(error).__name__}: {error}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        try:
            model(words_of(step, rank, size)).backward()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        if line == "clip":
            average(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return "nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ddp", "ExpertGradients(model)  # before DistributedDataParallel(model)"),
        ("ddp of an outer module", "has broadcast the experts"),
        ("ddp that does not broadcast", "has broadcast the experts"),
        ("fsdp", "fully_shard(model, ignored_params=set(expert_parameters(model).values()))"),
        ("ddp, clipped by values", "ExpertGradients(model)  # before DistributedDataParallel(model)"),
        ("validation first", "ExpertGradients(model)  # before DistributedDataParallel(model)"),
        ("whole experts in ddp", "ExpertGradients(model)  # before DistributedDataParallel(model)"),
        ("whole experts in ddp of an outer module", "has broadcast the experts"),
        ("fsdp that ignores experts", "FSDP2 averages gradients over ranks, and those of experts are sums"),
        ("fsdp that ignores experts, clipped by values", "FSDP2 averages gradients over ranks"),
        ("fsdp that ignores experts, of an outer module", "FSDP2 averages gradients over ranks"),
        ("broadcast", "hold the same part of the experts"),
        ("clip", "gradients.clip_grad_norm_(1.0)"),
        ("gradients of one rank", "differ on ranks [1] from rank 0's"),
    ],
)
def test_lines_that_would_train_wrongly_are_refused_with_what_to_write(
    ranks: Launch, kind: str, line: str, words: str
) -> None:
    for told in ranks(2, refusal_of, kind, line):
        assert "blocks.0.experts: " in told
        assert words in told


def train_one_of_two(told: bool) -> str:
    """Two models on two ranks each, which DDP knows by its process group, and ExpertGradients perhaps."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[dist.get_rank() // 2]
    model = make_ours("resident", make_group(2))
    ExpertGradients(model, ranks=mine if told else None)
    try:
        DistributedDataParallel(model, process_group=mine)(words_of(0, dist.get_rank() % 2, 2)).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_data_parallelism_over_other_ranks_is_refused(ranks: Launch) -> None:
    assert ranks(4, train_one_of_two, True) == ["nothing"] * 4
    for rank, told in enumerate(ranks(4, train_one_of_two, False)):
        assert f"over ranks {[0, 1] if rank < 2 else [2, 3]}, and those of experts go with ranks [0, 1, 2, 3]" in told
        assert "ExpertGradients(model, ranks=process_group)" in told


class OwnModel(nn.Module):
    """A block of one's own, whose experts are ours from the start."""

    def __init__(self, layer: nn.Module, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, dtype=torch.float64)
        self.experts = layer

    def forward(self, hidden: Tensor) -> Tensor:
        weight, index = self.router(hidden).softmax(-1).topk(2)
        output: Tensor = self.experts(hidden, index, weight)
        return (hidden + output).square().mean()


def train_own(line: str) -> str:
    """The first error of three steps of a model that `replace_experts` has not seen."""
    group, generator = make_group(), torch.Generator().manual_seed(0)
    layer = FullyShardedExperts(ExpertShape(6, 4), 4, group, dtype=torch.float64)
    layer.load_experts(0, torch.randn(4, layer.shape.elements, generator=generator, dtype=torch.float64))
    torch.manual_seed(0)
    model: nn.Module = OwnModel(layer, 6, 4)
    if line == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (group.size,)), ignored_params={layer.shard})
    else:
        gradients = ExpertGradients(model)
        model = DistributedDataParallel(model)
    make = torch.optim.Adafactor if line == "adafactor" else torch.optim.SGD
    optimizer: torch.optim.Optimizer = make(model.parameters(), lr=0.1)
    for step in range(3):
        generator.manual_seed(10 * step + group.rank)
        try:
            model(torch.randn(9, 6, generator=generator, dtype=torch.float64)).backward()
            if line == "clip":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            elif line == "none":
                gradients.clip_grad_norm_(0.01)
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        optimizer.zero_grad()
    return "nothing"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("none", "nothing"),
        ("adafactor", "takes the weights of layer 0 for a tensor"),
        ("clip", "gradients.clip_grad_norm_(1.0)"),
        ("fsdp", "FSDP2 averages gradients over ranks"),
    ],
)
def test_models_of_ones_own_are_looked_at_too(ranks: Launch, line: str, words: str) -> None:
    for told in ranks(2, train_own, line):
        assert words in told


def flatten_experts(kind: str, ignore: bool) -> str:
    """FSDP1, which makes one tensor of all parameters that it is not told to ignore."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    group = make_group()
    model = make_ours(kind, group)
    ExpertGradients(model)
    ignored = list(expert_parameters(model).values()) if ignore else None
    wrapped = FullyShardedDataParallel(model, ignored_states=ignored, device_id=torch.device("cpu"))
    try:
        wrapped(words_of(0, group.rank, group.size)).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_fsdp1_would_flatten_are_refused(ranks: Launch, kind: str) -> None:
    for told in ranks(2, flatten_experts, kind, False):
        assert "FullyShardedDataParallel(model, ignored_states=list(expert_parameters(model).values()))" in told
    assert ranks(2, flatten_experts, kind, True) == ["nothing"] * 2


def train_unalike(kind: str, line: str) -> str:
    """The first error of up to six steps, each with an ordinary line after the backward pass."""
    group = make_group()
    model = make_ours(kind, group)
    if kind == "resident":
        model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name or line != "scaler of each rank")
    ExpertGradients(model)
    adam = "optimizer" in line
    optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)(model.parameters(), lr=0.01)
    scaler = ShardedGradScaler("cpu") if line == "scaler of all ranks" else torch.amp.GradScaler("cpu")
    for step in range(6):
        try:
            loss = model(words_of(step, group.rank, group.size))
        except RanksDifferError as error:
            return str(error)
        if "scaler" in line:
            scaler.scale(loss).backward()
            if step == 2 and group.rank == 1:
                (flat, *_) = expert_parameters(model).values()
                assert flat.grad is not None
                flat.grad[0, 0] = float("inf")
            if line == "scaler of all ranks":
                average(model)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            if line == "all gradients reduced":
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
            else:
                average(model)
            if line == "optimizer of rank 0":
                state = [optimizer.state_dict()]
                dist.broadcast_object_list(state, 0)
                optimizer.load_state_dict(state[0])
            optimizer.step()
        optimizer.zero_grad()
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("all gradients reduced", "experts = set(expert_parameters(model).values())"),
        ("optimizer of rank 0", 'dcp.load({"training": TrainingState(model, optimizer)}'),
        ("optimizer of each rank", ""),
        ("scaler of each rank", "rank 0 3, rank 1 2. GradScaler leaves out"),
        ("scaler of all ranks", ""),
    ],
)
def test_ranks_that_train_experts_unalike_are_refused(ranks: Launch, kind: str, line: str, words: str) -> None:
    for told in ranks(2, train_unalike, kind, line):
        assert words in told
        assert bool(told) == bool(words)


def clip_late(kind: str, frozen: str, copied: bool) -> int:
    """Clip by each rank's own norm from the sixth step on; returns the number of the pass that refuses."""
    group = make_group()
    model = make_ours(kind, group)
    if copied:
        model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    gradients = ExpertGradients(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(9):
        try:
            wrapped(words_of(step, group.rank, group.size)).backward()
        except RanksDifferError:
            return step + 1
        if step < 5:
            gradients.clip_grad_norm_(0.01)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frozen", "copied"), [("", False), ("gate.weight", False), ("", True)])
def test_clipping_by_a_norm_of_each_rank_is_refused_in_the_next_pass(
    ranks: Launch, kind: str, frozen: str, copied: bool
) -> None:
    assert ranks(2, clip_late, kind, frozen, copied) == [7, 7]


def train_equal_experts() -> None:
    """Experts copied from one network, as when a dense model is made sparse: all ranks hold the same, rightly."""
    group = make_group()
    plain = fused_model()
    for name, parameter in plain.named_parameters():
        if "experts" in name:
            parameter.data[1:] = parameter.data[0]
    expected = plain(words_of(0, group.rank, group.size))
    replace_experts(plain, partial(ResidentExperts, group=group))
    torch.testing.assert_close(plain(words_of(0, group.rank, group.size)), expected, rtol=1e-12, atol=0)
    plain.to(torch.bfloat16)
    torch.testing.assert_close(plain(words_of(0, group.rank, group.size)).double(), expected, rtol=0.05, atol=0)


def test_experts_that_are_copies_of_each_other_are_no_mistake(ranks: Launch) -> None:
    ranks(2, train_equal_experts)


def test_a_model_without_experts_of_ours_has_no_such_gradients() -> None:
    with pytest.raises(ValueError, match="has no FullyShardedExperts or ResidentExperts"):
        ExpertGradients(fused_model())


def uneven_groups() -> None:
    members = [[0], [1, 2]]
    (group,) = [group for group in map(ExpertGroup.create, members) if group is not None]
    layer = FullyShardedExperts(ExpertShape(4, 3), EXPERTS, group)
    with pytest.raises(ValueError, match=r"expert groups \[\(0,\), \(1, 2\)\]: must be of one size"):
        ExpertGradients(layer)


def test_uneven_expert_groups_are_refused(ranks: Launch) -> None:
    ranks(3, uneven_groups)
