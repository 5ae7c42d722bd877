"""Facts that ranks exchange beside the counts of a pass, so that none computes with what does not go together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.errors import LayoutMismatchError, MissedPassError, RanksDifferError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["compare_ranks", "row_sums", "tell"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PASS_BITS = 32


def tell(
    layer: int,
    number: int,
    layout: int,
    own: Tensor | None = None,
    rewritten: Tensor | None = None,
    shared: Tensor | None = None,
) -> list[int | Tensor]:
    """A rank's facts about itself, for `compare_ranks`.

    Args:
        layer: Number of the layer in the group.
        number: Number of its pass.
        layout: Number that differs between layouts, and between means of a planner.
        own: int64, sum of `row_sums` of this rank's part of the experts; None in most passes, as it reads all weights.
        rewritten: int64, 1 if they are not what the layer has loaded.
        shared: int64, sum of `row_sums` of the weights that all ranks share.
    """
    checks = (0 if check is None else check for check in (own, rewritten, shared))
    return [layer << _PASS_BITS | number, layout, *checks]


def row_sums(tensor: Tensor) -> Tensor:
    """int64[rows]: sums of the bits of each row of a tensor, 0 of zeros; what is no matrix has one row."""
    rows = tensor.detach() if tensor.ndim == 2 else tensor.detach().reshape(1, tensor.numel())
    return rows.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dim=1, dtype=torch.int64)


def compare_ranks(name: str, told: Int64) -> None:
    """Raise, on every rank alike, if what ranks told does not go together.

    Args:
        name: The layer, for the error.
        told: int64[size, ...], what each rank gave `tell`.

    Raises:
        MissedPassError: the ranks are in different passes, or in different layers.
        LayoutMismatchError: their layouts differ, or what they lend by.
        RanksDifferError: two ranks hold the same part of the experts, or weights that all share differ.
    """
    place, layout, own, rewritten, shared = told.T
    if _differing(place):
        where = ", ".join(
            f"rank {rank} in pass {at & (1 << _PASS_BITS) - 1} of layer {at >> _PASS_BITS}"
            for rank, at in enumerate(place.tolist())
        )
        raise MissedPassError(
            f"{name}: the ranks are not in the same pass: {where}. One of them has left out a pass: every rank of the "
            "group calls every layer as often as the others do, also with no tokens"
        )
    if ranks := _differing(layout):
        raise LayoutMismatchError(
            f"{name}: layout of ranks {ranks}, or the planner that lends there or its options, differ from rank 0's; "
            "set the same on all ranks"
        )
    for rank in np.flatnonzero(rewritten).tolist():
        same = [other for other in np.flatnonzero(own == own[rank]).tolist() if other != rank]
        if own[rank] and same:
            raise RanksDifferError(
                f"{name}: ranks {rank} and {same[0]} hold the same part of the experts, and each must hold its own. "
                "A wrapper has broadcast them, they were drawn from one seed, or training has made all of them not a "
                "number. Against the first two write\n"
                "    ExpertGradients(model)  # before DistributedDataParallel(model)\n"
                "    fully_shard(model, ignored_params=set(expert_parameters(model).values()))"
            )
    if ranks := _differing(shared):
        raise RanksDifferError(
            f"{name}: the weights beside the experts, which all ranks share, differ on ranks {ranks} from rank 0's. "
            "Their gradients were not reduced over all ranks, or each rank clipped by a norm of its own, as "
            "torch.nn.utils.clip_grad_norm_ does, since each holds other experts. Write\n"
            "    gradients = ExpertGradients(model)\n"
            "    gradients.clip_grad_norm_(1.0)  # after the backward pass"
        )


def _differing(column: Int64) -> list[int]:
    """Ranks that told another number than rank 0."""
    return np.flatnonzero(column != column[0]).tolist()
