"""Layers that are called with rows of all tokens for each expert, as in Llama 4, rather than with choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["take_rows_by_expert"]


def take_rows_by_expert(layer: nn.Module, experts: int) -> None:
    """Let a layer be called as ``layer(rows)``, rows [experts * tokens, hidden] ordered by expert.

    A row is a token times its weight for the expert, so most are zeros. In a gated network without biases their results
    and gradients are zeros, too. Hooks turn the others into tokens with one choice each, and put the results back.
    Recorders, which are attached later, see the choices.

    Args:
        layer: Called as ``layer(hidden, index, weight)`` otherwise.
        experts: Number of experts.
    """
    places: list[Tensor] = []
    sizes: list[torch.Size] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def choose(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        (rows,) = arguments
        place = rows.detach().any(dim=1).nonzero().squeeze(1)
        places.append(place)
        sizes.append(rows.shape)
        index = place.div(max(1, len(rows) // experts), rounding_mode="floor")
        return rows[place], index.unsqueeze(1), rows.new_ones(len(place), 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def put_back(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(sizes.pop()).index_copy(0, places.pop(), output)

    layer.register_forward_pre_hook(choose)
    layer.register_forward_hook(put_back)
