"""The feed-forward network of an expert, over the replicas that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moeplan.runtime_client.layers.copies import copy_strided
from moeplan.runtime_client.layers.fusing import fused

__all__ = ["ExpertShape", "activation_name", "feed_forward", "join_weights", "split_weights"]

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
    "relu": (functional.relu, lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0)),
}
"""Forward, and backward from the gradient and the input."""

_HAS_GROUPED = hasattr(functional, "grouped_mm")


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Dimensions of one expert.

    Attributes:
        hidden: Width of a token.
        width: Width of the inner layer.
        gated: Whether the inner layer is ``act(gate(x)) * up(x)`` (SwiGLU with ``silu``) or ``act(up(x))``.
        activation: ``silu``, ``gelu`` or ``relu``.

    Raises:
        ValueError: a width is below 1, or the activation is unknown.
    """

    hidden: int
    width: int
    gated: bool = True
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name in ("hidden", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"expert.{name} = {getattr(self, name)}: must be at least 1")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"expert.activation = {self.activation}: must be one of {', '.join(_ACTIVATIONS)}")

    @property
    def inner_rows(self) -> int:
        """Rows of the first matrix: gate above up, or up alone."""
        return self.width * (2 if self.gated else 1)

    @property
    def parts(self) -> tuple[int, int]:
        """Elements of the first and of the second matrix."""
        return self.inner_rows * self.hidden, self.hidden * self.width

    @property
    def elements(self) -> int:
        """Parameters of one expert."""
        return sum(self.parts)


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The activation that gives the same values as `function`; None if none does."""
    probe = torch.linspace(-4, 4, 33, device="cpu")
    values = function(probe)
    return next((name for name, (forward, _) in _ACTIVATIONS.items() if torch.equal(forward(probe), values)), None)


def join_weights(inner: Tensor, outer: Tensor) -> Tensor:
    """[experts, elements]: flat experts, from [experts, inner_rows, hidden] and [experts, hidden, width]."""
    return torch.cat([inner.flatten(1), outer.flatten(1)], dim=1)


def split_weights(shape: ExpertShape, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [replicas, inner_rows, hidden] and [replicas, hidden, width], views of their flat form.

    Args:
        shape: Dimensions of an expert.
        flat: [replicas, elements or more]; the surplus is padding.
    """
    first, second = shape.parts
    inner, outer, _ = flat.split([first, second, flat.shape[1] - first - second], dim=1)
    return inner.unflatten(1, (shape.inner_rows, shape.hidden)), outer.unflatten(1, (shape.hidden, shape.width))


def feed_forward(shape: ExpertShape, flat: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Apply each replica to its own rows, in the dtype of the weights.

    The result depends on `flat` even without rows or replicas, so that every rank enters the collectives of the
    weights' backward pass.

    Args:
        shape: Dimensions of an expert.
        flat: [replicas, elements or more], flat weights.
        rows: [sum(counts), hidden], tokens ordered by replica.
        counts: Rows of each replica.

    Returns:
        [sum(counts), hidden] in the dtype of `rows`.
    """
    result: Tensor = _FeedForward.apply(flat, rows.to(flat.dtype), shape, list(counts))  # type: ignore[no-untyped-call]
    return result.to(rows.dtype)


class _FeedForward(torch.autograd.Function):
    """The network with its own backward, which writes the gradients of all matrices into one flat tensor.

    Autograd's would gather them from their pieces in two more copies of the weights. Of the activations it keeps only
    the first product, from which the backward computes the rest again.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, rows: Tensor, shape: ExpertShape, counts: list[int]) -> Tensor:
        inner, outer = split_weights(shape, flat)
        ctx.shape, ctx.products = shape, _products(rows, inner, outer)(counts, rows.device)
        with _plain(rows):
            first = ctx.products.forward(rows, inner)
            results: Tensor = ctx.products.forward(_activate(first, shape.gated, shape.activation), outer)
        ctx.save_for_backward(flat, rows, first)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        flat, rows, first = ctx.saved_tensors
        shape, products = ctx.shape, ctx.products
        inner, outer = split_weights(shape, flat)
        gradient = gradient.contiguous()
        with _plain(rows):
            to_first = _activate_backward(products.to_rows(gradient, outer), first, shape.gated, shape.activation)
            to_rows = products.to_rows(to_first, inner)
            if not ctx.needs_input_grad[0]:  # frozen experts
                return None, to_rows, None, None
            to_flat = torch.empty_like(flat)
            to_flat[:, shape.elements :] = 0
            to_inner, to_outer = split_weights(shape, to_flat)
            products.to_weights(gradient, _activate(first, shape.gated, shape.activation), to_outer)
            products.to_weights(to_first, rows, to_inner)
            return to_flat, to_rows, None, None


def _plain(rows: Tensor) -> torch.autocast:
    return torch.autocast(rows.device.type, enabled=False)


@fused
def _activate(first: Tensor, gated: bool, activation: str) -> Tensor:
    """``act(gate) * up`` of rows [gate, up], or ``act(up)`` of a network without a gate."""
    forward, _ = _ACTIVATIONS[activation]
    if not gated:
        return forward(first)
    gate, up = first.chunk(2, dim=1)
    return forward(gate).mul_(up)


def _activate_backward(gradient: Tensor, first: Tensor, gated: bool, activation: str) -> Tensor:
    """Gradient of the argument of `_activate`; `gradient` may be changed."""
    forward, backward = _ACTIVATIONS[activation]
    if not gated:
        return backward(gradient, first)
    if gradient.is_cuda:
        return _gated_backward(gradient, first, activation)
    # In place where it can be: fresh memory costs as much as the arithmetic.
    gate, up = first.chunk(2, dim=1)
    result = torch.empty_like(first)
    to_gate, to_up = result.chunk(2, dim=1)
    torch.mul(gradient, forward(gate), out=to_up)
    to_gate.copy_(backward(gradient.mul_(up), gate))
    return result


@fused
def _gated_backward(gradient: Tensor, first: Tensor, activation: str) -> Tensor:
    """`_activate_backward` with a gate, as one expression."""
    forward, backward = _ACTIVATIONS[activation]
    gate, up = first.chunk(2, dim=1)
    return torch.cat([backward(gradient * up, gate), forward(gate).mul_(gradient)], dim=1)


class _Each:
    """Products of rows with the matrices of their replicas, one replica after the other."""

    def __init__(self, counts: list[int], device: torch.device) -> None:
        self.counts = counts

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``rows @ weight.T``: [rows, outputs] from weights [replicas, outputs, inputs]."""
        return self.to_rows(rows, weights.transpose(1, 2))

    def to_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``rows @ weight``."""
        result = rows.new_empty(len(rows), weights.shape[2])
        for part, weight, out in zip(rows.split(self.counts), weights, result.split(self.counts), strict=True):
            torch.mm(part, weight, out=out)
        return result

    def to_weights(self, gradient: Tensor, rows: Tensor, out: Tensor) -> None:
        """``gradient.T @ rows`` of each replica, into out [replicas, outputs, inputs]."""
        parts = zip(gradient.split(self.counts), rows.split(self.counts), out, strict=True)
        for gradient_part, part, weight in parts:
            torch.mm(gradient_part.T, part, out=weight)


class _Grouped:
    """The same products in one kernel each."""

    def __init__(self, counts: list[int], device: torch.device) -> None:
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.ends = ends.to(device, non_blocking=True)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        return functional.grouped_mm(rows, weights.transpose(1, 2), offs=self.ends)

    def to_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        return functional.grouped_mm(rows, weights, offs=self.ends)

    def to_weights(self, gradient: Tensor, rows: Tensor, out: Tensor) -> None:
        copy_strided(out, functional.grouped_mm(gradient.T, rows, offs=self.ends))


def _products(rows: Tensor, *weights: Tensor) -> type[_Each] | type[_Grouped]:
    """Grouped where torch has a fast kernel for the operands: bfloat16 on CUDA, matrices 16-byte aligned."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16 or not _HAS_GROUPED:
        return _Each
    if not len(rows) or not all(len(w) and w.data_ptr() % 16 == 0 and w.stride(0) % 8 == 0 for w in weights):
        return _Each
    return _Grouped if all(w.shape[1] % 8 == 0 and w.shape[2] % 8 == 0 for w in weights) else _Each
