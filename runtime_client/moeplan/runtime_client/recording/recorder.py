"""Tokens per expert of every MoE layer of a model, counted on the device while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from moeplan.runtime_client.recording.probes import PROBES, Form, Probe
from moeplan.solvers.problem.arrays import Int64

__all__ = ["Recorder", "record"]


def record(model: nn.Module, probes: Iterable[Probe] = PROBES) -> Recorder:
    """Start to count the tokens of every MoE layer of a model, by hooks; nothing in the model is replaced.

        with record(model) as recorder:
            for batch in data:
                train(batch)
                counts = recorder.step()  # of the step before

    Call it when the model is final: experts replaced, checkpointing enabled. Wrapping it in DistributedDataParallel or
    FSDP may come before or after.

    What counts is a forward pass in training mode with gradients enabled. Activation checkpointing of either kind is
    seen through: passes that recompute do not count, nor do evaluation and `torch.no_grad`. Reentrant checkpointing
    turns gradients off as `torch.no_grad` does, so whether they are on is asked where `model` is entered; give the
    module that the training loop calls, and in pipelines that of the stage. Modules under `torch.compile` are broken
    into graphs around their hooks.

    Args:
        model: The model, or the part of it that runs on this rank.
        probes: Kinds of layers to look for; for one of your own, ``(mine, *PROBES)``.

    Raises:
        ValueError: no MoE layer is found, or they differ in their number of experts.
    """
    return Recorder(model, tuple(probes))


class Recorder:
    """Counts of a model's MoE layers; see `record`.

    Counting costs three small kernels per layer and pass. A step's counts travel to the host in one asynchronous copy,
    and are handed out at the end of the next step, so the device is never left without work for them.

    Attributes:
        layers: Names of the layers in the model, in its order.
        experts: Experts of each layer.
        ignored: int64[layers], choices so far that were no expert, in the steps that have been handed out.
    """

    def __init__(self, model: nn.Module, probes: tuple[Probe, ...]) -> None:
        found = [
            (name, module, probe, experts)
            for name, module in model.named_modules()
            for probe, experts in [_fitting(module, probes)]
            if probe is not None
        ]
        if not found:
            raise ValueError(
                f"{type(model).__name__}: no MoE layer found in its {sum(1 for _ in model.modules())} modules. Looked "
                f"for: {'; '.join(probe.looks_for for probe in probes)}. Give record() a Probe for your own layers"
            )
        numbers = {name: experts for name, _, _, experts in found}
        if len(set(numbers.values())) > 1:
            listed = ", ".join(f"{name}: {experts}" for name, experts in numbers.items())
            raise ValueError(
                f"{type(model).__name__}: layers differ in experts ({listed}); record each part on its own"
            )
        self.layers = tuple(numbers)
        self.experts = found[0][3]
        self.ignored: Int64 = np.zeros(len(numbers), np.int64)
        # A power of two above it, so that what is no expert, cut to -1 or `experts`, is masked to a place beyond.
        self._width = 1 << self.experts.bit_length()
        self._tally: Tensor | None = None
        self._one: Tensor | None = None
        self._copies: list[_Copy] = []
        self._sent: _Copy | None = None
        self._entered: bool | None = None
        self._model = model
        self._modules = [module for _, module, _, _ in found]
        self._handles = [model.register_forward_pre_hook(self._enter, prepend=True)]
        for layer, (_, module, probe, _) in enumerate(found):
            hook = torch.compiler.disable(partial(self._observe, layer, probe))
            self._handles.append(
                module.register_forward_pre_hook(hook, with_kwargs=True)
                if probe.before
                else module.register_forward_hook(hook, with_kwargs=True)
            )
        self._handles.append(model.register_forward_hook(self._leave, always_call=True))

    def step(self) -> Int64 | None:
        """End a step: forward passes from now on belong to the next one.

        Returns:
            int64[layers, experts], tokens of this rank in the step before the one that ends; None at the first call.
        """
        before, self._sent = self._sent, self._send()
        return self._read(before)

    def finish(self) -> Int64 | None:
        """Counts of the step that ended last, int64[layers, experts]; waits for the device. None if handed out."""
        sent, self._sent = self._sent, None
        return self._read(sent)

    def close(self) -> None:
        """Remove the hooks. Counts that are under way can still be had from `finish`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> Recorder:
        """Itself: a copied model has hooks of this recorder, which does not count the copy."""
        return self

    def _read(self, copy: _Copy | None) -> Int64 | None:
        if copy is None:
            return None
        counts = copy.read()
        self.ignored += counts[:, self.experts :].sum(axis=1)
        return counts[:, : self.experts].copy()

    def _send(self) -> _Copy:
        tally = self._tally
        if tally is None:  # no layer has run yet
            return _Copy(torch.zeros(len(self.layers), self._width, dtype=torch.int64))
        if not self._copies:
            self._copies = [_Copy.beside(tally), _Copy.beside(tally)]
        copy = self._copies.pop(0)
        self._copies.append(copy)
        copy.take(tally)
        tally.zero_()
        return copy

    def _enter(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        if model is self._model:
            self._entered = torch.is_grad_enabled()

    def _leave(self, model: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if model is self._model:
            self._entered = None

    def _observe(
        self,
        layer: int,
        probe: Probe,
        module: nn.Module,
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
        output: Any = None,
    ) -> None:
        if module is not self._modules[layer]:  # of a copy of the model
            return
        trains = torch.is_grad_enabled() if self._entered is None else self._entered
        # Inside a backward pass, a checkpoint recomputes what has been counted.
        if module.training and trains and torch._C._current_graph_task_id() == -1:
            self._add(layer, *probe.read(arguments, named, output))

    @torch.no_grad()
    def _add(self, layer: int, chosen: Tensor, form: Form) -> None:
        chosen = chosen.detach()
        if hasattr(chosen, "to_local"):  # a DTensor
            chosen = chosen.to_local()
        if self._tally is None:
            self._tally = torch.zeros(len(self.layers), self._width, dtype=torch.int64, device=chosen.device)
            self._one = torch.ones(1, dtype=torch.int64, device=chosen.device)
        row, one = self._tally[layer], self._one
        assert one is not None, "made with the tally"
        chosen = chosen.to(row.device, non_blocking=True)
        if form is Form.INDEX:
            index = chosen.reshape(-1).to(torch.int64).clamp(-1, self.experts).bitwise_and_(self._width - 1)
            row.scatter_add_(0, index, one.expand(len(index)))
        else:
            counts = chosen.reshape(-1, self.experts).count_nonzero(0) if form is Form.MAP else chosen.reshape(-1)
            row[: self.experts].add_(counts.to(torch.int64))


class _Copy:
    """Counts of one step on their way to the host."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.arrived: torch.cuda.Event | None = None

    @classmethod
    def beside(cls, tally: Tensor) -> _Copy:
        copy = cls(torch.empty(tally.shape, dtype=tally.dtype, pin_memory=tally.is_cuda))
        if tally.is_cuda:
            copy.arrived = torch.cuda.Event()
        return copy

    def take(self, tally: Tensor) -> None:
        self.host.copy_(tally, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(tally.device))

    def read(self) -> Int64:
        if self.arrived is not None:
            # A whole step has been queued since, so the device works on while this waits.
            self.arrived.synchronize()
        counts: Int64 = self.host.numpy()
        return counts


def _fitting(module: nn.Module, probes: tuple[Probe, ...]) -> tuple[Probe | None, int]:
    for probe in probes:
        experts = probe.experts(module)
        if experts is not None:
            return probe, experts
    return None, 0
