"""Hugging Face checkpoints: read by each rank as far as it needs them, and written by all ranks.

Names and forms of weights in them differ from those in a model. What is what is left to transformers, which knows it
for each family (``WeightConverter``); here experts are converted one by one, so that no rank ever holds all.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from moeplan.runtime_client.layers.expert_layer import ExpertLayer, state_in_parts, state_without_experts
from moeplan.runtime_client.layers.feed_forward import join_weights, split_weights
from moeplan.runtime_client.models.checkpoint import expert_layers
from moeplan.runtime_client.models.gradients import groups_of

__all__ = ["load_pretrained", "save_pretrained"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ONE_FILE = "100000GB"


class _Source(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: Its name there.
        pattern: Which of the patterns of the converter it matches.
        converter: What makes a model's parameter from it; None if it is one.
    """

    name: str
    pattern: str
    converter: Any


def load_pretrained(model: nn.Module, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
    """Load a Hugging Face checkpoint into a model whose experts have been replaced.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        replace_experts(model, partial(ResidentExperts, group=group))
        load_pretrained(model, folder, device="cuda")

    Experts are read one by one: each by the rank that it is at home on, or, where all ranks hold a part of it, by one
    of them, which sends the parts. So the ranks of a group together read each expert once. All else is loaded as by
    ``from_pretrained``; what FSDP2 has cut up already is read in parts. Every rank calls it.

    Args:
        model: A model of transformers (5 or later) with layers of ours, on the meta device or not, before it is
            compiled, checkpointed or wrapped by DistributedDataParallel.
        folder: With ``model.safetensors``, or with its index and the files that it names.
        device: Where its weights will be; on other devices than the CPU, for instance ``torch.device("cuda", rank)``.

    Raises:
        ValueError: the model is not one of transformers, or without layers of ours, or FSDP2 has cut these up; the
            checkpoint is quantized, has no tensors for some weights, or experts of other shapes or that cannot be read
            one by one.
        FileNotFoundError: the folder has no such files.
    """
    network, layers = _network(model), _layers(model)
    quantized = getattr(network.config, "quantization_config", None)
    if quantized is not None:
        raise ValueError(
            f"{folder}: is quantized ({_method(quantized)}); our experts train in the types of torch. Dequantize it "
            "once: from_pretrained(..., quantization_config=...Config(dequantize=True)), then save_pretrained(folder)"
        )
    for name, layer in layers.items():
        if isinstance(layer.weights, DTensor):
            raise ValueError(f"{name}: FSDP2 has cut it up already; call load_pretrained before fully_shard(layer)")
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    mapping: list[Any] = get_model_conversion_mapping(network)
    with ExitStack() as files:
        slices = _open(Path(folder), files)
        sources, rest = _sort(network, layers, mapping, slices)
        for name, layer in layers.items():
            layer.to_empty(device=device)
            layer.read_experts(_reader(network, name, layer, sources, slices))
            done: Any
            for done in (layer, layer.weights):
                done._is_hf_initialized = True  # or transformers would draw them anew
        settings = LoadStateDictConfig(
            pretrained_model_name_or_path=str(folder),
            device_map={"": torch.device(device)},
            dtype=dtype,
            dtype_plan=network._get_dtype_plan(dtype),
            weight_mapping=mapping,
        )
        with state_in_parts():
            told, _ = network._load_pretrained_model(network, rest, None, settings)
            told.missing_keys -= {f"{name}.{layer.own}" for name, layer in layers.items()}
            told = network._finalize_model_loading(network, settings, told)
    if told.missing_keys:
        raise ValueError(
            f"{folder}: has nothing for {', '.join(sorted(told.missing_keys))}; each rank would draw weights of its own"
        )


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Save a model whose experts have been replaced as ``save_pretrained`` of transformers saves the model before.

    ``from_pretrained(folder)`` then loads it, with any number of ranks or in one process. The layers are written by the
    ranks in turn, each into a file of its own, and never more than one of them is whole on a rank; rank 0 writes the
    configuration and all other weights. Every rank calls it, with a folder that all of them see.

    Args:
        model: A model of transformers with layers of ours, as it is trained: wrapped by DistributedDataParallel or
            FSDP2, compiled, checkpointed.
        folder: Where to; made if it is not there.

    Raises:
        ValueError: the model is not one of transformers, or without layers of ours.
    """
    network, layers, folder = _network(model), _layers(model), Path(folder)
    with state_without_experts():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        shared: dict[str, Any] = get_model_state_dict(model, options=options)
    files = len(layers) + 1
    names: dict[str, str] = {}
    size = 0
    if _rank() == 0:
        names, size = _save_shared(network, shared, folder, _file(1, files))
    _meet()  # rank 0 has made the folder, and removed what was in it
    divided = {layer.group: groups_of(layer.group.members) for layer in layers.values()}
    for number, (name, layer) in enumerate(layers.items()):
        groups = divided[layer.group]
        group, turn = number % len(groups), number // len(groups) % layer.group.size
        flat = layer.gather_experts(turn)  # in every group, as FSDP2 may have cut them up over the groups
        if flat is not None and groups.index(layer.group.members) == group:
            added, bytes_ = _save_layer(network, name, layer, flat.cpu(), folder / _file(number + 2, files))
            names, size = names | dict.fromkeys(added, _file(number + 2, files)), size + bytes_
    told = _tell((names, size))
    if _rank() == 0:
        index = {
            "metadata": {"total_size": sum(size for _, size in told)},
            "weight_map": {name: file for names, _ in told for name, file in sorted(names.items())},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _meet()


def _network(model: nn.Module) -> Any:
    """The model of transformers, without what wraps it."""
    for module in model.modules():
        if hasattr(module, "_load_pretrained_model"):
            return module
    raise ValueError(
        f"{type(model).__name__}: is no model of transformers; save and load it with torch.distributed.checkpoint and "
        "TrainingState"
    )


def _layers(model: nn.Module) -> dict[str, ExpertLayer]:
    layers: dict[str, ExpertLayer] = dict(expert_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no FullyShardedExperts or ResidentExperts; call replace_experts")
    return layers


def _method(quantized: object) -> str:
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else getattr(quantized, "quant_method", "")
    return str(getattr(method, "value", method))


def _open(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The tensors of a checkpoint by their names, of which nothing is read yet."""
    from safetensors import safe_open

    if (folder / _SINGLE).exists():
        names = [_SINGLE]
    elif (folder / _INDEX).exists():
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    else:
        raise FileNotFoundError(
            f"{folder}: has neither {_SINGLE} nor {_INDEX}; of a model of the hub, write "
            f'folder = huggingface_hub.snapshot_download("{folder}")'
        )
    slices: dict[str, Any] = {}
    for name in names:
        file = files.enter_context(safe_open(folder / name, framework="pt"))
        slices |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it cannot be iterated)
    return slices


def _sort(
    network: Any, layers: Mapping[str, ExpertLayer], mapping: list[Any], slices: Mapping[str, Any]
) -> tuple[dict[str, list[_Source]], dict[str, Any]]:
    """Sources of each part of each layer, in the order of experts; and the rest."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts = {f"{name}.{part}": True for name, layer in layers.items() for part in layer.shape.parts}
    sources: dict[str, list[_Source]] = defaultdict(list)
    rest = {}
    for name in sorted(slices, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, network.base_model_prefix, parts)
        if target not in parts and name in parts:  # saved under the model's own names
            target, pattern = name, None
        if target in parts:
            sources[target].append(_Source(name, pattern or name, pattern and by_pattern[pattern]))
        else:
            rest[name] = slices[name]
    return sources, rest


def _reader(
    network: Any, name: str, layer: ExpertLayer, sources: Mapping[str, list[_Source]], slices: Mapping[str, Any]
) -> Callable[[int], Tensor]:
    """Reads an expert of a layer, [1, elements], in the type of the checkpoint."""

    def read(expert: int) -> Tensor:
        parts = [_read_part(network, f"{name}.{part}", expert, layer, sources, slices) for part in layer.shape.parts]
        for tensor, (part, shape) in zip(parts, layer.shape.parts.items(), strict=True):
            if tensor.shape != (1, *shape):
                raise ValueError(f"{name}.{part}: expert {expert} is {tuple(tensor.shape[1:])}, and must be {shape}")
        return join_weights(*parts)

    return read


def _read_part(
    network: Any,
    target: str,
    expert: int,
    layer: ExpertLayer,
    sources: Mapping[str, list[_Source]],
    slices: Mapping[str, Any],
) -> Tensor:
    """One part of one expert, [1, ...]."""
    found = sources.get(target)
    if not found:
        raise ValueError(f"{target}: the checkpoint has no tensors for it")
    converter = copy.deepcopy(found[0].converter)
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for source in found:
        by_pattern[source.pattern].append(source.name)
    counts = range(layer.experts, layer.experts + layer.identities + 1)  # perhaps with some that nothing uses
    for pattern, names in by_pattern.items():
        shape = slices[names[0]].get_shape()
        if len(names) in counts:
            tensor, source_name = slices[names[expert]][...], names[expert]
        elif len(names) == 1 and shape[0] in counts:
            tensor, source_name = slices[names[0]][expert : expert + 1], names[0]
        else:
            raise ValueError(
                f"{target}: {len(names)} tensors {pattern} of {tuple(shape)} are not {layer.experts} experts; load the "
                "model whole, with from_pretrained, before replace_experts"
            )
        if converter is None:
            return tensor
        converter.add_tensor(target, source_name, pattern, tensor)
    made = converter.convert(target, model=network, config=network.config)[target]
    return made[0] if isinstance(made, list) else made


def _save_shared(network: Any, shared: dict[str, Any], folder: Path, file: str) -> tuple[dict[str, str], int]:
    """Write configuration and weights beside the experts; returns the names of these with their file, and bytes."""
    from safetensors import safe_open

    for name in (_INDEX, _SINGLE):
        (folder / name).unlink(missing_ok=True)  # so that what is cut off is no checkpoint
    with state_without_experts():
        network.save_pretrained(folder, state_dict=shared, max_shard_size=_ONE_FILE)
    (folder / _SINGLE).rename(folder / file)
    with safe_open(folder / file, framework="pt") as written:
        return dict.fromkeys(written.keys(), file), (folder / file).stat().st_size


def _save_layer(network: Any, name: str, layer: ExpertLayer, flat: Tensor, path: Path) -> tuple[list[str], int]:
    """Write a layer's experts, [experts, elements]; returns their names in the checkpoint, and bytes."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    parts = dict(zip(layer.shape.parts, split_weights(layer.shape, flat), strict=True))
    inner = next(iter(parts))  # of which transformers has one for each identity, too, that nothing uses
    parts[inner] = torch.cat([parts[inner], parts[inner].new_zeros(layer.identities, *parts[inner].shape[1:])])
    state = revert_weight_conversion(network, {f"{name}.{part}": tensor for part, tensor in parts.items()})
    whole = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    save_file(whole, path, metadata={"format": "pt"})
    return list(whole), path.stat().st_size


def _file(number: int, files: int) -> str:
    return f"model-{number:05d}-of-{files:05d}.safetensors"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _tell(mine: tuple[dict[str, str], int]) -> list[tuple[dict[str, str], int]]:
    """Files that all ranks have written."""
    told = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(told, mine)
    return told
