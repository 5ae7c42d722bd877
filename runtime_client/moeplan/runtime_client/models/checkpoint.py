"""Checkpoints in the model's own logical form, whatever the number of ranks, the kind of layer and the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import _get_fqns, _init_optim_state, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from moeplan.runtime_client.layers.expert_layer import state_in_parts
from moeplan.runtime_client.layers.resident import ResidentExperts
from moeplan.runtime_client.layers.sharded import FullyShardedExperts

__all__ = ["Pieces", "TrainingState", "expert_layers", "logical_experts"]

Layer = FullyShardedExperts | ResidentExperts


class Pieces(Tensor):
    """This rank's pieces of one logical tensor, which ``torch.distributed.checkpoint`` writes and reads in place.

    It has the shape of the logical tensor, as that module expects, but no elements of its own and no operations.

    Attributes:
        offsets: Where each piece starts in it.
        views: The pieces, views of what the rank holds.
        held: What they are views of.
    """

    offsets: tuple[torch.Size, ...]
    views: tuple[Tensor, ...]
    held: Tensor

    @staticmethod
    def __new__(
        cls, shape: torch.Size, offsets: tuple[torch.Size, ...], views: tuple[Tensor, ...], held: Tensor
    ) -> Pieces:
        pieces: Pieces = Tensor._make_wrapper_subclass(cls, shape, dtype=held.dtype, device=held.device)
        pieces.offsets, pieces.views, pieces.held = offsets, views, held
        return pieces

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.new_empty.default:  # of `async_save`, which then copies the attributes
            dtype, device = kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or args[0].device
            return Tensor._make_wrapper_subclass(cls, args[1], dtype=dtype, device=device)
        raise NotImplementedError(f"{function}: a logical tensor of which this rank holds pieces can only be saved")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pieces(shape={tuple(self.shape)}, offsets={[tuple(offset) for offset in self.offsets]})"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(view), size=self.size()
                ),
            )
            for chunk, view in zip(self.__create_chunk_list__(), self.views, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, view.shape) for offset, view in zip(self.offsets, self.views, strict=True)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if index.offset is None:
            raise ValueError(f"{index.fqn}: no offset; a logical tensor has pieces only")
        return self.views[self.offsets.index(torch.Size(index.offset))]


def logical_experts(layer: Layer, held: Tensor) -> dict[str, Pieces]:
    """A layer's tensor as a fused experts module holds it.

    Args:
        layer: Whose layout of elements it has.
        held: The layer's parameter, or a tensor of its shape such as an optimizer's state; FSDP2 may have cut it up.

    Returns:
        The ``parts`` of the layer's shape by their names, [experts, ...] each: ``gate_up_proj`` and ``down_proj``, say.
    """
    pieces, start = {}, 0
    row = 0
    if isinstance(held, DTensor):
        _, (row, _) = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
    for name, shape in layer.shape.parts.items():
        pieces[name] = _pieces(layer, held, row, start, shape)
        start += math.prod(shape)
    return pieces


def _pieces(layer: Layer, held: Tensor, row: int, start: int, shape: tuple[int, ...]) -> Pieces:
    local = held.to_local() if isinstance(held, DTensor) else held
    rows, columns = shape if len(shape) == 2 else (1, *shape)
    cut = list(_sharded(layer, local, start, rows, columns) if isinstance(layer, FullyShardedExperts) else
               _resident(layer, local, row, start, rows, columns))  # fmt: skip
    if len(shape) == 1:  # a bias
        cut = [((expert, column), view.squeeze(1)) for (expert, _, column), view in cut]
    return Pieces(
        torch.Size((layer.experts, *shape)),
        tuple(torch.Size(offset) for offset, _ in cut),
        tuple(view for _, view in cut),
        held,
    )


def _sharded(
    layer: FullyShardedExperts, held: Tensor, start: int, rows: int, columns: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A range of a matrix's elements is at most three boxes: the end of a row, whole rows, the start of a row."""
    width = held.shape[1]
    own = layer.group.rank * width - start  # where this rank's columns start, counted in elements of the matrix
    position, end = max(0, own), min(rows * columns, own + width)
    while position < end:
        row, column = divmod(position, columns)
        if column == 0 and end - position >= columns:
            box = ((end - position) // columns, columns)
        else:
            box = (1, min(columns - column, end - position))
        taken = box[0] * box[1]
        yield (0, row, column), held[:, position - own : position - own + taken].unflatten(1, box)
        position += taken


def _resident(
    layer: ResidentExperts, held: Tensor, row: int, start: int, rows: int, columns: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """One box for each run of consecutive experts; `held` starts with the rank's own expert number `row`."""
    owned = layer.homes.owned[row : row + len(held)]
    breaks = [place for place in range(1, len(owned)) if owned[place] != owned[place - 1] + 1]
    for low, high in zip([0, *breaks], [*breaks, len(owned)], strict=True):
        if low < high:
            part = held[low:high, start : start + rows * columns]
            yield (owned[low], 0, 0), part.unflatten(1, (rows, columns))


class TrainingState(Stateful):
    """A model and its optimizers, to be saved and loaded by ``torch.distributed.checkpoint``.

        dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)

    Weights of experts, and what the optimizer keeps of them, are written under the names and in the shapes of a fused
    experts module, each rank its part; all else once. So a checkpoint can be loaded with any number of ranks, into
    fully sharded or resident experts with any layout or homes, and into the model as it was before `replace_experts`.

    Args:
        model: A model with layers of ours anywhere in it.
        optimizers: Its optimizers; none to save or load weights alone.
    """

    def __init__(self, model: nn.Module, *optimizers: Optimizer) -> None:
        self.model = model
        self.optimizers = optimizers
        self._layers = expert_layers(model)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state in logical form, as views of what the rank holds.

        Raises:
            ValueError: an optimizer keeps a tensor of an expert parameter that has not its shape.
        """
        for fresh in (optimizer for optimizer in self.optimizers if not optimizer.state):
            _begin(fresh)
        with state_in_parts():
            model, optimizer = cast(tuple[dict[str, Any], dict[str, Any]], get_state_dict(self.model, self.optimizers))
        for layer, own, logical in self._names():
            held = model.pop(own)
            model |= _renamed(logical, logical_experts(layer, held))
            if own in optimizer.get("state", {}):
                entries = optimizer["state"].pop(own)
                _require_like(own, held, entries)
                for part, name in logical.items():
                    optimizer["state"][name] = {
                        key: logical_experts(layer, value)[part] if _like(value, held) else value
                        for key, value in entries.items()
                    }
            for group in optimizer.get("param_groups", []):
                group["params"] = [n for p in group["params"] for n in (logical.values() if p == own else [p])]
        return {"model": model, "optimizer": optimizer} if self.optimizers else {"model": model}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what was loaded into the tensors of `state_dict`."""
        model, optimizer = dict(state_dict["model"]), dict(state_dict.get("optimizer", {}))
        for _, own, logical in self._names():
            first, *others = logical.values()
            model[own] = model.pop(first).held
            for name in others:
                del model[name]
            if first in optimizer.get("state", {}):
                entries = optimizer["state"].pop(first)
                optimizer["state"][own] = {k: v.held if isinstance(v, Pieces) else v for k, v in entries.items()}
                for name in others:
                    del optimizer["state"][name]
            for group in optimizer.get("param_groups", []):
                group["params"] = [own if p == first else p for p in group["params"] if p not in others]
        with state_in_parts():
            set_state_dict(self.model, self.optimizers, model_state_dict=model, optim_state_dict=optimizer)

    def _names(self) -> Iterator[tuple[Layer, str, dict[str, str]]]:
        """Every layer, the name of its parameter, and the logical names by part."""
        for name, layer in self._layers.items():
            prefix = f"{name}." if name else ""
            yield layer, prefix + layer.own, {part: prefix + part for part in layer.shape.parts}


def _begin(optimizer: Optimizer) -> None:
    """Make the state of an optimizer that has none, as it is before a first step.

    torch makes it by a step with gradients of zeros and a rate of 0, which counts, and leaves a decay of weights in
    momenta; and not where there are gradients.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    decaying = [(group, group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
    for parameter in parameters:
        parameter.grad = None
    for group, _ in decaying:
        group["weight_decay"] = 0.0
    try:
        _init_optim_state(optimizer)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group, decay in decaying:
            group["weight_decay"] = decay
    for entries in optimizer.state.values():
        if "step" in entries:
            entries["step"] *= 0


def expert_layers(model: nn.Module) -> dict[str, Layer]:
    """Our layers by their names in a model, whatever it is wrapped in; by each of them, where blocks share a layer."""
    return {
        _canonical(model, f"{name}.{module.own}" if name else module.own)
        .removesuffix(module.own)
        .removesuffix("."): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FullyShardedExperts | ResidentExperts)
    }


def _canonical(model: nn.Module, name: str) -> str:
    """The name that torch saves a parameter under: without what wrappers of data parallelism, compilation and
    activation checkpointing add to it."""
    (canonical,) = _get_fqns(model, name)
    return canonical


def _renamed(names: dict[str, str], parts: dict[str, Pieces]) -> dict[str, Pieces]:
    return {names[part]: pieces for part, pieces in parts.items()}


def _require_like(own: str, held: Tensor, entries: Mapping[str, object]) -> None:
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.numel() != 1 and not _like(value, held):
            raise ValueError(
                f"{own}: the optimizer's {key} of it is {tuple(value.shape)}, and the parameter {tuple(held.shape)}; "
                "which of its numbers belongs to which expert is unknown. Train experts with an optimizer whose state "
                "has the shape of the parameter, as that of AdamW or SGD"
            )


def _like(value: object, held: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == held.shape
