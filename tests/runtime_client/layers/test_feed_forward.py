"""The network of an expert and its own backward, against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeplan.runtime_client.layers import feed_forward as ffn
from moeplan.runtime_client.layers.feed_forward import ExpertShape, feed_forward, split_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
}
KINDS = [(gated, activation) for gated in (True, False) for activation in ACTIVATIONS]
COUNTS = [5, 0, 3]


def plain(shape: ExpertShape, flat: Tensor, rows: Tensor) -> Tensor:
    """The network as one would write it."""
    inner, outer = split_weights(shape, flat)
    results = []
    for expert, part in enumerate(rows.split(COUNTS)):
        first = part @ inner[expert].T
        if shape.gated:
            gate, up = first.chunk(2, dim=1)
            first = ACTIVATIONS[shape.activation](gate) * up
        else:
            first = ACTIVATIONS[shape.activation](first)
        results.append(first @ outer[expert].T)
    return torch.cat(results)


@pytest.mark.parametrize(("gated", "activation"), KINDS)
def test_results_and_gradients_are_those_of_autograd(gated: bool, activation: str) -> None:
    shape = ExpertShape(6, 4, gated=gated, activation=activation)
    random = torch.Generator().manual_seed(0)
    flat = torch.randn(len(COUNTS), shape.elements + 2, generator=random, dtype=torch.float64)  # two of padding
    rows = torch.randn(sum(COUNTS), shape.hidden, generator=random, dtype=torch.float64)
    target = torch.randn(rows.shape, generator=random, dtype=torch.float64)
    their_flat, their_rows = flat.clone().requires_grad_(), rows.clone().requires_grad_()
    flat.requires_grad_()
    rows.requires_grad_()
    expected = plain(shape, their_flat, their_rows)
    actual = feed_forward(shape, flat, rows, COUNTS)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (expected * target).sum().backward()
    (actual * target).sum().backward()
    for one, other in ((flat, their_flat), (rows, their_rows)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_gpus_compile_gives_the_same_gradients(activation: str) -> None:
    random = torch.Generator().manual_seed(1)
    first = torch.randn(7, 8, generator=random, dtype=torch.float64)
    gradient = torch.randn(7, 4, generator=random, dtype=torch.float64)
    expected = ffn._gated_backward(gradient.clone(), first, activation)
    torch.testing.assert_close(ffn._activate_backward(gradient.clone(), first, True, activation), expected)
