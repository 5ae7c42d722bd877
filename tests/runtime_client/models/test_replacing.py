"""Real transformers models with our experts in the place of theirs, and their checkpoints, in double precision."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import replace as replace_shape
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.support.expert_groups import make_group, make_ours
from tests.support.fused_model import HIDDEN, FusedExperts, FusedModel, fused_model, words_of
from tests.support.tiny_models import tiny_model as make_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.runtime_client.models.checkpoint import TrainingState
from moeplan.runtime_client.models.gradients import ExpertGradients, expert_parameters
from moeplan.runtime_client.models.replacing import replace_experts
from moeplan.runtime_client.recording.recorder import record
from moeplan.solvers import QuotaPlanner, SpillOptions
from moeplan.solvers.problem.layout import Layout

Launch = Callable[..., list[Any]]
EXPERTS = 5
SEQUENCES = 6
TOLERANCE = 1e-6  # routers take their softmax in single precision, whatever the model's


def replace(model: nn.Module, kind: str, group: ExpertGroup) -> None:
    if kind == "sharded":
        layers = replace_experts(model, partial(FullyShardedExperts, group=group))
        slots = np.array([[(d + c) % EXPERTS for c in range(EXPERTS - 1)] for d in range(group.size)])
        for layer in layers.values():
            layer.layout = Layout(slots, EXPERTS) if group.size > 1 else layer.layout
        return
    home = np.arange(EXPERTS)[::-1] % group.size
    planner = QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 2, home=home), group.size)
    replace_experts(model, partial(ResidentExperts, group=group, planner=planner))


def tokens(step: int) -> Tensor:
    return torch.randint(32, (SEQUENCES, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    logits: Tensor = model(input_ids=batch[:, :-1]).logits
    return logits, cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, group: ExpertGroup) -> None:
    """One step on this rank's sequences; gradients of all but the experts are summed over the ranks."""
    batch = tokens(step).tensor_split(group.size)[group.rank]
    optimizer.zero_grad()
    loss_of(model, batch)[1].backward()
    for name, parameter in model.named_parameters():
        if not name.endswith((".shard", ".flat")) and group.size > 1:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
    optimizer.step()


def compare_model(family: str, kind: str) -> None:
    group = make_group()
    plain, ours = make_model(family), make_model(family)
    replace(ours, kind, group)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, ours)]
    for step in range(2):
        batch = tokens(step)
        with torch.no_grad():
            expected, actual = loss_of(plain, batch)[0], loss_of(ours, batch.tensor_split(group.size)[group.rank])[0]
        torch.testing.assert_close(actual, expected.tensor_split(group.size)[group.rank], rtol=0, atol=TOLERANCE)
        train(plain, optimizers[0], step, ExpertGroup())
        train(ours, optimizers[1], step, group)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "longcat_flash"])
@pytest.mark.parametrize("kind", ["sharded", "resident"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_model_keeps_its_outputs_and_trains_alike(ranks: Launch, family: str, kind: str, size: int) -> None:
    ranks(size, compare_model, family, kind)


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_experts_that_are_called_with_rows_of_all_tokens(ranks: Launch, kind: str) -> None:
    ranks(2, compare_model, "llama4_text", kind)
    model = make_model("llama4_text")
    replace(model, "sharded", ExpertGroup())
    with record(model) as recorder:
        loss_of(model, tokens(0))
        recorder.step()
        counts = recorder.finish()
    assert counts is not None
    assert (counts.sum(axis=1) == 2 * tokens(0)[:, 1:].numel()).all()


class SharedExperts(nn.Module):
    """As in Inkling: every token goes to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Parameter(torch.ones(2, 6, 8)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.ones(2, 8, 6))

    def forward(self, hidden: Tensor, gammas: Tensor) -> Tensor:
        return hidden


def test_shared_experts_stay_where_they_are() -> None:
    model = fused_model()
    model.blocks[0].shared_experts = SharedExperts()
    assert list(replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))) == [
        "blocks.0.experts",
        "blocks.1.experts",
    ]
    assert type(model.blocks[0].shared_experts) is SharedExperts


def share_experts(kind: str, folder: Path) -> None:
    """Two blocks with routers of their own and the same experts, as in recurrent models, against one process."""
    group = make_group()
    plain, ours = fused_model(), fused_model()
    for model in (plain, ours):
        model.blocks[1].experts = model.blocks[0].experts
    make_ours(kind, group, ours)
    assert ours.blocks[1].experts is ours.blocks[0].experts
    ExpertGradients(ours)
    for step in range(3):
        plain(words_of(step, 0, 1)).backward()
        loss = ours(words_of(step, group.rank, group.size))
        loss.backward()
        for name, parameter in ours.named_parameters():
            if name not in expert_parameters(ours):
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= group.size
        for model in (plain, ours):
            torch.optim.SGD(model.parameters(), lr=0.5).step()
            model.zero_grad()
    whole = plain(words_of(9, 0, 1)).detach()
    torch.testing.assert_close(ours(words_of(9, 0, 1)).detach(), whole, rtol=1e-12, atol=0)
    save_checkpoint({"training": TrainingState(ours, make_optimizer(ours))}, checkpoint_id=folder)
    for other in ("sharded", "resident", "plain"):
        model = fused_model()
        model.blocks[1].experts = model.blocks[0].experts
        if other != "plain":
            make_ours(other, group, model)
        load_checkpoint({"training": TrainingState(model, make_optimizer(model))}, checkpoint_id=folder)
        torch.testing.assert_close(model(words_of(9, 0, 1)).detach(), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_experts_that_blocks_share_stay_shared(ranks: Launch, kind: str, tmp_path: Path) -> None:
    ranks(2, share_experts, kind, tmp_path)


def test_refuses_what_would_be_lost_with_the_experts() -> None:
    model = fused_model()
    model.blocks[1].get_submodule("experts").down_proj = model.get_parameter("blocks.0.experts.down_proj")
    with pytest.raises(ValueError, match=r"blocks\.1\.experts: has weights of blocks\.0\.experts"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    model = fused_model()
    with record(model), pytest.raises(ValueError, match=r"blocks\.0\.experts: has hooks.*call record\(model\)"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_refuses_quantized_experts(dtype: torch.dtype) -> None:
    model = fused_model()
    experts: Any = model.blocks[1].experts
    experts.down_proj = nn.Parameter(torch.zeros(experts.down_proj.shape, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"blocks\.1\.experts .* has weights of {dtype}; .*dequantize=True"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))


def test_refuses_modules_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="has no module with parameters gate_up_proj"):
        replace_experts(nn.Linear(2, 2), partial(FullyShardedExperts, group=ExpertGroup()))
    model = make_model("mixtral")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 24))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts .* gate_up_proj_bias"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    del experts.gate_up_proj_bias
    experts.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match="Tanh"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    assert type(model.get_submodule("model.layers.0.mlp.experts")).__name__ == "MixtralExperts"


class ClampedExperts(FusedExperts):
    """As in DeepSeek-V4 and others: no difference while weights are small."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated(gate.clamp(max=10.0), up)


class DroppingExperts(FusedExperts):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.dropout(super().forward(hidden, top_k_index, top_k_weights))


class PrunedExperts(FusedExperts):
    """With a factor of each expert that training does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alive", torch.tensor([1.0, 0.0, 1.0, 1.0]))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        alive = self.get_buffer("alive").to(top_k_weights)
        return super().forward(hidden, top_k_index, top_k_weights * alive[top_k_index])


class FullExperts(FusedExperts):
    """Drops what is beyond a capacity of at least eight tokens."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        capacity = max(8, int(1.25 * top_k_index.numel() / self.num_experts))
        chosen = nn.functional.one_hot(top_k_index.flatten(), self.num_experts)
        place = (chosen.cumsum(0) * chosen).sum(-1).view_as(top_k_index)
        return super().forward(hidden, top_k_index, top_k_weights * (place <= capacity))


class OtherCall(FusedExperts):
    def forward(self, hidden: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        return hidden


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ClampedExperts, "does not compute .* it differs by"),
        (DroppingExperts, "does not compute"),
        (PrunedExperts, "has buffers alive"),
        (FullExperts, "does not compute .* it differs by"),
        (OtherCall, "cannot be called as"),
    ],
)
def test_refuses_experts_that_compute_something_else(kind: type[FusedExperts], words: str, device: str) -> None:
    model = fused_model().eval().to(device)
    model.blocks[1].experts = kind().to(device)
    with pytest.raises(ValueError, match=rf"blocks\.1\.experts \({kind.__name__}\): {words}"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    assert type(model.get_submodule("blocks.0.experts")) is FusedExperts


FORMS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("deepseek_v4.DeepseekV4", "Config", {"num_local_experts": EXPERTS, "moe_intermediate_size": 12}, {"limit": 10.0}),
    (
        *("minimax_m3_vl.MiniMaxM3VL", "TextConfig", {"num_local_experts": EXPERTS, "intermediate_size": 12}),
        {"slope": 1.702, "shift": 1.0, "limit": 7.0},
    ),
    (
        *("gemma4.Gemma4Text", "Config", {"num_experts": EXPERTS, "moe_intermediate_size": 12}),
        {"activation": "gelu_tanh"},
    ),
    ("aria.Aria", "TextConfig", {"moe_num_experts": EXPERTS, "intermediate_size": 12}, {"transposed": True}),
    (
        *("nemotron_h.NemotronH", "Config", {"n_routed_experts": EXPERTS, "moe_intermediate_size": 12}),
        {"gated": False, "activation": "relu2"},
    ),
    (
        *("inkling2.Inkling2", "TextConfig"),
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 12,
            "mlp_gate_softcap": 3.0,
            "mlp_up_softcap": 7.0,
        },
        {"softcaps": (3.0, 7.0)},
    ),
    (
        *("muse_spark.MuseSpark", "TextConfig"),  # a norm of results
        *({"num_local_experts": EXPERTS, "moe_intermediate_size": 12, "moe_hidden_size": 16}, {}),
    ),
    (
        *("longcat_flash.LongcatFlash", "Config"),  # three more choices, which are the identity
        *({"n_routed_experts": EXPERTS, "expert_ffn_hidden_size": 12, "zero_expert_num": 3}, {}),
    ),
]


@pytest.mark.parametrize(("name", "config", "sizes", "form"), FORMS, ids=[name for name, *_ in FORMS])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_forms_of_transformers_are_recognised(
    name: str, config: str, sizes: dict[str, Any], form: dict[str, Any], size: float
) -> None:
    """Results and gradients, at small and at large weights."""
    family, kind = name.split(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that transformers imports
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    described = getattr(modeling, kind + config)()
    for key, value in {"hidden_size": 16, "_experts_implementation": "eager", **sizes}.items():
        setattr(described, key, value)
    torch.manual_seed(0)
    experts = getattr(modeling, f"{kind}Experts")(described).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=size)
    choices = EXPERTS + sizes.get("zero_expert_num", 0)
    index, weight = torch.randint(choices, (9, 2)), torch.rand(9, 2, dtype=torch.float64)
    hidden = torch.randn(9, 16, dtype=torch.float64)
    mine, theirs = ([part.clone().requires_grad_() for part in (hidden, weight)] for _ in range(2))
    target = torch.randn(9, 16, dtype=torch.float64)
    holder = nn.ModuleList([copy.deepcopy(experts)])
    (layer,) = replace_experts(holder, partial(FullyShardedExperts, group=ExpertGroup())).values()
    assert layer.shape == replace_shape(ExpertShape(16, 12), **form)
    expected, actual = experts(theirs[0], index, theirs[1]), layer(mine[0], index, mine[1])
    (expected * target).sum().backward()
    (actual * target).sum().backward()
    gradients = [experts.get_parameter(part).grad[:EXPERTS] for part in layer.shape.parts]
    pairs = [(actual, expected), (layer.shard.grad, join_weights(*gradients))]
    pairs += [(one.grad, other.grad) for one, other in zip(mine, theirs, strict=True)]
    pairs += [(layer.get_parameter(n).grad, p.grad) for n, p in experts.named_parameters() if "." in n]
    single = name.startswith(("inkling2", "muse"))  # they go through single precision in between
    for one, other in pairs:
        tolerance = (1e-6 if single else 1e-12) * float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


class NormedExperts(FusedExperts):
    """As in Muse Spark: all experts share a norm of what they give, before it is weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.post_norm = nn.RMSNorm(HIDDEN)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for choice in range(top_k_index.shape[1]):
            ones = torch.ones(len(hidden), 1, dtype=hidden.dtype)
            results = super().forward(hidden, top_k_index[:, choice, None], ones)
            out = out + self.post_norm(results) * top_k_weights[:, choice, None]
        return out


def normed_model() -> FusedModel:
    model = fused_model()
    torch.manual_seed(1)
    for block in model.blocks:
        block.experts = NormedExperts().double()
    return model


def train_normed(kind: str, folder: Path) -> None:
    """The norm is trained beside the experts, as the router is, and saved and loaded."""
    group = make_group()
    plain, ours = normed_model(), make_ours(kind, group, normed_model())
    gradients = ExpertGradients(ours)
    wrapped = DistributedDataParallel(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (plain, ours)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain(words_of(step, 0, 1)).backward()
        wrapped(words_of(step, group.rank, group.size)).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        torch.testing.assert_close(gradients.clip_grad_norm_(0.05), expected, rtol=1e-11, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    for name in ("blocks.0.gate.weight", "blocks.1.experts.post_norm.weight"):
        torch.testing.assert_close(ours.get_parameter(name), plain.get_parameter(name), rtol=1e-11, atol=1e-13)
    save_checkpoint({"training": TrainingState(ours, optimizers[1])}, checkpoint_id=folder)
    again = normed_model()
    load_checkpoint(
        {"training": TrainingState(again, torch.optim.SGD(again.parameters(), lr=1.0))}, checkpoint_id=folder
    )
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_a_norm_of_results_is_trained_beside_the_experts(ranks: Launch, kind: str, tmp_path: Path) -> None:
    ranks(2, train_normed, kind, tmp_path)


def train_frozen(kind: str) -> None:
    """Frozen experts stay so, pass gradients on, and take part in no optimizer step."""
    group = make_group()
    plain, ours = fused_model(), fused_model()
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" not in name)
    if kind == "sharded":
        replace_experts(ours, partial(FullyShardedExperts, group=group))
    else:
        planner = QuotaPlanner(SpillOptions.uniform(4, group.size, 2), group.size)
        replace_experts(ours, partial(ResidentExperts, group=group, planner=planner))
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == list(expert_parameters(ours))
    for _ in range(2):
        for model, words in ((plain, words_of(0, 0, 1)), (ours, words_of(0, group.rank, group.size))):
            model.zero_grad()
            model(words).backward()
        for name, parameter in plain.named_parameters():
            if "experts" not in name:
                actual = ours.get_parameter(name).grad
                assert actual is not None
                dist.all_reduce(actual)
                torch.testing.assert_close(actual / group.size, parameter.grad, rtol=1e-11, atol=1e-13)
    assert all(parameter.grad is None for parameter in expert_parameters(ours).values())


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_frozen_experts_stay_frozen(ranks: Launch, kind: str) -> None:
    ranks(2, train_frozen, kind)


def test_refuses_half_frozen_experts_and_adapters() -> None:
    model = fused_model()
    model.get_parameter("blocks.0.experts.down_proj").requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\.0\.experts .* freeze all or none"):
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    adapter = nn.Module()  # as peft's ParamWrapper
    adapter.base_layer = FusedExperts()
    with pytest.raises(ValueError, match=r"base_layer .* target_parameters"):
        replace_experts(adapter, partial(FullyShardedExperts, group=ExpertGroup()))


def save_whole(kind: str, folder: Path) -> str:
    group = make_group()
    model: Any = make_model("qwen3_moe")
    replace(model, kind, group)
    with pytest.raises(RuntimeError) as refused:
        model.save_pretrained(folder)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_save_pretrained_of_one_ranks_part_is_refused(ranks: Launch, kind: str, tmp_path: Path) -> None:
    for told in ranks(2, save_whole, kind, tmp_path):
        assert told.startswith("model.layers.0.mlp.experts: ")
        assert "TrainingState(model, optimizer)" in told
    assert not list(tmp_path.glob("*.safetensors"))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": 0.005}], lr=0.01)


def save(family: str, kind: str, folder: Path) -> None:
    group = make_group()
    model = make_model(family)
    replace(model, kind, group)
    optimizer = make_optimizer(model)
    for step in range(2):
        train(model, optimizer, step, group)
    save_checkpoint({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)


def load(family: str, kind: str, folder: Path) -> Tensor:
    """Continue from the checkpoint for a step, and return the logits of a batch."""
    group = make_group()
    model = make_model(family)
    for parameter in model.parameters():
        parameter.data.zero_()
    replace(model, kind, group) if kind != "plain" else None
    optimizer = make_optimizer(model)
    load_checkpoint({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
    train(model, optimizer, 2, group)
    with torch.no_grad():
        return loss_of(model, tokens(3))[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_a_checkpoint_continues_with_any_ranks_layers_and_layout(
    ranks: Launch, family: str, kind: str, tmp_path: Path
) -> None:
    model = make_model(family)
    optimizer = make_optimizer(model)
    for step in range(3):
        train(model, optimizer, step, ExpertGroup())
    with torch.no_grad():
        expected = loss_of(model, tokens(3))[0]

    ranks(4, save, family, kind, tmp_path)
    for size, other in [(3, "sharded"), (2, "resident"), (1, "plain")]:
        for actual in ranks(size, load, family, other, tmp_path):
            torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def start_anew(kind: str, make: Callable[..., torch.optim.Optimizer], folder: Path) -> None:
    """A checkpoint before the first step changes nothing for who writes it, nor for who reads it, gradients or not."""
    group, trained = make_group(), []
    for how in ("not at all", "written", "read", "read with gradients"):
        model = make_model("qwen3_moe")
        replace(model, kind, group)
        optimizer = make(model.parameters())
        if how == "read with gradients":
            loss_of(model, tokens(0))[1].backward()
        if how != "not at all":
            go = save_checkpoint if how == "written" else load_checkpoint
            go({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
        assert (how == "read with gradients") == any(p.grad is not None for p in model.parameters())
        optimizer.zero_grad()
        for step in range(3):
            train(model, optimizer, step, group)
        trained.append([parameter.detach() for parameter in model.parameters()])
    for others in trained[1:]:
        torch.testing.assert_close(others, trained[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_a_checkpoint_before_the_first_step(
    ranks: Launch, kind: str, make: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    ranks(2, start_anew, kind, make, tmp_path)


def test_biases_of_experts_that_would_decay_unlike_others_are_refused() -> None:
    model = make_model("gpt_oss")
    replace(model, "resident", ExpertGroup())
    biases = [p for n, p in model.named_parameters() if "bias" in n]
    rest = [p for n, p in model.named_parameters() if "bias" not in n]
    said: list[dict[str, Any]] = [{}, {"weight_decay": 0.0}, {"decays_biases": True}]
    for group in said:
        decayed: dict[str, Any] = {"params": rest, "weight_decay": 0.1} | group
        optimizer = torch.optim.AdamW([decayed, {"params": biases, "weight_decay": 0.0}], lr=0.01)
        if group:
            train(model, optimizer, 0, ExpertGroup())
            continue
        with pytest.raises(RuntimeError, match=r'(?s)AdamW: weight_decay = 0\.1 of .*"decays_biases": True'):
            train(model, optimizer, 0, ExpertGroup())


class Factored(torch.optim.Adafactor):
    """Under a name that nobody knows."""


def save_factored(kind: str, folder: Path) -> str:
    group = make_group()
    model = make_model("qwen3_moe")
    replace(model, kind, group)
    optimizer = Factored(model.parameters())
    train(model, optimizer, 0, group)
    with pytest.raises(ValueError) as refused:
        save_checkpoint({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_states_of_an_optimizer_that_belong_to_no_expert_are_refused(ranks: Launch, kind: str, tmp_path: Path) -> None:
    for told in ranks(2, save_factored, kind, tmp_path):
        assert "layers.0.mlp.experts" in told
        assert "AdamW or SGD" in told


def train_wrapped() -> list[str]:
    """The recipe of docs/experts.md for data parallelism; returns the logical names of the weights."""
    group = make_group()
    plain, ours = make_model("mixtral"), make_model("mixtral")
    replace_experts(ours, partial(FullyShardedExperts, group=group))
    ExpertGradients(ours)
    wrapped = DistributedDataParallel(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (plain, wrapped)]
    for step in range(2):
        batch = tokens(step)
        mine = batch.tensor_split(group.size)[group.rank]
        for model, part, optimizer in zip((plain, wrapped), (batch, mine), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, part)[1] / part[:, 1:].numel()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        logits = [loss_of(model, tokens(3))[0] for model in (plain, wrapped)]
    torch.testing.assert_close(*logits, rtol=0, atol=TOLERANCE)
    state = TrainingState(wrapped, optimizers[1]).state_dict()
    for name, tensor in plain.state_dict().items():
        assert state["model"][name].shape == tensor.shape
    return sorted(state["model"])


def test_data_parallelism_as_documented(ranks: Launch) -> None:
    assert ranks(2, train_wrapped) == [sorted(make_model("mixtral").state_dict())] * 2


class AnyConfig:
    """Small sizes for whatever experts modules of transformers look up."""

    _experts_implementation = "eager"
    words = (
        *(("limit", 7.0), ("alpha", 1.702), ("softcap", 5.0), ("eps", 1e-6), ("act", "silu")),
        *(("intermediate", 12), ("ffn", 12), ("hidden", 16), ("latent", 16), ("expert", EXPERTS)),
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for word, value in self.words if word in name), 2)


OTHERS = {
    *("DbrxExperts", "JetMoeParallelExperts", "NllbMoeExperts", "SwitchTransformersExperts"),  # no fused modules
    *("AriaSharedExperts", "InklingSharedExperts"),  # every token goes to them
}


def experts_of_transformers() -> dict[str, type[nn.Module]]:
    """Every class of routed experts in it, by name."""
    import transformers

    found: dict[str, type[nn.Module]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        names = re.findall(r"^class (\w*Experts)\(", path.read_text(), re.M)
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}") if names else None
        found |= {name: getattr(module, name) for name in names}
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # it imports some seventy models
def test_every_fused_experts_class_of_transformers_is_exact() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = experts_of_transformers()
        exact = set()
        for name, kind in kinds.items():
            if name in OTHERS:
                continue
            torch.manual_seed(0)
            experts = kind(AnyConfig()).double()
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=0.5)
            holder = nn.ModuleList([experts])
            replace_experts(holder, partial(FullyShardedExperts, group=ExpertGroup()))
            others = getattr(experts, "zero_expert_num", 0)  # choices that are the identity
            index, weight = torch.randint(EXPERTS + others, (9, 2)), torch.rand(9, 2, dtype=torch.float64)
            choices = () if name == "Llama4TextExperts" else (index, weight)
            for size in (0.1, 100.0):
                hidden = size * torch.randn(9 if choices else 9 * EXPERTS, 16, dtype=torch.float64)
                expected = experts(hidden, *choices)
                torch.testing.assert_close(
                    holder[0](hidden, *choices), expected, rtol=0, atol=1e-6 * float(expected.abs().max())
                )
            exact.add(name)
    assert exact == set(kinds) - OTHERS
    assert len(exact) >= 68
