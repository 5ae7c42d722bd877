"""Where MoE layers of known frameworks show which experts they chose, without any of the frameworks being imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor, nn

__all__ = ["PROBES", "Form", "Probe"]


class Form(StrEnum):
    """The content of a tensor of choices."""

    INDEX = "index"
    """Integers [..., k]: experts of each token. Entries that are no expert, as of padding, are counted as ignored."""
    MAP = "map"
    """[tokens, experts]: non-zero where a token goes to an expert."""
    COUNTS = "counts"
    """[experts]: tokens of each expert."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A way to see the choices of one kind of module. Make your own for a kind that is not in `PROBES`.

    Attributes:
        looks_for: The kind of module in words, for the error that says what was looked for.
        experts: Number of experts of a module of this kind; None for any other module.
        read: Choices and their form, from the positional and named arguments and the output of a call.
        before: Whether to read before the module runs, when there is no output yet. Choose it for modules that are
            called with the choices, as they might change them.
    """

    looks_for: str
    experts: Callable[[nn.Module], int | None]
    read: Callable[[tuple[Any, ...], Mapping[str, Any], Any], tuple[Tensor, Form]]
    before: bool = False


INDEX_ARGUMENTS = ("top_k_index", "router_indices")
"""Second parameter of experts modules in transformers; gpt-oss has the other name."""


OURS = frozenset({"FullyShardedExperts", "ResidentExperts"})


def _experts_of_ours(module: nn.Module) -> int | None:
    return _number(module, "experts") if OURS & {kind.__name__ for kind in type(module).__mro__} else None


def _experts_of_transformers(module: nn.Module) -> int | None:
    if not type(module).__name__.endswith("Experts") or _number(module, "num_experts") is None:
        return None
    # The class's, since expert parallelism of transformers puts another `forward` on the instance.
    if not any(name in inspect.signature(type(module).forward).parameters for name in INDEX_ARGUMENTS):
        return None
    # Under expert parallelism `num_experts` is the number on this rank, and the weights are DTensors of them all.
    stacked = [len(weight) for weight in module.parameters(recurse=False) if weight.ndim == 3]
    return max([_number(module, "num_experts") or 0, *stacked])


def _experts_of_deepspeed(module: nn.Module) -> int | None:
    return _number(module, "num_experts") if hasattr(module, "deepspeed_moe") else None


def _experts_of_megatron(module: nn.Module) -> int | None:
    named = type(module).__name__.endswith("Router") and hasattr(module, "topk")
    return _number(getattr(module, "config", None), "num_moe_experts") if named else None


def _experts_of_torchtitan(module: nn.Module) -> int | None:
    named = type(module).__name__ == "TokenChoiceTopKRouter" and hasattr(module, "top_k")
    return _number(module, "num_experts") if named else None


def _number(owner: object, name: str) -> int | None:
    number = getattr(owner, name, None)
    return number if isinstance(number, int) else None


def _read_argument(arguments: tuple[Any, ...], named: Mapping[str, Any], _: Any) -> tuple[Tensor, Form]:
    if len(arguments) > 1:
        return arguments[1], Form.INDEX
    return next(named[name] for name in ("index", *INDEX_ARGUMENTS) if name in named), Form.INDEX


def _read_index(_: tuple[Any, ...], __: Mapping[str, Any], output: Any) -> tuple[Tensor, Form]:
    return output[1], Form.INDEX


def _read_map(_: tuple[Any, ...], __: Mapping[str, Any], output: Any) -> tuple[Tensor, Form]:
    # Megatron's inference router returns integers [tokens, k] in the place of the map.
    return output[1], Form.INDEX if output[1].dtype.itemsize > 1 else Form.MAP


def _read_counts(_: tuple[Any, ...], __: Mapping[str, Any], output: Any) -> tuple[Tensor, Form]:
    return output[2], Form.COUNTS


PROBES: tuple[Probe, ...] = (
    Probe("FullyShardedExperts and ResidentExperts of moeplan", _experts_of_ours, _read_argument, before=True),
    Probe(
        "transformers 5: modules named *Experts with `num_experts` and forward(hidden, top_k_index, ...) "
        "or forward(hidden, router_indices, ...)",
        _experts_of_transformers,
        _read_argument,
        before=True,
    ),
    Probe(
        "DeepSpeed: `deepspeed.moe.layer.MoE`, whose output is (hidden, loss, exp_counts)",
        _experts_of_deepspeed,
        _read_counts,
    ),
    Probe(
        "torchtitan and DeepSpeed AutoEP: TokenChoiceTopKRouter, whose output is (scores, experts, ...)",
        _experts_of_torchtitan,
        _read_index,
    ),
    Probe(
        "Megatron-core: *Router with `topk` and `config.num_moe_experts`, whose output is (scores, routing map)",
        _experts_of_megatron,
        _read_map,
    ),
)
"""The kinds that `record` knows; the first that a module fits is used.

Read in transformers 5.23, DeepSpeed 0.19.8, torchtitan b5bcd76 and Megatron-core 005742f. DeepSpeed's counts are those
before it drops tokens over capacity.
"""
