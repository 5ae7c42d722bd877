"""The network of an expert and its own backward, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moeplan.runtime_client.layers import feed_forward as ffn
from moeplan.runtime_client.layers.feed_forward import ExpertShape, feed_forward, split_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x) ** 2,
}
SHAPES = [
    *(ExpertShape(6, 4, gated, activation) for gated in (True, False) for activation in ACTIVATIONS),
    ExpertShape(6, 4, limit=0.7),
    ExpertShape(6, 4, bias=True),
    ExpertShape(6, 4, gated=False, activation="relu2", bias=True, transposed=True),
    ExpertShape(6, 4, transposed=True),
    ExpertShape(6, 4, interleaved=True),
    ExpertShape(6, 4, slope=1.702, shift=1.0, limit=0.7),
    ExpertShape(6, 4, slope=1.702, shift=1.0, limit=0.7, bias=True, interleaved=True, transposed=True),  # gpt-oss
    ExpertShape(6, 4, activation="gelu_tanh", slope=0.5, shift=-1.0, limit=0.4, interleaved=True),
    ExpertShape(6, 4, softcaps=(0.5, 0.8)),
    ExpertShape(6, 4, softcaps=(2.0, 0.3), interleaved=True),
]
COUNTS = [5, 0, 3]


def inner_of(shape: ExpertShape, first: Tensor) -> Tensor:
    """What is between the matrices, as one would write it."""
    act = ACTIVATIONS[shape.activation]
    if not shape.gated:
        return act(first)
    gate, up = (first[:, ::2], first[:, 1::2]) if shape.interleaved else first.chunk(2, dim=1)
    if shape.softcaps is not None:
        soft_gate, soft_up = (cap * (half / cap).tanh() for half, cap in zip((gate, up), shape.softcaps, strict=True))
        return soft_gate * gate.sigmoid() * soft_up
    if shape.limit is not None:
        gate, up = gate.clamp(max=shape.limit), up.clamp(min=-shape.limit, max=shape.limit)
    return act(shape.slope * gate) / shape.slope * (up + shape.shift)


def plain(shape: ExpertShape, flat: Tensor, rows: Tensor) -> Tensor:
    """The network as one would write it."""
    inner, outer, *biases = split_weights(shape, flat)
    if shape.transposed:
        inner, outer = inner.transpose(1, 2), outer.transpose(1, 2)
    results = []
    for expert, part in enumerate(rows.split(COUNTS)):
        first = part @ inner[expert].T + (biases[0][expert] if biases else 0)
        results.append(inner_of(shape, first) @ outer[expert].T + (biases[1][expert] if biases else 0))
    return torch.cat(results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_autograd(shape: ExpertShape) -> None:
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


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.gated], ids=str)
def test_what_gpus_compile_gives_the_same(shape: ExpertShape) -> None:
    random = torch.Generator().manual_seed(1)
    first = torch.randn(7, 8, generator=random, dtype=torch.float64)
    gradient = torch.randn(7, 4, generator=random, dtype=torch.float64)
    torch._dynamo.reset()
    compiled: Any = partial(torch.compile, backend="eager", dynamic=False)
    wrapped: tuple[Any, Any] = (ffn._activate, ffn._gated_backward)
    activate, backward = (compiled(function.__wrapped__) for function in wrapped)
    torch.testing.assert_close(activate(first, shape.form), inner_of(shape, first))
    expected = ffn._activate_backward(gradient.clone(), first, shape.form)
    torch.testing.assert_close(backward(gradient.clone(), first, shape.form), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 0}, "expert.width = 0: must be at least 1"),
        ({"limit": 0.0}, "expert.limit = 0.0: must be above 0"),
        ({"softcaps": (1.0, 0.0)}, r"expert.softcaps = \(1.0, 0.0\): must be above 0"),
        ({"softcaps": (1.0, 1.0), "limit": 7.0}, "go with a gate of silu without slope and limit"),
        ({"activation": "tanh"}, "expert.activation = tanh: must be one of silu, gelu"),
    ],
)
def test_shapes_that_are_none_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExpertShape(**({"hidden": 4, "width": 4} | arguments))
