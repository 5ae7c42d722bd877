"""The feed-forward network of an expert, over the replicas that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ExpertShape", "feed_forward", "join_weights", "split_weights"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
}


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
    dtype = rows.dtype
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(flat.dtype)
        if len(counts) == 0:
            return (rows + flat.sum() * 0).to(dtype)
        inner, outer = split_weights(shape, flat)
        multiply = _grouped if _groups(rows, inner, outer) else _each
        hidden = multiply(rows, inner, counts)
        act = _ACTIVATIONS[shape.activation]
        if shape.gated:
            gate, up = hidden.chunk(2, dim=1)
            hidden = act(gate) * up
        else:
            hidden = act(hidden)
        return multiply(hidden, outer, counts).to(dtype)


def _each(rows: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    parts = zip(rows.split(list(counts)), weights.unbind(), strict=True)
    return torch.cat([functional.linear(part, weight) for part, weight in parts])


def _grouped(rows: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows.device, non_blocking=True)
    return functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def _groups(rows: Tensor, *weights: Tensor) -> bool:
    """Whether torch has a grouped product for these operands: bfloat16 on CUDA, rows 16-byte aligned."""
    if (
        rows.device.type != "cuda"
        or rows.dtype != torch.bfloat16
        or not hasattr(functional, "grouped_mm")
        or not len(rows)
    ):
        return False
    aligned = (rows.data_ptr() % 16, rows.shape[1] % 8, *(extent % 8 for w in weights for extent in w.stride()[:2]))
    return not any(aligned) and all(w.data_ptr() % 16 == 0 for w in weights)
