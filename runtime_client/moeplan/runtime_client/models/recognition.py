"""Recognition of what an experts module computes, by comparison with the forms that ours know."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeplan.runtime_client.layers.feed_forward import ExpertShape, activation_name, feed_forward, join_weights

__all__ = ["Recognised", "called_with_rows", "recognise"]

_SIZES = (1.0, 1000.0)
"""Of the rows that are compared: what models see, and what no clamp of theirs lets through."""

_TOLERANCE = 1e-4
"""Relative; both compute in single precision, which at any width of a model is within a tenth of it."""

_ROWS = 20
"""More than any capacity leaves of tokens that all choose the same experts."""

_TRAINED = {"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}


class Recognised(NamedTuple):
    """What an experts module computes.

    Attributes:
        shape: Dimensions and form of an expert.
        experts: Number of experts.
        identities: Choices above those of experts that give a token back as it is.
        finish: Name of the submodule that is applied to each result before it is weighed; empty if there is none.
    """

    shape: ExpertShape
    experts: int
    identities: int = 0
    finish: str = ""


def called_with_rows(module: nn.Module) -> bool:
    """True if a module is called with rows of all tokens for each expert, [experts * tokens, hidden], alone."""
    return len(inspect.signature(type(module).forward).parameters) == 2  # itself, and the rows


def recognise(title: str, module: nn.Module, known: Iterable[ExpertShape] = ()) -> Recognised:
    """What a fused experts module computes.

    Args:
        title: What errors call it.
        module: With parameters ``gate_up_proj`` or ``up_proj`` and ``down_proj``, [experts, rows, columns], perhaps
            with biases, called as ``module(hidden, index, weight)`` or with rows; a submodule with weights of its own
            is taken to be applied to results. Only its code runs, with weights of our own.
        known: Shapes to try first, as those of the model's other layers.

    Raises:
        ValueError: it computes something that no `ExpertShape` describes, its parameters are others or quantized, only
            some of them are frozen, it has buffers, or it is inside an adapter.
    """
    weights = dict(module.named_parameters(recurse=False))
    if quantized := {str(weight.dtype) for weight in weights.values()} - _TRAINED:
        raise ValueError(
            f"{title}: has weights of {', '.join(sorted(quantized))}; experts are trained in bfloat16 or wider. Load "
            "the model dequantized: from_pretrained(..., quantization_config=...Config(dequantize=True))"
        )
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ValueError(
            f"{title}: has buffers {', '.join(buffers)}, and no ExpertShape has; what it computes may depend on them"
        )
    candidates = list(_dimensions(title, weights))
    if title.split(" ")[0].endswith("base_layer"):
        raise ValueError(
            f"{title}: is wrapped by an adapter, which reaches into it; adapters of experts are not supported, so "
            "leave gate_up_proj and down_proj out of target_parameters"
        )
    if len({parameter.requires_grad for parameter in weights.values()}) > 1:
        raise ValueError(f"{title}: only some of {', '.join(weights)} are frozen; freeze all or none")
    finish = next((name for name, child in module.named_children() if next(child.parameters(), None) is not None), "")
    experts = len(weights["down_proj"])
    identities = max(map(len, weights.values())) - experts
    nearest = math.inf
    for size in candidates:
        expert = _random_expert(size)
        twin = _twin(module, expert)
        batch = _batch(size.hidden, experts, identities)
        actual = _run(title, twin, batch)
        first = [shape for shape in known if shape.parts == size.parts and shape.transposed == size.transposed]
        for shape in (*first, *_forms(title, module, size)):
            if called_with_rows(module) and (shape.bias or not shape.gated):
                continue  # of rows of zeros it makes something else
            run = partial(feed_forward, shape, join_weights(*expert.values()), counts=[_ROWS])
            difference = _difference(run, twin.get_submodule(finish) if finish else nn.Identity(), batch, actual)
            if difference <= _TOLERANCE:
                return Recognised(shape, experts, identities, finish)
            nearest = min(nearest, difference)
    raise ValueError(
        f"{title}: does not compute down(act(gate) * up) in a form that ExpertShape knows: on random rows, of ordinary "
        f"or of large size, it differs by {nearest:.2g} of the largest result, at least"
    )


def _dimensions(title: str, weights: dict[str, nn.Parameter]) -> Iterator[ExpertShape]:
    """Shapes, of the default form, whose parts are the parameters of a module."""
    given = {name: tuple(parameter.shape[1:]) for name, parameter in weights.items()}
    name = "gate_up_proj" if "gate_up_proj" in given else "up_proj"
    known = {name, "down_proj"}
    biases = {f"{name}_bias", "down_proj_bias"}
    others = set(given) - known
    if others and others != biases:
        raise ValueError(f"{title}: has parameters {', '.join(sorted(others))}; only weights and both biases are known")
    fitting = [
        shape
        for transposed, (hidden, width) in enumerate((given["down_proj"], given["down_proj"][::-1]))
        for shape in [
            ExpertShape(hidden, width, name == "gate_up_proj", bias=bool(others), transposed=bool(transposed))
        ]
        if shape.parts == given
    ]
    counts = {part: len(parameter) for part, parameter in weights.items()}
    spare = counts.pop(name) - counts["down_proj"]  # rows that no expert uses, as the identity is chosen in their place
    if not fitting or len(set(counts.values())) > 1 or spare < 0 or (spare and others):
        shapes = ", ".join(f"{part} {tuple(parameter.shape)}" for part, parameter in weights.items())
        raise ValueError(
            f"{title}: {shapes}; must be [experts, 2 * width, hidden] and [experts, hidden, width], or both "
            "transposed, of one number of experts"
        )
    yield from fitting


def _forms(title: str, module: nn.Module, size: ExpertShape) -> Iterator[ExpertShape]:
    """All that a module of these dimensions may compute, as its attributes suggest; the plain form first."""
    act_fn: Callable[[Tensor], Tensor] | None = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and len(inspect.signature(type(act_fn).forward).parameters) == 3:
        caps = sorted({value for part in act_fn.modules() for value in vars(part).values() if _is_number(value)})
        yield from (replace(size, softcaps=pair) for pair in itertools.product(caps, repeat=2) if size.gated)
        return
    activation = "silu" if act_fn is None else activation_name(act_fn)
    if activation is None:
        raise ValueError(f"{title}: act_fn = {act_fn}: must be SiLU, GELU, ReLU or squared ReLU")
    plain = replace(size, activation=activation)
    if not size.gated:
        yield plain
        return
    numbers = sorted(
        {
            float(value)
            for name, value in vars(module).items()
            if _is_number(value) or (isinstance(value, int) and value > 0 and ("limit" in name or "alpha" in name))
        }
    )
    forms = itertools.product((False, True), (None, *numbers), (1.0, *numbers), (0.0, 1.0))
    for interleaved, limit, slope, shift in forms:
        yield replace(plain, interleaved=interleaved, limit=limit, slope=slope, shift=shift)


def _is_number(value: object) -> bool:
    return isinstance(value, float) and value > 0


def _random_expert(shape: ExpertShape) -> dict[str, Tensor]:
    """The parts of one expert, [1, ...] each, whose matrices keep the size of what they are multiplied with."""
    rng = torch.Generator().manual_seed(0)
    inputs = {True: shape.width, False: shape.hidden}
    return {
        name: torch.randn(1, *part, generator=rng, device="cpu") / inputs["down" in name] ** 0.5
        for name, part in shape.parts.items()
    }


def _twin(module: nn.Module, expert: dict[str, Tensor]) -> nn.Module:
    """A module of the same code, with one expert's weights in the place of all of its own."""
    twin = copy.copy(module)
    twin._modules = copy.deepcopy(module._modules)
    rng = torch.Generator().manual_seed(2)
    for part in (part for child in twin.children() for part in child.modules()):
        part._parameters = {
            name: nn.Parameter(torch.randn(own.shape, generator=rng, device="cpu"), requires_grad=False)
            for name, own in part._parameters.items()
            if own is not None
        }
    twin._parameters = {
        name: nn.Parameter(part.expand(len(module.get_parameter(name)), *part.shape[1:]), requires_grad=False)
        for name, part in expert.items()
    }
    return twin.train()  # a dropout would show


class _Batch(NamedTuple):
    """Tokens [tokens, hidden], with choices and weights [tokens, k]: two of experts, and of an identity if there is."""

    rows: Tensor
    choices: Tensor
    weight: Tensor


def _batch(hidden: int, experts: int, identities: int) -> _Batch:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(_ROWS, hidden, generator=rng, device="cpu")
    chosen = [0, experts - 1, experts + identities - 1][: 3 if identities else 2]
    index = torch.tensor(chosen, device="cpu").expand(_ROWS, len(chosen))
    return _Batch(rows, index, torch.rand(index.shape, generator=rng, device="cpu"))


@torch.no_grad()
def _run(title: str, twin: nn.Module, batch: _Batch) -> list[Tensor]:
    """Results of a twin for rows of each size."""
    rows, index, weight = batch
    try:
        with torch.autocast("cpu", enabled=False):
            if not called_with_rows(twin):
                return [type(twin).forward(twin, size * rows, index, weight) for size in _SIZES]
            times = len(twin.get_parameter("down_proj"))
            results = [type(twin).forward(twin, (size * rows).repeat(times, 1))[-_ROWS:] for size in _SIZES]
            return [result * weight.sum(1, keepdim=True) for result in results]
    except Exception as error:
        raise ValueError(f"{title}: cannot be called as experts(hidden, index, weight): {error}") from error


@torch.no_grad()
def _difference(
    run: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor], batch: _Batch, actual: list[Tensor]
) -> float:
    """The first above the tolerance, or the last, relative to the largest result; infinite if shapes differ."""
    difference = 0.0
    for size, result in zip(_SIZES, actual, strict=True):
        rows, same = size * batch.rows, batch.weight[:, 2:].sum(1, keepdim=True)
        with torch.autocast("cpu", enabled=False):
            expected = finish(run(rows)) * batch.weight[:, :2].sum(1, keepdim=True) + rows * same
        if result.shape != expected.shape:
            return math.inf
        difference = float((result - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:  # also if it is not a number
            return math.inf if math.isnan(difference) else difference
    return difference
