"""Hugging Face checkpoints read and written by ranks, against those of transformers itself."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.support.expert_groups import make_group
from tests.support.fused_model import fused_model
from tests.support.tiny_models import tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.group import ExpertGroup
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts
from moeplan.runtime_client.models.gradients import ExpertGradients, expert_parameters
from moeplan.runtime_client.models.pretrained import load_pretrained, save_pretrained
from moeplan.runtime_client.models.replacing import replace_experts
from moeplan.solvers import QuotaPlanner, SpillOptions

Launch = Callable[..., list[Any]]
EXPERTS = 5
FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "deepseek_v3", "longcat_flash")),
]


def maker(kind: str, group: ExpertGroup) -> Any:
    if kind == "sharded":
        return partial(FullyShardedExperts, group=group)
    home = np.arange(EXPERTS)[::-1] % group.size
    return partial(
        ResidentExperts,
        group=group,
        planner=QuotaPlanner(SpillOptions.uniform(EXPERTS, group.size, 2, home=home), group.size),
    )


def read(folder: Path) -> nn.Module:
    """By transformers, whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        batch = torch.arange(12).view(2, 6)
        result: Tensor = model(input_ids=batch).logits
        return result


def pass_on(kind: str, group_size: int | None, source: Path, target: Path, wrapper: str = "") -> Tensor:
    """From one folder to another; returns logits."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    replace_experts(model, maker(kind, make_group(group_size)))
    if wrapper == "fsdp":
        fully_shard(
            model,
            mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
            ignored_params=set(expert_parameters(model).values()),
        )
    load_pretrained(model, source)
    if wrapper == "zero":
        meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
        for name in list(expert_parameters(model)):
            fully_shard(model.get_submodule(name.rpartition(".")[0]), mesh=meshes["replicas"])
        with pytest.raises(ValueError, match=r"call load_pretrained before fully_shard\(layer\)"):
            load_pretrained(model, source)
    model.eval()
    wrapped: nn.Module = model
    if wrapper == "ddp":
        ExpertGradients(model)
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
    save_pretrained(wrapped, target)
    return logits(model)


def quietly(*arguments: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pass_on(*arguments)


def same_tensors(actual: Path, expected: Path) -> None:
    one, other = read(actual).state_dict(), read(expected).state_dict()
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def names_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_from_four_ranks_to_three_to_one_and_back_to_transformers(ranks: Launch, family: str, tmp_path: Path) -> None:
    original = tiny_model(family)
    folders = [tmp_path / str(number) for number in range(4)]
    original.save_pretrained(folders[0], max_shard_size="6KB")  # several files
    expected = logits(original)
    runs: list[tuple[int, tuple[Any, ...]]] = [(4, ("sharded", None)), (3, ("resident", None)), (1, ("sharded", None))]
    for number, (size, arguments) in enumerate(runs):
        for actual in ranks(size, quietly, *arguments, folders[number], folders[number + 1]):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        same_tensors(folders[number + 1], folders[0])
    assert names_in(folders[3]) == names_in(folders[0])
    index = json.loads((folders[3] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names_in(folders[3])


def test_layers_that_predict_further_tokens_are_left_out(ranks: Launch, tmp_path: Path) -> None:
    """A checkpoint has one layer more than the model, as those of DeepSeek-V3 do; transformers leaves it out, too."""
    from safetensors.torch import load_file, save_file

    source, target = tmp_path / "source", tmp_path / "target"
    original = tiny_model("deepseek_v3")
    original.save_pretrained(source)
    file = source / "model.safetensors"
    tensors = load_file(file)
    last = f"model.layers.{original.config.num_hidden_layers - 1}."
    further = f"model.layers.{original.config.num_hidden_layers}."
    more = {name.replace(last, further): tensor + 1 for name, tensor in tensors.items() if name.startswith(last)}
    assert any(".experts." in name for name in more)
    save_file({**tensors, **more, f"{further}eh_proj.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    (actual,) = ranks(1, quietly, "sharded", None, source, target)
    torch.testing.assert_close(actual, logits(original), rtol=0, atol=1e-6)
    assert names_in(target) == set(tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "wrapper", "group_size"), [("resident", "zero", 2), ("sharded", "fsdp", None), ("resident", "ddp", 2)]
)
def test_wrapped_models_and_replicas(
    ranks: Launch, kind: str, wrapper: str, group_size: int | None, tmp_path: Path
) -> None:
    original = tiny_model("qwen3_moe")
    original.save_pretrained(tmp_path / "first")
    for actual in ranks(4, quietly, kind, group_size, tmp_path / "first", tmp_path / "second", wrapper):
        torch.testing.assert_close(actual, logits(original), rtol=0, atol=1e-6)
    same_tensors(tmp_path / "second", tmp_path / "first")


def refusals(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    model: Any = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="has no FullyShardedExperts or ResidentExperts; call replace_experts"):
        save_pretrained(model, folder)
    with pytest.raises(ValueError, match="FusedModel: is no model of transformers"):
        load_pretrained(fused_model(), folder)
    model.save_pretrained(folder)
    replace_experts(model, partial(FullyShardedExperts, group=ExpertGroup()))
    with pytest.raises(FileNotFoundError, match=r'snapshot_download\("Qwen/Qwen3-30B-A3B"\)'):
        load_pretrained(model, "Qwen/Qwen3-30B-A3B")

    whole = load_file(folder / "model.safetensors")

    def loading(**changed: Any) -> None:
        save_file({k: v for k, v in (whole | changed).items() if v is not None}, folder / "model.safetensors")
        load_pretrained(model, folder)

    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: 4 tensors .* are not 5 experts"):
        loading(**{name: None})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: expert 3 is \(16, 11\), and must be"):
        loading(**{name: whole[name][:, 1:].contiguous()})
    gone = [key for key in whole if "layers.0.mlp.experts" in key and "down_proj" in key]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: the checkpoint has no tensors for it"):
        loading(**dict.fromkeys(gone))
    with pytest.raises(ValueError, match=r"has nothing for model\.norm\.weight; each rank would draw"):
        loading(**{"model.norm.weight": None})
    loading()
    model.config.quantization_config = importlib.import_module("transformers").Mxfp4Config()
    with pytest.raises(ValueError, match=r"is quantized \(mxfp4\)"):
        loading()


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusals(tmp_path)


def experts_read(kind: str) -> int:
    """How many experts of a layer this rank reads."""
    model = tiny_model("qwen3_moe")
    layers = replace_experts(model, maker(kind, make_group()))
    read = 0
    layer = layers["model.layers.0.mlp.experts"]

    def expert(number: int) -> Tensor:
        nonlocal read
        read += 1
        return torch.full((1, layer.shape.elements), float(number), dtype=torch.float64)

    layer.read_experts(expert)
    flat = layer.gather_experts(0)
    if flat is not None:
        assert torch.equal(flat, torch.arange(EXPERTS, dtype=torch.float64)[:, None].expand_as(flat))
    return read


@pytest.mark.parametrize("kind", ["sharded", "resident"])
def test_each_expert_is_read_by_one_rank(ranks: Launch, kind: str) -> None:
    assert sum(ranks(2, experts_read, kind)) == EXPERTS
