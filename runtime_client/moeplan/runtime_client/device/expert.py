"""Dimensions of an expert, and its flat form."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Expert", "matrix_sizes", "split"]


class Expert(Protocol):
    """Dimensions of one expert, as `ExpertShape` has them."""

    @property
    def hidden(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def activation(self) -> str: ...
    @property
    def plain(self) -> bool: ...
    @property
    def elements(self) -> int: ...


def matrix_sizes(shape: Expert) -> tuple[int, int]:
    """Elements of an expert's first and second matrix, which are one after the other in its flat form."""
    return shape.width * (2 if shape.gated else 1) * shape.hidden, shape.hidden * shape.width


def split(shape: Expert, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [replicas, width or 2 * width, hidden] and [replicas, hidden, width], views of their flat form."""
    inner, outer = flat.split(matrix_sizes(shape), dim=1)
    return inner.unflatten(1, (-1, shape.hidden)), outer.unflatten(1, (shape.hidden, -1))
