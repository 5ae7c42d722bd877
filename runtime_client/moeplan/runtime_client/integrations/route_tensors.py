"""Routes that rollout engines recorded, as RL frameworks hold them: what their readers check and count alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeplan.solvers import ProblemError, count_choices
from moeplan.solvers.problem.arrays import Int32, any_array, integers
from moeplan.solvers.problem.scalars import integer

__all__ = ["count_samples", "host_array"]


def host_array(field: str, values: Tensor | npt.ArrayLike, dimensions: Sequence[str]) -> npt.NDArray[Any]:
    """Whole numbers of a tensor on any device, or of what NumPy reads, as an array.

    Args:
        field: What errors call it.
        values: The numbers; booleans are numbers, too.
        dimensions: The names of its dimensions, as many as there must be.

    Raises:
        ProblemError: it is no such array, or has no values: a nested tensor, or one of the device "meta".
    """
    wanted = f"must be whole numbers [{', '.join(dimensions)}]"
    if isinstance(values, Tensor):
        if values.is_nested or values.is_meta or values.layout is not torch.strided:
            kind = "nested" if values.is_nested else "meta" if values.is_meta else "sparse"
            raise ProblemError(field, f"{kind} tensor", wanted)
        if values.is_floating_point() or values.is_complex():
            raise ProblemError(field, f"tensor of {values.dtype}", wanted)
        values = values.detach().cpu().numpy()
    array = any_array(field, values)
    if array.dtype.kind == "f":
        raise ProblemError(field, f"array of {array.dtype}", wanted)
    if array.ndim != len(dimensions):
        raise ProblemError(field, f"array of shape {array.shape}", wanted)
    return array


def count_samples(samples: Sequence[npt.NDArray[Any]], experts: int, moe_layers: Sequence[int] | None) -> Int32:
    """int32[samples, MoE layers, experts], tokens of each sample that go to each expert; see `count_choices`.

    Args:
        samples: int[tokens, layers, k] of each sample, as of `host_array`; -1 is no route.
        experts: Experts of a layer.
        moe_layers: Numbers from 0 of those of its layers that are MoE layers; None for all.

    Raises:
        ProblemError: there are no samples, they differ in layers or k, a layer is not among theirs or named twice, or
            an expert does not exist.
    """
    integer("experts", experts, 1)
    if not samples:
        raise ProblemError("routed_experts", "no samples", "must hold the routes of at least one")
    layers, k = samples[0].shape[1:]
    if k > experts:
        raise ProblemError("routed_experts[0]", f"array of shape {samples[0].shape}", f"k is above experts ({experts})")
    kept: Any = (
        slice(None) if moe_layers is None else integers("moe_layers", moe_layers, ndim=1, low=0, high=layers - 1)
    )
    if moe_layers is not None and len(np.unique(kept)) < len(kept):
        raise ProblemError("moe_layers", kept.tolist(), "names a layer twice")
    chosen = []
    for i, sample in enumerate(samples):
        if sample.shape[1:] != (layers, k):
            raise ProblemError(
                f"routed_experts[{i}]",
                f"array of shape {sample.shape}",
                f"must be [tokens, {layers}, {k}] as the first",
            )
        chosen.append(sample[:, kept])
        smallest, largest = int(chosen[-1].min(initial=0)), int(chosen[-1].max(initial=0))
        if largest >= experts:
            raise ProblemError(f"routed_experts[{i}]", f"expert {largest}", f"must be at most {experts - 1}")
        if smallest < -1:
            reason = "must be at least -1, which is no route; a type that is too small makes experts negative"
            raise ProblemError(f"routed_experts[{i}]", f"expert {smallest}", reason)
    return count_choices(chosen, experts)
