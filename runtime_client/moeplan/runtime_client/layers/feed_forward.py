"""The feed-forward network of an expert, over the replicas that a rank holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.layers.copies import copy_strided
from moeplan.runtime_client.layers.fusing import fused

__all__ = ["ExpertShape", "activation_name", "feed_forward", "join_weights", "split_weights"]

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
    "relu": (functional.relu, lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0)),
    "relu2": (lambda x: functional.relu(x).square(), lambda gradient, x: gradient * 2 * functional.relu(x)),
}
"""Forward, and backward from the gradient and the input."""

_HAS_GROUPED = hasattr(functional, "grouped_mm")


class Form(NamedTuple):
    """The computation between an expert's two matrices; the fields are those of `ExpertShape`."""

    gated: bool
    activation: str
    slope: float
    shift: float
    limit: float | None
    softcaps: tuple[float, float] | None
    interleaved: bool


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Dimensions and form of one expert.

    With the default form the inner layer is ``act(gate(x)) * up(x)``, which with ``silu`` is SwiGLU.

    Attributes:
        hidden: Width of a token.
        width: Width of the inner layer.
        gated: Whether the inner layer has a gate; it is ``act(up(x))`` otherwise, and the next four do not apply.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2`` (its square).
        slope: Of the argument of the activation: ``act(slope * gate) / slope``.
        shift: Added to ``up``.
        limit: Gates are cut above it, and ``up`` above it and below its negative; None for no limit.
        softcaps: Of gate and ``up``, with ``silu`` alone: ``soft(gate) * sigmoid(gate) * soft(up)``, where ``soft(x)``
            is ``cap * tanh(x / cap)``; None for none.
        bias: Whether both matrices have a bias.
        interleaved: Whether rows of gate and up alternate, rather than gate being above up.
        transposed: Whether matrices are kept as [inputs, outputs], rather than [outputs, inputs].

    Raises:
        ValueError: a width is below 1, the limit, the slope or a softcap not above 0, the activation is unknown, or
            softcaps go with something else than ``silu``.
    """

    hidden: int
    width: int
    gated: bool = True
    activation: str = "silu"
    slope: float = 1.0
    shift: float = 0.0
    limit: float | None = None
    softcaps: tuple[float, float] | None = None
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"expert.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("slope", "limit"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"expert.{name} = {getattr(self, name)}: must be above 0")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"expert.activation = {self.activation}: must be one of {', '.join(_ACTIVATIONS)}")
        if self.softcaps is not None:
            if not min(self.softcaps) > 0:
                raise ValueError(f"expert.softcaps = {self.softcaps}: must be above 0")
            if self.form != Form(True, "silu", 1.0, 0.0, None, self.softcaps, self.interleaved):
                raise ValueError(f"expert.softcaps = {self.softcaps}: go with a gate of silu without slope and limit")

    @property
    def inner_rows(self) -> int:
        """Outputs of the first matrix: gate and up, or up alone."""
        return self.width * (2 if self.gated else 1)

    @property
    def form(self) -> Form:
        """The computation between the matrices."""
        return Form(self.gated, self.activation, self.slope, self.shift, self.limit, self.softcaps, self.interleaved)

    @property
    def plain(self) -> bool:
        """Whether it is of the default form, but for gate and activation."""
        return self == ExpertShape(self.hidden, self.width, self.gated, self.activation)

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Parts of a flat expert, in order: names and shapes as a fused experts module has them."""
        inner, outer = (self.inner_rows, self.hidden), (self.hidden, self.width)
        name = "gate_up_proj" if self.gated else "up_proj"
        parts: dict[str, tuple[int, ...]] = {name: inner, "down_proj": outer}
        if self.transposed:
            parts = {part: shape[::-1] for part, shape in parts.items()}
        if self.bias:
            parts |= {f"{name}_bias": inner[:1], "down_proj_bias": outer[:1]}
        return parts

    @property
    def elements(self) -> int:
        """Parameters of one expert."""
        return sum(map(math.prod, self.parts.values()))


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The activation that gives the same values as `function`; None if none does."""
    probe = torch.linspace(-4, 4, 33, device="cpu")
    try:
        values = function(probe)
    except TypeError:  # it takes something else than one tensor
        return None
    return next((name for name, (forward, _) in _ACTIVATIONS.items() if torch.equal(forward(probe), values)), None)


def join_weights(*parts: Tensor) -> Tensor:
    """[experts, elements]: flat experts, from ``parts`` of their shape, each [experts, ...]."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def split_weights(shape: ExpertShape, flat: Tensor) -> tuple[Tensor, ...]:
    """The ``parts`` of an expert's shape, each [replicas, ...], views of their flat form.

    Args:
        shape: Dimensions of an expert.
        flat: [replicas, elements or more]; the surplus is padding.
    """
    sizes = shape.parts.values()
    *parts, _ = flat.split([*map(math.prod, sizes), flat.shape[1] - shape.elements], dim=1)
    return tuple(part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True))


def _matrices(shape: ExpertShape, flat: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """The matrices as [replicas, outputs, inputs], and the biases if there are any."""
    inner, outer, *biases = split_weights(shape, flat)
    return (inner.mT, outer.mT, biases) if shape.transposed else (inner, outer, biases)


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
        inner, outer, biases = _matrices(shape, flat)
        ctx.shape, ctx.counts, ctx.products = shape, counts, _products(rows, inner, outer)(counts, rows.device)
        with _plain(rows):
            first = ctx.products.forward(rows, inner)
            if biases:
                _add_bias(first, biases[0], counts)
            results: Tensor = ctx.products.forward(_activate(first, shape.form), outer)
            if biases:
                _add_bias(results, biases[1], counts)
        ctx.save_for_backward(flat, rows, first)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        flat, rows, first = ctx.saved_tensors
        shape, products = ctx.shape, ctx.products
        inner, outer, _ = _matrices(shape, flat)
        gradient = gradient.contiguous()
        with _plain(rows):
            to_first = _activate_backward(products.to_rows(gradient, outer), first, shape.form)
            to_rows = products.to_rows(to_first, inner)
            if not ctx.needs_input_grad[0]:  # frozen experts
                return None, to_rows, None, None
            to_flat = torch.empty_like(flat)
            to_flat[:, shape.elements :] = 0
            to_inner, to_outer, to_biases = _matrices(shape, to_flat)
            products.to_weights(gradient, _activate(first, shape.form), to_outer)
            products.to_weights(to_first, rows, to_inner)
            for to_bias, part in zip(to_biases, (to_first, gradient), strict=False):
                for mine, out in zip(part.split(ctx.counts), to_bias, strict=True):
                    torch.sum(mine, dim=0, out=out)
            return to_flat, to_rows, None, None


def _add_bias(rows: Tensor, bias: Tensor, counts: list[int]) -> None:
    """Add each replica's bias, of [replicas, outputs], to its own rows."""
    for part, mine in zip(rows.split(counts), bias, strict=True):
        part.add_(mine)


def _plain(rows: Tensor) -> torch.autocast:
    return torch.autocast(rows.device.type, enabled=False)


def _halves(first: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Gate and up, as they are used."""
    gate, up = (first[:, ::2], first[:, 1::2]) if form.interleaved else first.chunk(2, dim=1)
    if form.limit is not None:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return gate, up


def _soft(half: Tensor, cap: float) -> Tensor:
    return torch.tanh(half / cap).mul_(cap)


@fused
def _activate(first: Tensor, form: Form) -> Tensor:
    """``act(gate) * up`` of rows [gate, up], or ``act(up)`` of a network without a gate."""
    forward, _ = _ACTIVATIONS[form.activation]
    if not form.gated:
        return forward(first)
    gate, up = _halves(first, form)
    if form.softcaps is not None:
        gate_cap, up_cap = form.softcaps
        return torch.sigmoid(gate).mul_(_soft(gate, gate_cap)).mul_(_soft(up, up_cap))
    if form.slope != 1:
        return forward(form.slope * gate).mul_((up + form.shift) / form.slope)
    return forward(gate).mul_(up if form.shift == 0 else up + form.shift)


def _activate_backward(gradient: Tensor, first: Tensor, form: Form) -> Tensor:
    """Gradient of the argument of `_activate`; `gradient` may be changed."""
    forward, backward = _ACTIVATIONS[form.activation]
    if not form.gated:
        return backward(gradient, first)
    if gradient.is_cuda or form != Form(True, form.activation, 1.0, 0.0, None, None, False):
        return _gated_backward(gradient, first, form)
    # In place where it can be: fresh memory costs as much as the arithmetic.
    gate, up = first.chunk(2, dim=1)
    result = torch.empty_like(first)
    to_gate, to_up = result.chunk(2, dim=1)
    torch.mul(gradient, forward(gate), out=to_up)
    to_gate.copy_(backward(gradient.mul_(up), gate))
    return result


@fused
def _gated_backward(gradient: Tensor, first: Tensor, form: Form) -> Tensor:
    """`_activate_backward` with a gate, as one expression."""
    forward, backward = _ACTIVATIONS[form.activation]
    gate, up = _halves(first, form)
    if form.softcaps is not None:
        gate_cap, up_cap = form.softcaps
        soft_gate, soft_up, share = _soft(gate, gate_cap), _soft(up, up_cap), torch.sigmoid(gate)
        slope = 1 - (soft_gate / gate_cap).square() + soft_gate * (1 - share)
        to_gate = gradient * soft_up * share * slope
        to_up = gradient * soft_gate * share * (1 - (soft_up / up_cap).square())
    else:
        argument = gate if form.slope == 1 else form.slope * gate
        factor = up if form.shift == 0 else up + form.shift
        to_gate = backward(gradient * factor, argument)
        to_up = forward(argument).mul_(gradient)
        if form.slope != 1:
            to_up = to_up / form.slope
    if form.limit is not None:  # what has been cut has no gradient; a value at the limit has not been
        before = first[:, ::2], first[:, 1::2]
        raw_gate, raw_up = before if form.interleaved else first.chunk(2, dim=1)
        to_gate = to_gate * (raw_gate <= form.limit)
        to_up = to_up * (raw_up.abs() <= form.limit)
    return torch.stack([to_gate, to_up], dim=2).flatten(1) if form.interleaved else torch.cat([to_gate, to_up], dim=1)


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
