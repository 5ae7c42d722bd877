"""Facts that ranks exchange beside the counts of a pass, so that none computes with what does not go together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.errors import LayoutMismatchError, MissedPassError, RanksDifferError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["compare_ranks", "is_looked_at", "row_sums", "tell", "tells_training"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PASS_BITS = 32
_LAYER_BITS = 16


def is_looked_at(number: int) -> bool:
    """True of pass 1, 2, 4, 8 and so on, in which ranks look at what takes long, as what differs stays different."""
    return number & (number - 1) == 0


def tells_training(number: int) -> bool:
    """True in passes 3, 5, 9, 17 and so on, in which ranks compare what trains their experts, not these."""
    return number > 2 and is_looked_at(number - 1)


def tell(
    layer: int,
    number: int,
    layout: int,
    own: Tensor | None = None,
    rewritten: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    steps: int = 0,
) -> list[int | Tensor]:
    """A rank's facts about itself, for `compare_ranks`.

    Args:
        layer: Number of the layer in the group.
        number: Number of its pass.
        layout: Number that differs between layouts, means of a planner, types, with and without gradients, and after
            backward passes in another order.
        own: int64, sum of `row_sums` of this rank's part of the experts; in passes that `tells_training`, of what an
            optimizer trains them by. None in most passes, as it reads all of them.
        rewritten: int64, 1 if no other rank may hold the same: it is not what the layer has loaded.
        shared: int64, sum of `row_sums` of the weights that all ranks share.
        steps: Of optimizers, that trained this rank's part, from 1; 0 where that is not known.
    """
    checks = (0 if check is None else check for check in (own, rewritten, shared))
    steps %= 1 << 63 - _PASS_BITS - _LAYER_BITS
    return [(steps << _LAYER_BITS | layer) << _PASS_BITS | number, layout, *checks]


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
        LayoutMismatchError: their layouts differ, what they lend by, or how they compute.
        RanksDifferError: two ranks hold the same part of the experts or train theirs by the same gradients, one has
            left out a step, or weights that all share differ.
    """
    place, layout, own, rewritten, shared = told.T
    steps, place = place >> _PASS_BITS + _LAYER_BITS, place & (1 << _PASS_BITS + _LAYER_BITS) - 1
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
            f"{name}: layout of ranks {ranks}, or the planner that lends there or its options, the type that they "
            "compute in (autocast), whether experts are trained (frozen, no_grad), how often optimizers have trained "
            "them (GradScaler leaves out steps; write ShardedGradScaler), or of which passes they have run the "
            "backward, and in what order, differ from rank 0's; have the same on all ranks"
        )
    training = tells_training(int(place[0]) & (1 << _PASS_BITS) - 1)
    for rank in np.flatnonzero(rewritten).tolist():
        same = [other for other in np.flatnonzero(own == own[rank]).tolist() if other != rank]
        if own[rank] and same and training:
            raise RanksDifferError(
                f"{name}: ranks {rank} and {same[0]} train their parts of the experts by the same gradients, or the "
                "same state of an optimizer, and each holds other experts. Either gradients of all parameters were "
                "reduced over ranks, or ranks have loaded the optimizer of one of them. Write\n"
                "    ExpertGradients(model)  # before DistributedDataParallel(model), or reduce but these:\n"
                "    experts = set(expert_parameters(model).values())\n"
                '    dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)'
            )
        if own[rank] and same:
            raise RanksDifferError(
                f"{name}: ranks {rank} and {same[0]} hold the same part of the experts, and each must hold its own. "
                "A wrapper has broadcast them, they were drawn from one seed, or training has made all of them not a "
                "number. Against the first two write\n"
                "    ExpertGradients(model)  # before DistributedDataParallel(model)\n"
                "    fully_shard(model, ignored_params=set(expert_parameters(model).values()))\n"
                "    FullyShardedDataParallel(model, ignored_states=list(expert_parameters(model).values()))"
            )
    known = steps[steps > 0]
    if (known != known[:1]).any():
        made = ", ".join(f"rank {rank} {count - 1}" for rank, count in enumerate(steps.tolist()) if count)
        raise RanksDifferError(
            f"{name}: ranks have made different numbers of steps of its optimizer: {made}. GradScaler leaves out a "
            "step on ranks whose own gradients overflow, and each has other experts. Write\n"
            "    torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler()  # which asks all ranks"
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
