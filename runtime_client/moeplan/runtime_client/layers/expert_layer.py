"""The common base of fully sharded and resident experts: calling, moving, copying and saving them."""

from __future__ import annotations

import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.device.launches import is_captured
from moeplan.runtime_client.device.mailbox import Turn
from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.layers.feed_forward import ExpertShape, join_weights, split_weights
from moeplan.runtime_client.layers.fingerprints import fingerprint
from moeplan.runtime_client.layers.identities import with_identities
from moeplan.runtime_client.layers.rank_checks import compare_ranks, is_looked_at, row_sums, tell, tells_training
from moeplan.runtime_client.layers.repeating import unseen
from moeplan.runtime_client.layers.routing import gather_counts
from moeplan.solvers.problem.arrays import Int64
from moeplan.solvers.problem.scalars import instance

__all__ = ["ExpertLayer", "state_in_parts", "state_without_experts"]

_IN_PARTS = ContextVar("in_parts", default=False)
_LEFT_OUT = ContextVar("left_out", default=False)

_CUT_BY_FSDP1 = ("_is_flat_param", "_fsdp_flattened")
"""Marks of its parameters, of which each rank holds another part."""


@contextmanager
def state_in_parts() -> Iterator[None]:
    """Within it, the state of a layer is its parameter: what this rank holds, under the parameter's own name."""
    token = _IN_PARTS.set(True)
    try:
        yield
    finally:
        _IN_PARTS.reset(token)


@contextmanager
def state_without_experts() -> Iterator[None]:
    """Within it, a layer has no state to save."""
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)


class ExpertLayer(nn.Module, ABC):
    """The experts of one MoE layer on the ranks of a group; `FullyShardedExperts` and `ResidentExperts` are its kinds.

    They are zeros until `load_experts` or a checkpoint gives them values. No training changes zeros, so the first pass
    that would train them refuses.

    Attributes:
        shape: Dimensions of an expert.
        experts: Number of experts.
        group: The ranks.
        compute_dtype: Type that weights travel and compute in; None for that of autocast, or else of the parameter.
        traffic: Bytes sent to other ranks since the counter was last cleared.
        name: What errors call it; `replace_experts` gives it the name that it has in the model.
        loaded: int64[rows], sums of the parameter's rows as they were loaded; None where they were not.
        identities: Choices from `experts` on that give a token back as it is; 0 if there are none.
        steps: Steps of optimizers that have trained it; None where nobody counts them.
        trained_by: int64, sum of what an optimizer was about to train its part by; None until the first step after the
            last that was told to other ranks.
        prepare: Called with the parameter before a pass that will have gradients, and with whether FSDP2 averages them
            over replicas; `ExpertGradients` sets it.
        scale: What the gradient of each pass is multiplied by on its way to the parameter, and gradients from elsewhere
            are not, as that of a penalty on weights; `ExpertGradients` sets it.
        on_way: Called when the gradient of a pass is on its way to the parameter; `ExpertGradients` sets it.
        replicated: Whether ranks of other expert groups hold the same experts; `ExpertGradients` sets it.
    """

    own: ClassVar[str]
    """Name of the only parameter, this rank's part of the experts."""

    def __init__(self, shape: ExpertShape, experts: int, group: ExpertGroup, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        instance("shape", shape, ExpertShape, "ExpertShape(hidden, width)")
        instance("group", group, ExpertGroup, "ExpertGroup.create(), on ranks that are in it")
        self.shape = shape
        self.experts = experts
        self.group = group
        self.compute_dtype = compute_dtype
        self.traffic = Traffic()
        self.name = ""
        self.identities = 0
        self._finish = ""
        self.prepare: Callable[[nn.Parameter, bool], None] | None = None
        self.scale = 1.0
        self.on_way: Callable[[], None] | None = None
        self.replicated = False
        self._cut = False
        self._number = next(group.numbers)
        self._passes = 0
        self._trainings = 0
        self._backwards = 0  # differs after backward passes in another order
        self._valued = False
        self.loaded: Tensor | None = None
        self.steps: int | None = None
        self.trained_by: Tensor | None = None
        self._shared_by: list[weakref.ref[nn.Module]] = []
        self._witnesses: list[Tensor] = []

    @property
    def weights(self) -> nn.Parameter:
        """This rank's part of the experts."""
        parameter: nn.Parameter = getattr(self, self.own)
        return parameter

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self.own and isinstance(value, DTensor):  # as fully_shard puts it there
            self._require_cut_over_replicas(value)
            self._cut = self.replicated = True
        super().__setattr__(name, value)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Apply to each token its experts, weighted and summed.

        Every rank of the group calls it at the same time, also with no tokens.

        Args:
            hidden: [tokens, hidden] of this rank (leading dimensions are flattened).
            index: int64[tokens, k], experts of each token, or `identities`; other integers are taken as well.
            weight: [tokens, k].

        Returns:
            As `hidden`, also under autocast, where tokens and weights travel and compute in its type.

        Raises:
            RouterError: a choice is out of range or a weight not finite, on any rank.
            LayoutMismatchError: the ranks hold different layouts, compute in other types, or some without gradients.
            MissedPassError: the ranks are not in the same pass.
            RanksDifferError: ranks hold the same part of the experts, or the block's other weights differ between them.
            InfeasibleError: no plan keeps every rank within its token cap; raised on all ranks.
            ValueError: `hidden` has another width than the experts, `index` is not of integers, or its shape is not
                that of `weight` and of the tokens.
            RuntimeError: the weights are on the meta device, or zeros in the first pass that would train them, or
                DistributedDataParallel would average their gradients, or a CUDA graph cannot hold the pass.
        """
        self._require_memory()
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{self.title}: torch.func.grad, vmap and the like do not reach other ranks, which have the experts. "
                "Write torch.autograd.grad(loss, parameters), or loss.backward()"
            )
        if not self._replays and is_captured(self.weights):
            raise RuntimeError(
                f"{self.title}: a CUDA graph cannot hold its passes, in which the host takes part. Leave the layer out "
                "of the graph, or make ResidentExperts(..., exchange=DeviceExchange(...)), whose passes replay"
            )
        weights = self.weights
        self._passes += 1
        trains = self._trains()
        if trains:
            if not self._valued:
                self._require_values()
            if self.prepare is not None:
                self.prepare(weights, self._cut)
            self._require_own_gradients(weights)
        if hidden.shape[-1:] != (self.shape.hidden,):
            raise ValueError(f"{self.title}: hidden {tuple(hidden.shape)}: must be [tokens, {self.shape.hidden}]")
        rows = hidden.reshape(-1, self.shape.hidden)
        if trains and not rows.requires_grad:
            # As those of other ranks, which would wait in the backward otherwise: where there are no tokens, say.
            rows = rows.detach().clone().requires_grad_()
        if index.dtype.is_floating_point or index.shape != weight.shape or index.shape[:-1].numel() != len(rows):
            raise ValueError(
                f"{self.title}: index {index.dtype} {tuple(index.shape)} and weight {tuple(weight.shape)} of "
                f"{len(rows)} tokens: must be integers [tokens, k] and weights [tokens, k]"
            )
        index, weight = index.reshape(len(rows), index.shape[-1]), weight.reshape(len(rows), weight.shape[-1])
        dtype = self._dtype()
        if self.compute_dtype is None and dtype != weights.dtype:  # of autocast
            rows = rows.to(dtype)
        run = partial(self._run, dtype=dtype)
        if self.identities:
            run = partial(with_identities, run, range(self.experts, self.experts + self.identities))
        return self._noted(run(rows, index.long(), weight).to(hidden.dtype).view_as(hidden))

    def _noted(self, output: Tensor) -> Tensor:
        """The output of a pass, whose backward is noted: ranks that run several in another order would mix them."""
        if output.requires_grad:
            output.register_hook(partial(self._note_backward, self._passes))
        return output.clone() if self._cut else output  # FSDP2 hangs a hook on it, which operations on views may lose

    def _note_backward(self, number: int, gradient: Tensor) -> None:
        """Note that the backward of a pass has begun."""
        self._backwards = fingerprint(f"{self._backwards} {number}".encode())

    def _weights_of_pass(self, *, scaled: bool) -> Tensor:
        """The weights, whose gradient goes `on_way`; it is multiplied by `scale` unless the pass has done so."""
        if self.on_way is None:
            return self.weights
        scale = 1.0 if scaled else self.scale
        weights: Tensor = _OnWay.apply(self.weights, self.on_way, scale)  # type: ignore[no-untyped-call]
        return weights

    def _trains(self) -> bool:
        """Whether a pass now will have gradients of the experts."""
        return self.weights.requires_grad and torch.is_grad_enabled()

    def _dtype(self) -> torch.dtype:
        """Type that weights travel and compute in."""
        own, kind = self.weights.dtype, self.weights.device.type
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and own != torch.float64 else own

    @abstractmethod
    def _run(self, rows: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`forward` of rows [tokens, hidden], with weights in `dtype`."""

    @abstractmethod
    def _take(self, first: int, flat: Tensor) -> list[int]:
        """Load experts; returns the rows of the parameter that were written."""

    @torch.no_grad()
    def load_experts(self, first: int, flat: Tensor) -> None:
        """Take over whole experts, of which every rank holds the same copy.

        Args:
            first: The first expert given.
            flat: [n, elements], experts ``first`` to ``first + n - 1`` in flat form.

        Raises:
            ValueError: they are not in flat form, or the layer has no such experts.
        """
        self._require_memory()
        if flat.shape[1:] != (self.shape.elements,) or not 0 <= first <= self.experts - len(flat):
            raise ValueError(
                f"{self.title}: load_experts({first}, {tuple(flat.shape)}): must be [n, {self.shape.elements}], of "
                f"experts within 0..{self.experts - 1}"
            )
        self._remember(self._take(first, flat))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `to` calls it: the weights are those that were loaded still, if they were before."""
        loaded = None if self._cut or self.weights.is_meta else self.loaded
        as_loaded = loaded is not None and torch.equal(row_sums(self.weights).cpu(), loaded.cpu())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if as_loaded and not self.weights.is_meta:
            self.loaded = row_sums(self.weights)
        return self

    def _remember(self, rows: list[int]) -> None:
        """Note what these rows of the parameter are now."""
        if self.loaded is None:
            self.loaded = torch.zeros(len(self.weights), dtype=torch.int64)
        self.loaded[rows] = row_sums(self.weights[rows]).to(self.loaded.device)

    @abstractmethod
    def read_experts(self, read: Callable[[int], Tensor]) -> None:
        """Take over whole experts, each read by one rank of the group. Every rank calls it.

        Args:
            read: Reads an expert, [1, elements] in flat form; called one by one for those that this rank shall read.
        """

    @abstractmethod
    def gather_experts(self, rank: int) -> Tensor | None:
        """All experts on one rank of the group, [experts, elements]; None on the others. Every rank calls it."""

    def finish_by(self, name: str, module: nn.Module) -> None:
        """Apply a module to the result of each choice, at the token's source, before results are weighed.

        Its weights are no experts' but shared by all ranks, as those of the router are.

        Args:
            name: What it is called in the layer, and in checkpoints.
            module: Applied to [rows, hidden], row by row.
        """
        self.add_module(name, module)
        self._finish = name

    @property
    def finish(self) -> nn.Module | None:
        """What is applied to the result of each choice."""
        return self.get_submodule(self._finish) if self._finish else None

    def watch(self, *modules: nn.Module) -> None:
        """Say what all ranks hold alike but for experts, so that a pass can tell if it differs between ranks.

        Args:
            modules: The module that calls the layer, and what it is part of: they are watched in its place while all of
                its weights are frozen.
        """
        self._shared_by = [weakref.ref(module) for module in modules]

    @property
    def is_watched(self) -> bool:
        """Whether something is watched that is still there."""
        return bool(self._around())

    @property
    def biases_beside(self) -> list[nn.Parameter]:
        """What is called a bias in the modules that are watched."""
        named = (named for module in self._around() for named in module.named_parameters())
        return [parameter for name, parameter in named if name.endswith("bias")]

    @property
    def title(self) -> str:
        """The layer's name in errors."""
        return self.name or f"layer {self._number}"

    def _require_memory(self) -> None:
        if self.weights.is_meta:
            raise RuntimeError(
                f"{self.title}: its weights are on the meta device; call model.to_empty(device=...), "
                "then load a checkpoint"
            )

    def _require_values(self) -> None:
        """Refuse to train experts that nobody has given values; asked until they have some.

        Raises:
            RuntimeError: they are zeros, whose gradients are zeros, too.
        """
        weights = self.weights.to_local() if isinstance(self.weights, DTensor) else self.weights
        capturing = weights.is_cuda and torch.cuda.is_current_stream_capturing()  # a graph: no time to look
        if self.loaded is None and weights.numel() and not capturing and not weights.any():
            raise RuntimeError(
                f"{self.title}: its experts are zeros, which no training changes. Give them values on every rank, "
                "with layer.load_experts(first, flat) or a checkpoint"
            )
        self._valued = True

    def _require_cut_over_replicas(self, weights: DTensor) -> None:
        """Refuse a parameter cut up over ranks that do not all hold the same experts.

        Raises:
            ValueError: it is.
        """
        common = set(weights.device_mesh.mesh.flatten().tolist()) & set(self.group.members)
        if len(common) > 1:
            raise ValueError(
                f"{self.title}: FSDP2 would cut up, over ranks {sorted(common)}, experts of which each holds its "
                "own part. Write\n"
                "    fully_shard(model, ignored_params=set(expert_parameters(model).values()))"
            )

    def _require_own_gradients(self, weights: nn.Parameter) -> None:
        """Refuse what averages gradients of experts as those of the rest, or leaves them to nobody.

        Looked for in some of the passes that train, from the first on.

        Raises:
            RuntimeError: something does.
        """
        self._trainings += 1
        if not is_looked_at(self._trainings) or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        unscaled, whole = self.prepare is None, self.group.size == 1
        data_parallel = DistributedDataParallel._get_active_ddp_module()
        if data_parallel is None:
            if unscaled and not (whole and self._cut) and self._beside_fsdp2():
                raise RuntimeError(
                    f"{self.title}: FSDP2 averages gradients over ranks, and those of experts are sums over ranks. "
                    "Write\n"
                    "    ExpertGradients(model)  # mean=False if set_gradient_divide_factor has FSDP2 sum them"
                )
            return
        reduced = any(parameter is weights for parameter in data_parallel._module_parameters)
        if reduced and not (whole and unscaled):  # whole experts may be left to it
            raise RuntimeError(
                f"{self.title}: DistributedDataParallel has broadcast the experts, of which each rank holds its own "
                "part. Write, with the module that it wraps,\n"
                "    ExpertGradients(model)  # before DistributedDataParallel(model)"
            )
        if unscaled and not reduced:
            raise RuntimeError(
                f"{self.title}: DistributedDataParallel averages gradients over ranks, and those of experts are sums "
                "over ranks. Write\n"
                "    ExpertGradients(model)  # before DistributedDataParallel(model)"
            )

    def _beside_fsdp2(self) -> bool:
        """Whether FSDP2 reduces gradients of what is around the layer."""
        modules = (part for module in self._around() for part in module.modules())
        return any(isinstance(module, FSDPModule) for module in chain(_calling(), modules))

    def _gather_counts(self, index: Tensor, weight: Tensor, layout: int = 0) -> Int64:
        """Tokens of each expert from each rank, int64[size, experts], once what ranks tell goes together."""
        steps = 0 if self.steps is None or not self.weights.numel() else 1 + self.steps
        what = f"pass {self._passes} of {self.title}"
        with unseen():
            told = tell(
                self._number,
                self._passes,
                layout ^ fingerprint(repr(self._way()).encode()),
                *self._checks(),
                steps=steps,
            )
            compare = partial(compare_ranks, self.title)
            return gather_counts(self.group, index, weight, self.experts, what, told, compare)

    def _turn(self, layout: Tensor | None = None, gathered: int = 0, scale: float = 1.0, means: int = 0) -> Turn:
        """This pass, for one that runs without the host.

        Args:
            layout: See `Turn`.
            gathered: Likewise.
            scale: Likewise.
            means: Likewise.

        Raises:
            ValueError: the layer has what needs the host.
        """
        if self.finish is not None or self.identities:
            raise ValueError(
                f"{self.title}: norms of results and identity experts need the host; make the layer without exchange="
            )
        none = partial(torch.zeros, (), dtype=torch.int64, device=self.weights.device)
        checks = [none() if check is None else check.long() for check in self._checks()]
        compare = partial(compare_ranks, self.title)
        gathered ^= fingerprint(repr((*self._way(), self.steps)).encode())
        return Turn(self._number, self._passes, compare, self.title, checks, layout, gathered, scale, means)

    def _way(self) -> tuple[object, ...]:
        """What else ranks must have alike: the type, whether experts are trained, and the order of backward passes."""
        return self._dtype(), self._trains(), self._backwards

    def _checks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None] | tuple[()]:
        """Values by which ranks compare weights, in the order of `tell`.

        Small shared weights in every pass, so that what went wrong in a step is known in the pass after it; all others
        in few passes, as they take time to read.
        """
        if not self._compares:
            shared_sum = _total(self._witnesses) if self._witnesses else None
            if tells_training(self._passes) and self.trained_by is not None and not is_captured(self.weights):
                trained_by, self.trained_by = self.trained_by.to(self.weights.device), None
                return trained_by, torch.ones_like(trained_by), shared_sum
            return () if shared_sum is None else (None, None, shared_sum)
        shared = self._shared()
        self._witnesses = [weights for weights in shared if self._is_small(weights)]
        own = row_sums(self.weights).sum()
        same = torch.zeros_like(own)
        if self._cut:  # by FSDP2 over replicas, which has been checked
            own = same
        elif self.loaded is not None:  # equal experts on all ranks are no mistake if they were loaded so
            self.loaded = self.loaded.to(own.device)
            same = own == self.loaded.sum()
        return own, ~same.bool(), _total(shared) if shared else None

    @property
    def awaits_step(self) -> bool:
        """True if ranks will compare what the next step of an optimizer trains this part by."""
        return self.group.size > 1 and not self._cut and self.trained_by is None and not is_captured(self.weights)

    @property
    def _compares(self) -> bool:
        """True if ranks compare all weights in this pass."""
        return self.group.size > 1 and is_looked_at(self._passes) and not is_captured(self.weights)

    @property
    @abstractmethod
    def _replays(self) -> bool:
        """Whether a CUDA graph can hold passes of this layer."""

    def _around(self) -> list[nn.Module]:
        """The modules to `watch` that are still there."""
        return [module for watched in self._shared_by if (module := watched()) is not None]

    def _shared(self) -> list[Tensor]:
        """Weights of the block that all ranks hold and train alike, or if there are none, the smallest of the model."""
        modules = self._around()
        for module in modules[:1]:
            if shared := list(_trained(module)):
                return shared
        for module in modules[1:]:
            if shared := sorted(_trained(module), key=Tensor.numel):
                return shared[:1]
        return []

    def _is_small(self, weights: Tensor) -> bool:
        """True if they are no more than a router's."""
        return weights.numel() <= self.experts * self.shape.hidden

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if _LEFT_OUT.get():
            return
        if _IN_PARTS.get():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        if self.group.size > 1:
            raise RuntimeError(
                f"{self.title}: each of {self.group.size} ranks holds a part of the experts, so a state_dict() "
                "saved by one of them would lose the others'. Save instead, on every rank, with "
                "torch.distributed.checkpoint as dcp:\n"
                '    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)\n'
                "or, as a checkpoint of Hugging Face,\n"
                "    moeplan.runtime_client.save_pretrained(model, folder)"
            )
        flat = self.weights if keep_vars else self.weights.detach()
        for name, part in zip(self.shape.parts, split_weights(self.shape, flat), strict=True):
            destination[prefix + name] = part

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if _IN_PARTS.get():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self.loaded = None if self._cut else row_sums(self.weights)
            return
        shapes = {prefix + name: (self.experts, *shape) for name, shape in self.shape.parts.items()}
        others = [key for key in state_dict if strict and key.startswith(prefix) and key not in shapes]
        unexpected_keys += [key for key in others if key[len(prefix) :].partition(".")[0] not in self._modules]
        missing = [name for name in shapes if name not in state_dict]
        missing_keys += missing if strict else []
        if 0 < len(missing) < len(shapes):
            error_msgs.append(f"experts are loaded whole, and {', '.join(missing)} is not there for the rest of them")
        if missing:
            return
        for name, shape in shapes.items():
            if tuple(state_dict[name].shape) != shape:
                error_msgs.append(f"size mismatch for {name}: {tuple(state_dict[name].shape)}, must be {shape}")
                return
        for expert in range(self.experts):  # one by one: never two copies of a layer
            self.load_experts(expert, join_weights(*(state_dict[name][expert, None].detach() for name in shapes)))

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what belongs to passes, to other modules and to training with the original."""
        return self.__dict__ | {
            "traffic": Traffic(),
            "prepare": None,
            "on_way": None if self.on_way is None else partial(_refuse_copied, self.title),
            "replicated": self._cut,
            "steps": None,
            "trained_by": None,
            "_shared_by": [],
            "_witnesses": [],
        }

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {self.shape}, rank={self.group.rank}/{self.group.size}"


class _OnWay(torch.autograd.Function):
    """Identity on the weights of a pass, that tells when their gradient comes, and scales it."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, on_way: Callable[[], None], scale: float) -> Tensor:
        ctx.on_way, ctx.scale = on_way, scale
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.on_way()
        return gradient if ctx.scale == 1 else gradient * ctx.scale, None, None


def _refuse_copied(title: str) -> None:
    """In place of what `ExpertGradients` does with gradients of the original."""
    raise RuntimeError(
        f"{title}: is trained as a copy of a layer that has an ExpertGradients, and has none, so its gradients would "
        "be sums over ranks. Write, with the model that the copy is in,\n"
        "    ExpertGradients(model)"
    )


def _calling() -> Iterator[nn.Module]:
    """Modules whose forward is under way, the innermost first."""
    for frame, _ in traceback.walk_stack(None):
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]


def _trained(module: nn.Module) -> Iterator[Tensor]:
    """Weights beside experts that are trained; not what a framework has cut up."""
    for part in module.modules():
        if not isinstance(part, ExpertLayer):
            for parameter in part.parameters(recurse=False):
                cut = isinstance(parameter, DTensor) or any(hasattr(parameter, mark) for mark in _CUT_BY_FSDP1)
                if parameter.requires_grad and not cut:
                    yield parameter


def _total(weights: list[Tensor]) -> Tensor:
    return torch.stack([row_sums(part).sum() for part in weights]).sum()
