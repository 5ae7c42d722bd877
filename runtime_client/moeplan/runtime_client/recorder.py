"""Counts which experts a model's tokens go to, without patching it and without making the host wait for the device.

A hook adds each MoE layer's choices to a row of one table on the device. Once per step the table is copied to pinned
memory behind the work in progress, and read a step later, when it has long arrived.

A forward pass counts if the recorded model was called with gradients on: not under `torch.no_grad`, as in evaluation,
and not again while a checkpoint recomputes, which happens in the backward pass. Micro-batches of a step add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moeplan.runtime_client.fsep import FullyShardedExperts
from moeplan.runtime_client.spilling import ResidentExperts
from moeplan.solvers.arrays import Int64

__all__ = ["Observed", "Reader", "Recorder", "record"]


class Reader(Protocol):
    """Knows one kind of MoE layer; see `READERS`."""

    def __call__(self, module: nn.Module) -> Observed | None:
        """How to observe a module; None if it is of another kind."""
        ...


@dataclass(frozen=True, slots=True)
class Observed:
    """A module from whose calls the choice of experts can be read.

    Attributes:
        experts: Number of experts.
        read: From the (positional arguments, keyword arguments, output) of a call to a tensor, in whatever form `form`
            says. The output is None with `before`.
        form: ``index``: expert of each choice, integers of any shape; ``map``: bool [tokens, experts]; ``counts``:
            tokens of each expert, [experts].
        before: Whether to look before the call, at its arguments alone.
    """

    experts: int
    read: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor]
    form: str
    before: bool = False


def record(model: nn.Module, *, readers: Sequence[Reader] = ()) -> Recorder:
    """Start counting.

    Args:
        model: What the training step calls: its forward pass is what counts. A pipeline stage records its own module.
        readers: Knows layers of other frameworks; asked before the built-in ones.

    Raises:
        ValueError: the model has no MoE layer that any reader knows, or its layers differ in their number of experts.
    """
    observed: dict[str, tuple[nn.Module, Observed]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in observed):
            continue  # a part of a layer that is observed already
        for reader in (*readers, *READERS):
            found = reader(module)
            if found is not None:
                observed[name] = module, found
                break
    if not observed:
        raise ValueError(
            f"{type(model).__name__}: no MoE layer found; looked for experts of transformers 5, DeepSpeed's MoE, "
            "routers of Megatron-core and torchtitan, and moeplan's own; give `readers` for others"
        )
    sizes = {found.experts for _, found in observed.values()}
    if len(sizes) > 1:
        raise ValueError(f"{type(model).__name__}: layers have {sorted(sizes)} experts; record each kind by itself")
    return Recorder(model, observed)


class Recorder:
    """Counts of a model, step by step.

        recorder = record(model)
        for batch in data:
            train(batch)
            counts = recorder.step()  # of the step before

    Attributes:
        names: Names of the layers in the model, in its order: the rows of the counts.
        experts: Number of experts of a layer.
    """

    def __init__(self, model: nn.Module, observed: dict[str, tuple[nn.Module, Observed]]) -> None:
        self.names = tuple(observed)
        self.experts = next(iter(observed.values()))[1].experts
        self._table: Tensor | None = None
        self._arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._spare: Tensor | None = None
        self._depth = 0
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for row, (module, found) in enumerate(observed.values()):
            self._hooks.append(self._observe(row, module, found))

    def step(self) -> Int64 | None:
        """End a step.

        Returns:
            int64[layers, experts], choices of this rank's tokens in the step *before*; None after the first step.
        """
        before = self._arrived()
        if self._table is not None:
            self._arriving = self._copy(self._table)
            self._table.zero_()
        return before

    def flush(self) -> Int64 | None:
        """The counts of the last step that ended, which no `step` has returned yet; None if there is none."""
        return self._arrived()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, model: nn.Module, arguments: Any) -> None:
        self._depth += 1 if torch.is_grad_enabled() and not _in_backward() else 0

    def _leave(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not _in_backward():
            self._depth = max(0, self._depth - 1)

    def _observe(self, row: int, module: nn.Module, found: Observed) -> torch.utils.hooks.RemovableHandle:
        def see(arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if self._depth and not _in_backward():
                with torch.no_grad():
                    self._add(row, found.form, found.read(arguments, named, output).detach())

        if found.before:
            return module.register_forward_pre_hook(lambda _, a, k: see(a, k, None), with_kwargs=True)
        return module.register_forward_hook(lambda _, a, k, o: see(a, k, o), with_kwargs=True)

    def _add(self, row: int, form: str, seen: Tensor) -> None:
        if self._table is None:
            # One column more, for choices that are no expert, such as padding.
            shape = len(self.names), self.experts + 1
            self._table = torch.zeros(shape, dtype=torch.int64, device=seen.device)
        counts = self._table[row]
        match form:
            case "index":
                choices = seen.reshape(-1).to(counts.device, torch.int64)
                choices = torch.where((choices >= 0) & (choices < self.experts), choices, self.experts)
                counts.scatter_add_(0, choices, torch.ones_like(choices))
            case "map":
                counts[: self.experts] += seen.reshape(-1, self.experts).sum(dim=0).to(counts.device)
            case _:
                counts[: self.experts] += seen.to(counts.device, torch.int64, non_blocking=True)

    def _copy(self, table: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if table.device.type != "cuda":
            return table.clone(), None
        host = self._spare if self._spare is not None else torch.empty_like(table, device="cpu").pin_memory()
        self._spare = None
        host.copy_(table, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _arrived(self) -> Int64 | None:
        if self._arriving is None:
            return None
        (host, event), self._arriving = self._arriving, None
        if event is not None:
            event.synchronize()  # recorded a step ago: it has passed
            self._spare = host
        counts: Int64 = host.numpy()[:, : self.experts].copy()
        return counts


def _in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread, as it does while a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def _own(module: nn.Module) -> Observed | None:
    if not isinstance(module, FullyShardedExperts | ResidentExperts):
        return None
    return Observed(module.experts, _second_argument, "index", before=True)


def _transformers(module: nn.Module) -> Observed | None:
    """Fused experts of transformers 5, called as ``experts(hidden, index, weight)``."""
    inner, outer = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(inner, nn.Parameter) and isinstance(outer, nn.Parameter) and inner.ndim == outer.ndim == 3):
        return None
    # Under transformers' own expert parallelism the parameters are a part of the experts.
    return Observed(int(getattr(module, "num_experts", len(inner))), _second_argument, "index", before=True)


def _deepspeed(module: nn.Module) -> Observed | None:
    """DeepSpeed's MoE returns (output, auxiliary loss, exp_counts), the last of this rank's tokens."""
    if not (_from(module, "deepspeed.moe") and type(module).__name__ == "MoE"):
        return None
    return Observed(int(module.num_experts), lambda a, k, output: output[2], "counts")  # type: ignore[arg-type]


def _megatron(module: nn.Module) -> Observed | None:
    """Megatron-core's TopKRouter returns (probabilities, routing map)."""
    if not (_from(module, "megatron.core") and hasattr(module, "routing")):
        return None
    experts: Any = getattr(module, "num_experts", None) or module.config.num_moe_experts  # type: ignore[union-attr]
    return Observed(int(experts), lambda a, k, output: output[1], "map")


def _torchtitan(module: nn.Module) -> Observed | None:
    """torchtitan's TokenChoiceTopKRouter returns (scores, index, tokens of each expert)."""
    if not (_from(module, "torchtitan") and type(module).__name__.endswith("TopKRouter")):
        return None
    return Observed(int(module.num_experts), lambda a, k, output: output[1], "index")  # type: ignore[arg-type]


def _from(module: nn.Module, package: str) -> bool:
    """Whether a module's class, or one that it extends, comes from a package; nothing is imported to find out."""
    return any(base.__module__.startswith(package) for base in type(module).__mro__)


INDEX_NAMES = ("top_k_index", "index", "router_indices", "selected_experts")


def _second_argument(arguments: tuple[Any, ...], named: dict[str, Any], _: Any) -> Tensor:
    given = [*arguments[1:2], *(named[name] for name in INDEX_NAMES if name in named)]
    index = given[0] if given else None
    if not isinstance(index, Tensor):
        raise ValueError(f"experts were called with {sorted(named)}: their index is not among them; give a reader")
    return index


READERS: tuple[Reader, ...] = (_own, _transformers, _deepspeed, _megatron, _torchtitan)
"""The kinds of layers that are known: ours, and those of transformers, DeepSpeed, Megatron-core and torchtitan."""
