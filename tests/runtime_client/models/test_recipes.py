"""Each program of examples/recipes against training in one process."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.repository import ROOT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

Launch = Callable[..., list[Any]]
RECIPES = ROOT / "examples/recipes"
STEPS, MAX_NORM, TOLERANCE = 20, 0.1, 1e-10


@contextmanager
def recipe(name: str) -> Iterator[Any]:
    """The module, without warnings of libraries."""
    if str(RECIPES) not in sys.path:
        sys.path.insert(0, str(RECIPES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module(name)


def shared_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained beside the experts, whose gradients have gone into it."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): whole(weight)
        for name, weight in model.named_parameters()
        if weight.requires_grad and ".experts." not in name
    }


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


def run(name: str, *arguments: object) -> dict[str, Tensor]:
    """A recipe's trained weights, in the environment that torchrun gives it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 29500}
    environment = {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in given.items()}
    os.environ |= environment
    try:
        with recipe(name) as module:
            return shared_weights(module.train(*arguments))
    finally:
        for key in environment:
            del os.environ[key]
        if "accelerate.state" in sys.modules:
            importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)


def train_alone(batches: int = 1) -> dict[str, Tensor]:
    """The small model, each step of so many batches."""
    with recipe("small") as small:
        model = small.small_model()
        optimizer = AdamW(model.parameters(), lr=0.01)
        for step in range(STEPS):
            for part in range(batches):
                (model(small.words_of(batches * step + part)) / batches).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            assert norm > MAX_NORM
            optimizer.step()
            optimizer.zero_grad()
        return shared_weights(model)


def train_gpt_oss(model: nn.Module, weight_decay: float = 0.01) -> dict[str, Tensor]:
    with recipe("tiny_gpt_oss") as tiny:
        words = torch.stack([row["input_ids"] for row in tiny.sequences()]).view(STEPS, -1, tiny.LENGTH)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
    for batch in words:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return shared_weights(model)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=TOLERANCE, msg=name)


def compare_all(runs: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for actual in runs:
        assert actual.keys() == expected.keys()
        compare(actual, expected)


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("ddp", 2, ()),
        ("dp_ep", 4, ()),
        pytest.param("fsdp2", 2, (), marks=pytest.mark.slow),
        pytest.param("zero", 4, (), marks=pytest.mark.slow),
        pytest.param("checkpointing", 2, (STEPS, "eager"), marks=pytest.mark.slow),
    ],
)
def test_a_recipe_trains_as_one_process(ranks: Launch, name: str, size: int, arguments: tuple[object, ...]) -> None:
    compare_all(ranks(size, run, name, *arguments), train_alone())


def test_a_pipeline_trains_as_one_process(ranks: Launch) -> None:
    expected = train_alone()
    stages = ["embedding.weight", "blocks.0.gate.weight"], ["blocks.1.gate.weight", "head.weight", "head.bias"]
    for rank, actual in enumerate(ranks(4, run, "pipeline")):
        compare({name: actual[name] for name in stages[rank // 2]}, expected)


@pytest.mark.slow
def test_accelerate(ranks: Launch) -> None:
    compare_all(ranks(2, run, "hf_accelerate"), train_alone(batches=2))


@pytest.mark.slow
def test_the_trainer_of_transformers(ranks: Launch, tmp_path: Path) -> None:
    with recipe("tiny_gpt_oss") as tiny:
        model = tiny.tiny_gpt_oss()
        compare_all(ranks(2, run, "hf_trainer", str(tmp_path)), train_gpt_oss(model, weight_decay=0))
        saved = type(model).from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_gpt_oss_from_a_checkpoint_to_a_checkpoint(ranks: Launch, tmp_path: Path) -> None:
    with recipe("tiny_gpt_oss") as tiny:
        model = tiny.tiny_gpt_oss()
        model.save_pretrained(tmp_path / "from")
        compare_all(ranks(2, run, "gpt_oss", tmp_path / "from", tmp_path / "to"), train_gpt_oss(model))
        saved = type(model).from_pretrained(tmp_path / "to").state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_lora_beside_frozen_experts(ranks: Launch, tmp_path: Path) -> None:
    with recipe("tiny_gpt_oss") as tiny:
        import peft

        settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        adapted = peft.get_peft_model(tiny.tiny_gpt_oss(), settings)
        compare_all(ranks(2, run, "lora", str(tmp_path)), train_gpt_oss(adapted))
        loaded = peft.PeftModel.from_pretrained(tiny.tiny_gpt_oss(), tmp_path)
    for name, weight in adapted.named_parameters():
        torch.testing.assert_close(dict(loaded.named_parameters())[name], weight, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_adapters_of_experts_are_refused_before_anything_changes() -> None:
    from functools import partial

    from moeplan.runtime_client import ExpertGroup, FullyShardedExperts, replace_experts

    with recipe("tiny_gpt_oss") as tiny:
        import peft

        settings = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        adapted = peft.get_peft_model(tiny.tiny_gpt_oss(), settings)
        before = adapted.state_dict()
        with pytest.raises(ValueError, match=r"experts.*leave gate_up_proj and down_proj out of target_parameters"):
            replace_experts(adapted, partial(FullyShardedExperts, group=ExpertGroup()))
        assert list(adapted.state_dict()) == list(before)
        model = tiny.tiny_gpt_oss()
        replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
        with pytest.raises(ValueError, match="target"):
            peft.get_peft_model(model, settings)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_is_short_and_described(path: Path) -> None:
    text = path.read_text()
    if "torchrun" in text:
        assert len(text.splitlines()) <= 40
        assert f"examples/recipes/{path.name}" in (ROOT / "docs/recipes.md").read_text()
