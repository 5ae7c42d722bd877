"""Tokens to experts and back: what the routers chose, the route of a micro-batch, dispatch and combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeplan.runtime_client.errors import LayoutMismatchError, RouterError
from moeplan.runtime_client.group import ExpertGroup, Traffic
from moeplan.runtime_client.widening import widen
from moeplan.solvers.arrays import Int32, Int64

__all__ = ["Route", "combine", "dispatch", "find_route", "gather_counts"]


def gather_counts(group: ExpertGroup, index: Tensor, weight: Tensor, experts: int, fingerprint: int = 0) -> Int64:
    """Tokens of each expert from each rank: one collective and one copy to the host.

    What is wrong on one rank travels with the counts, so all ranks raise together instead of waiting for it.

    Args:
        group: The ranks.
        index: int64[tokens, k], experts chosen for each token of this rank.
        weight: [tokens, k], weights of the choices.
        experts: Number of experts.
        fingerprint: Number that must be equal on all ranks, for instance of the layout.

    Returns:
        int64[size, experts].

    Raises:
        RouterError: a rank chose an expert out of range, or a weight is not finite.
        LayoutMismatchError: the fingerprints differ.
    """
    chosen = index.reshape(-1).clamp(-1, experts)  # what is out of range counts for one of the two ends
    row = torch.zeros(experts + 4, dtype=torch.int64, device=index.device)
    row[: experts + 2].scatter_add_(0, chosen + 1, torch.ones_like(chosen))
    weight = weight.detach()
    row[experts + 2] = (weight - weight).ne(0).sum()  # infinite or not a number: the difference is not a number
    if fingerprint:
        row[experts + 3] = fingerprint
    table: Int64 = group.gather_rows(row).cpu().numpy()
    for rank, (below, above, not_finite) in enumerate(table[:, [0, experts + 1, experts + 2]]):
        outside = below + above
        if outside or not_finite:
            raise RouterError(
                f"router output of rank {rank}: {outside} choices outside 0..{experts - 1} and "
                f"{not_finite} weights that are not finite; the model has diverged or its inputs are wrong"
            )
    prints = table[:, experts + 3]
    if (prints != prints[0]).any():
        differing = np.flatnonzero(prints != prints[0]).tolist()
        raise LayoutMismatchError(f"layout of ranks {differing} differs from rank 0's; set the same on all ranks")
    return np.ascontiguousarray(table[:, 1 : experts + 1])


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """Where this rank's (token, choice) pairs go in one micro-batch, and how arriving rows are ordered.

    Attributes:
        choices: k, experts per token.
        send: Rows for each rank.
        receive: Rows from each rank.
        pairs: int64[tokens * k], the pair at each position of what is sent.
        arrange: int64[received], position among the received rows of each row of the computation, which is
            ordered by slot and then by source.
        rows: Rows of each slot of this rank, empty slots included.
    """

    choices: int
    send: list[int]
    receive: list[int]
    pairs: Tensor
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
    return Route(
        choices=index.shape[1],
        send=send.sum(axis=1).tolist(),
        receive=receive.sum(axis=1).tolist(),
        pairs=by_expert[_ranges(starts, send.ravel(), index.device)],
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


def combine(group: ExpertGroup, route: Route, parts: Sequence[Tensor], weight: Tensor, traffic: Traffic) -> Tensor:
    """[tokens, hidden]: results back at their sources, weighted and summed over the choices in their order.

    Args:
        group: The ranks.
        route: The route that the rows were dispatched by.
        parts: Results in the parts that `dispatch` gave.
        weight: [tokens, k], weights of the choices.
        traffic: Counter of the bytes sent.
    """
    pairs: Tensor = _Return.apply(group, route, traffic, *parts)  # type: ignore[no-untyped-call]
    return (pairs.view(*weight.shape, pairs.shape[1]) * weight.unsqueeze(-1)).sum(dim=1).to(pairs.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, group: ExpertGroup, route: Route, traffic: Traffic, parts: Sequence[int]
    ) -> tuple[Tensor, ...]:
        ctx.call = group, route, traffic
        return _to_slots(hidden, route.pairs // route.choices, parts, group, route, traffic, "tokens.forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, route, traffic = ctx.call
        pairs = _to_pairs(gradients, group, route, traffic, "tokens.backward")
        tokens = len(pairs) // route.choices
        return pairs.view(tokens, route.choices, pairs.shape[1]).sum(dim=1), None, None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, route: Route, traffic: Traffic, *parts: Tensor) -> Tensor:
        ctx.call, ctx.parts = (group, route, traffic), [len(part) for part in parts]
        return _to_pairs(parts, group, route, traffic, "tokens.forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        group, route, traffic = ctx.call
        rows = _to_slots(gradient, route.pairs, ctx.parts, group, route, traffic, "tokens.backward")
        return None, None, None, *rows


def _to_slots(
    source: Tensor,
    take: Tensor,
    parts: Sequence[int],
    group: ExpertGroup,
    route: Route,
    traffic: Traffic,
    purpose: str,
) -> tuple[Tensor, ...]:
    rows = source.index_select(0, take)
    received = group.exchange(rows, route.send, route.receive, traffic=traffic, purpose=purpose).wait()
    return tuple(received.index_select(0, arrange) for arrange in route.arrange.split(list(parts)))


def _to_pairs(parts: Sequence[Tensor], group: ExpertGroup, route: Route, traffic: Traffic, purpose: str) -> Tensor:
    # Both scatters are permutations: no two rows meet, so the result does not depend on the order of writes.
    packed = parts[0].new_empty(len(route.arrange), parts[0].shape[1])
    for part, arrange in zip(parts, route.arrange.split([len(part) for part in parts]), strict=True):
        _scatter(packed, arrange, part)
    received = group.exchange(packed, route.receive, route.send, traffic=traffic, purpose=purpose).wait()
    pairs = torch.empty_like(received)
    _scatter(pairs, route.pairs, received)
    return pairs


def _scatter(out: Tensor, positions: Tensor, rows: Tensor) -> None:
    """``out[positions] = rows``."""
    wide_out, wide_rows = widen(out, rows.contiguous())
    wide_out.index_copy_(0, positions, wide_rows)
