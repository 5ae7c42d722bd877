"""Tokens to experts and back: what the routers chose, the route of a micro-batch, dispatch and combine."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.errors import RouterError
from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.layers.copies import scatter_rows
from moeplan.runtime_client.layers.fusing import fused
from moeplan.solvers.problem.arrays import Int32, Int64

__all__ = ["Route", "combine", "dispatch", "find_route", "gather_counts", "infers_shapes"]


def gather_counts(
    group: ExpertGroup,
    index: Tensor,
    weight: Tensor,
    experts: int,
    what: str = "counts",
    told: Sequence[int | Tensor] = (),
    compare: Callable[[Int64], None] | None = None,
) -> Int64:
    """Tokens of each expert from each rank: one collective and one copy to the host.

    What is wrong on one rank travels with the counts, so all ranks raise together instead of waiting for it.

    Args:
        group: The ranks.
        index: int64[tokens, k], experts chosen for each token of this rank.
        weight: [tokens, k], weights of the choices.
        experts: Number of experts.
        what: What errors call the pass.
        told: Numbers that travel with the counts, int64; tensors where the device has yet to compute them.
        compare: Called with what all ranks told, int64[size, len(told)]; raises if they do not go together.

    Returns:
        int64[size, experts].

    Raises:
        RouterError: a rank chose an expert out of range, or a weight is not finite.
        MissedPassError: a rank has not come.
    """
    chosen = index.reshape(-1).clamp(-1, experts)  # what is out of range counts for one of the two ends
    row = torch.zeros(experts + 3 + len(told), dtype=torch.int64, device=index.device)
    row[: experts + 2].scatter_add_(0, chosen + 1, torch.ones_like(chosen))
    weight = weight.detach()
    row[experts + 2] = (weight - weight).ne(0).sum()  # infinite or not a number: the difference is not a number
    for place, number in enumerate(told, experts + 3):
        if isinstance(number, Tensor) or number:
            row[place] = number
    table: Int64 = group.gather_rows(row, what).cpu().numpy()
    if compare is not None:
        compare(table[:, experts + 3 :])
    for rank, (below, above, not_finite) in enumerate(table[:, [0, experts + 1, experts + 2]]):
        outside = below + above
        if outside or (not_finite and not infers_shapes()):
            raise RouterError(
                f"router output of rank {rank}: {outside} choices outside 0..{experts - 1} and "
                f"{not_finite} weights that are not finite; the model has diverged or its inputs are wrong"
            )
    return np.ascontiguousarray(table[:, 1 : experts + 1])


def infers_shapes() -> bool:
    """True if ``torch.distributed.pipelining`` runs the model on memory that was never written, to see shapes."""
    return any(frame.f_code.co_name == "_forward_metadata_inference" for frame, _ in traceback.walk_stack(None))


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Where this rank's (token, choice) pairs go in one micro-batch, and how arriving rows are ordered.

    Attributes:
        choices: k, experts per token.
        send: Rows for each rank.
        receive: Rows from each rank.
        pairs: int64[tokens * k], the pair at each position of what is sent.
        places: int64[tokens, k], the position of each pair.
        arrange: int64[received], position among the received rows of each row of the computation, which is
            ordered by slot and then by source.
        rows: Rows of each slot of this rank, empty slots included.
    """

    choices: int
    send: list[int]
    receive: list[int]
    pairs: Tensor
    places: Tensor
    arrange: Tensor
    rows: list[int]


def find_route(slots: Int32, send: Int64, receive: Int64, index: Tensor) -> Route:
    """The route of one micro-batch.

    Args:
        slots: int32[devices, width], the layout.
        send: int64[devices, width], tokens from this rank to each slot.
        receive: int64[devices, width], tokens from each source to the slots of this rank.
        index: int64[tokens, k], experts chosen for this rank's tokens.
    """
    # Sorting the pairs by expert, stably, makes each slot's share a range of the sorted order.
    by_expert = torch.sort(index.reshape(-1), stable=True).indices
    order = np.argsort(slots.ravel(), kind="stable")
    share = send.ravel()[order]
    starts = np.empty(slots.size, np.int64)
    starts[order] = np.cumsum(share) - share
    from_source = np.cumsum(receive.ravel()) - receive.ravel()
    pairs = by_expert[_ranges(starts, send.ravel(), index.device)]
    return Route(
        choices=index.shape[1],
        send=send.sum(axis=1).tolist(),
        receive=receive.sum(axis=1).tolist(),
        pairs=pairs,
        places=torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=pairs.device)).view_as(index),
        arrange=_ranges(from_source.reshape(receive.shape).T.ravel(), receive.T.ravel(), index.device),
        rows=receive.sum(axis=0).tolist(),
    )


def _ranges(starts: Int64, lengths: Int64, device: torch.device) -> Tensor:
    """int64[sum(lengths)] on `device`: the ranges ``starts[i]:starts[i] + lengths[i]``, one after the other."""
    total = int(lengths.sum())
    used = lengths > 0
    base = (starts - (np.cumsum(lengths) - lengths))[used]
    table = torch.from_numpy(np.stack([base, lengths[used]]))
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return torch.repeat_interleave(table[0], table[1], output_size=total) + torch.arange(total, device=device)


def dispatch(
    group: ExpertGroup, route: Route, hidden: Tensor, traffic: Traffic, parts: Sequence[int]
) -> tuple[Tensor, ...]:
    """The rows for this rank's slots, from [tokens, hidden] on every rank.

    Args:
        group: The ranks.
        route: Where rows go.
        hidden: [tokens, hidden], this rank's tokens.
        traffic: Counter of the bytes sent.
        parts: Rows of each part of what is received, in the order of the computation.

    Returns:
        One tensor [rows, hidden] for each part.
    """
    arrived: tuple[Tensor, ...] = _Dispatch.apply(hidden, group, route, traffic, parts)  # type: ignore[no-untyped-call]
    return arrived


def combine(
    group: ExpertGroup,
    route: Route,
    parts: Sequence[Tensor],
    weight: Tensor,
    traffic: Traffic,
    finish: Callable[[Tensor], Tensor] | None = None,
    announce: Callable[[], None] | None = None,
) -> Tensor:
    """[tokens, hidden]: results back at their sources, weighted and summed over the choices in their order.

    Args:
        group: The ranks.
        route: The route that the rows were dispatched by.
        parts: Results in the parts that `dispatch` gave.
        weight: [tokens, k], weights of the choices.
        traffic: Counter of the bytes sent.
        finish: Applied to the results at their sources, row by row, before they are weighed.
        announce: Called in the backward pass before gradients of tokens travel, once a checkpoint has run the pass
            again.
    """
    returned: Tensor = _Return.apply(group, route, traffic, *parts)  # type: ignore[no-untyped-call]
    finished = finish(returned) if finish else returned
    results: Tensor = _Weigh.apply(finished, weight, route, announce)  # type: ignore[no-untyped-call]
    return results


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, group: ExpertGroup, route: Route, traffic: Traffic, parts: Sequence[int]
    ) -> tuple[Tensor, ...]:
        ctx.call = group, route, traffic
        rows = hidden.index_select(0, route.pairs // route.choices)
        return _to_slots(rows, parts, group, route, traffic, "tokens.forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, route, traffic = ctx.call
        returned = _from_slots(gradients, group, route, traffic, "tokens.backward")
        return _sum_choices(returned, route.places), None, None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, route: Route, traffic: Traffic, *parts: Tensor) -> Tensor:
        ctx.call, ctx.parts = (group, route, traffic), [len(part) for part in parts]
        return _from_slots(parts, group, route, traffic, "tokens.forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        group, route, traffic = ctx.call
        to_parts = _to_slots(gradient, ctx.parts, group, route, traffic, "tokens.backward")
        return None, None, None, *to_parts


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, returned: Tensor, weight: Tensor, route: Route, announce: Callable[[], None] | None
    ) -> Tensor:
        ctx.route, ctx.announce = route, announce
        ctx.save_for_backward(weight, returned if ctx.needs_input_grad[1] else None)
        return _weigh_choices(returned, route.places, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, returned = ctx.saved_tensors
        if ctx.announce is not None:
            ctx.announce()
        rows = _spread_gradient(gradient, ctx.route.pairs, weight) if ctx.needs_input_grad[0] else None
        to_weight = None
        if returned is not None:
            to_weight = _weight_gradient(returned, ctx.route.places, gradient).to(weight.dtype)
        return rows, to_weight, None, None


@fused
def _sum_choices(rows: Tensor, places: Tensor) -> Tensor:
    """[tokens, hidden]: the sum of each token's rows."""
    return rows.index_select(0, places.flatten()).unflatten(0, places.shape).sum(dim=1)


@fused
def _weigh_choices(rows: Tensor, places: Tensor, weight: Tensor) -> Tensor:
    """[tokens, hidden]: the weighted sum of each token's rows, in their dtype."""
    chosen = rows.index_select(0, places.flatten()).unflatten(0, places.shape)
    return (chosen * weight.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


@fused
def _spread_gradient(gradient: Tensor, pairs: Tensor, weight: Tensor) -> Tensor:
    """[tokens * k, hidden], in the order of `pairs`: the gradient of every row of `_weigh_choices`."""
    rows = gradient.index_select(0, pairs // weight.shape[1])
    return (rows * weight.flatten().index_select(0, pairs).unsqueeze(-1)).to(gradient.dtype)


@fused
def _weight_gradient(rows: Tensor, places: Tensor, gradient: Tensor) -> Tensor:
    """[tokens, k]: the gradient of the weights of `_weigh_choices`."""
    chosen = rows.index_select(0, places.flatten()).unflatten(0, places.shape)
    return (chosen * gradient.unsqueeze(1)).sum(dim=2)


def _to_slots(
    rows: Tensor, parts: Sequence[int], group: ExpertGroup, route: Route, traffic: Traffic, purpose: str
) -> tuple[Tensor, ...]:
    """Send rows in the order of ``route.pairs``; what arrives, in the order of the computation and in parts."""
    received = group.exchange(rows, route.send, route.receive, traffic=traffic, purpose=purpose).wait()
    return tuple(received.index_select(0, arrange) for arrange in route.arrange.split(list(parts)))


def _from_slots(parts: Sequence[Tensor], group: ExpertGroup, route: Route, traffic: Traffic, purpose: str) -> Tensor:
    """Send back what `_to_slots` gave; what arrives, in the order of ``route.pairs``."""
    packed = parts[0].new_empty(len(route.arrange), parts[0].shape[1])
    for part, arrange in zip(parts, route.arrange.split([len(part) for part in parts]), strict=True):
        scatter_rows(packed, arrange, part)
    return group.exchange(packed, route.receive, route.send, traffic=traffic, purpose=purpose).wait()
