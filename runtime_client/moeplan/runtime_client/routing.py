"""Tokens to experts and back: what the routers chose, the route of a micro-batch, dispatch and combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeplan.runtime_client.errors import LayoutMismatchError, RouterError
from moeplan.runtime_client.group import ExpertGroup, Traffic
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
    chosen = index.reshape(-1)
    valid = (chosen >= 0) & (chosen < experts)
    row = torch.zeros(experts + 3, dtype=torch.int64, device=index.device)
    row.scatter_add_(0, torch.where(valid, chosen, experts), torch.ones_like(chosen))
    row[experts + 1] = (~torch.isfinite(weight.detach())).sum()
    row[experts + 2] = fingerprint
    table: Int64 = group.gather_rows(row).cpu().numpy()
    for rank, (outside, not_finite) in enumerate(table[:, experts : experts + 2]):
        if outside or not_finite:
            raise RouterError(
                f"router output of rank {rank}: {outside} choices outside 0..{experts - 1} and "
                f"{not_finite} weights that are not finite; the model has diverged or its inputs are wrong"
            )
    if (table[:, experts + 2] != table[0, experts + 2]).any():
        differing = np.flatnonzero(table[:, experts + 2] != table[0, experts + 2]).tolist()
        raise LayoutMismatchError(f"layout of ranks {differing} differs from rank 0's; set the same on all ranks")
    return np.ascontiguousarray(table[:, :experts])


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


def dispatch(group: ExpertGroup, route: Route, hidden: Tensor, traffic: Traffic) -> Tensor:
    """[received, hidden]: the rows for this rank's slots, from [tokens, hidden] on every rank."""
    rows: Tensor = _Dispatch.apply(hidden, group, route, traffic)  # type: ignore[no-untyped-call]
    return rows


def combine(group: ExpertGroup, route: Route, rows: Tensor, weight: Tensor, traffic: Traffic) -> Tensor:
    """[tokens, hidden]: results back at their sources, weighted and summed over the choices in their order.

    Args:
        group: The ranks.
        route: The route that `rows` were dispatched by.
        rows: [received, hidden], results in the order of `dispatch`.
        weight: [tokens, k], weights of the choices.
        traffic: Counter of the bytes sent.
    """
    pairs: Tensor = _Return.apply(rows, group, route, traffic)  # type: ignore[no-untyped-call]
    return (pairs.view(*weight.shape, rows.shape[1]) * weight.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ExpertGroup, route: Route, traffic: Traffic) -> Tensor:
        ctx.call = group, route, traffic
        return _to_slots(hidden, route.pairs // route.choices, group, route, traffic, "tokens.forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        group, route, traffic = ctx.call
        pairs = _to_pairs(gradient, group, route, traffic, "tokens.backward")
        tokens = len(pairs) // route.choices
        return pairs.view(tokens, route.choices, pairs.shape[1]).sum(dim=1), None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ExpertGroup, route: Route, traffic: Traffic) -> Tensor:
        ctx.call = group, route, traffic
        return _to_pairs(rows, group, route, traffic, "tokens.forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        group, route, traffic = ctx.call
        return _to_slots(gradient, route.pairs, group, route, traffic, "tokens.backward"), None, None, None


def _to_slots(source: Tensor, take: Tensor, group: ExpertGroup, route: Route, traffic: Traffic, purpose: str) -> Tensor:
    rows = source.index_select(0, take)
    transfer = group.exchange(rows, route.send, route.receive, traffic=traffic, purpose=purpose)
    return transfer.wait().index_select(0, route.arrange)


def _to_pairs(rows: Tensor, group: ExpertGroup, route: Route, traffic: Traffic, purpose: str) -> Tensor:
    # Both scatters are permutations: no two rows meet, so the result does not depend on the order of writes.
    packed = torch.empty_like(rows, memory_format=torch.contiguous_format).index_copy_(0, route.arrange, rows)
    transfer = group.exchange(packed, route.receive, route.send, traffic=traffic, purpose=purpose)
    received = transfer.wait()
    return torch.empty_like(received).index_copy_(0, route.pairs, received)
