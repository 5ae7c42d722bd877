"""A pass of resident experts without the host, and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moeplan.runtime_client.device.exchange import Arrivals, DeviceExchange, Expert, Route
from moeplan.runtime_client.device.mailbox import Turn

__all__ = ["run_pass"]


def run_pass(
    exchange: DeviceExchange,
    turn: Turn,
    flat: Tensor,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Apply to each token its experts, weighted and summed, without waiting for the device.

    Args:
        exchange: What the layers share.
        turn: Which pass it is.
        flat: [owned, elements], this rank's experts.
        hidden: [tokens, hidden].
        index: int64[tokens, k].
        weight: [tokens, k].
        dtype: What to compute in, which must be that of the exchange.

    Returns:
        As `hidden`; not a number if the pass fails on any rank.

    Raises:
        ValueError: the pass has another type or another number of choices than the exchange.
        RouterError, MissedPassError, RanksDifferError, InfeasibleError, PassError: an earlier pass has failed; see
            `DeviceExchange.check`.
    """
    for name, own, other in (("dtype", exchange.dtype, dtype), ("choices", exchange.choices, index.shape[1])):
        if own != other:
            raise ValueError(f"{turn.title}: {name} = {other}: the exchange was made for {own}")
    exchange.check()
    output: Tensor = _Pass.apply(flat, hidden, weight, index, exchange, turn)  # type: ignore[no-untyped-call]
    return output


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        hidden: Tensor,
        weight: Tensor,
        index: Tensor,
        exchange: DeviceExchange,
        turn: Turn,
    ) -> Tensor:
        # What there is no room for takes no part; the pass fails on all ranks.
        excess = max(len(hidden) - exchange.max_tokens, 0)
        some, chosen, shares = (_aligned(part[: exchange.max_tokens]) for part in (hidden, index, weight))
        owned, spare = len(flat), exchange.spare
        if exchange.joined:
            experts = flat.new_empty(owned + spare, flat.shape[1], dtype=exchange.dtype)
            own, lent = experts.split([owned, spare])
            own.copy_(flat)
        else:
            own, lent = _aligned(flat), flat.new_empty(spare, flat.shape[1])
        route = exchange.plan(chosen, shares, excess, turn)
        exchange.hand_out(route, some.to(exchange.dtype), own)
        arrivals = exchange.arrange(route, lent)
        weights = [experts] if exchange.joined else [own, lent]
        firsts, results = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for region, ends, matrices in zip(*_regions(exchange, route), weights, strict=True):
                inner, outer = split(exchange.shape, matrices)
                first = functional.grouped_mm(arrivals.rows[region], inner.transpose(1, 2), offs=ends)
                active = exchange.activate(first, ends[-1:])
                results.append(functional.grouped_mm(active, outer.transpose(1, 2), offs=ends))
                firsts.append(first)
        exchange.give_back(route, arrivals.where, results)
        output = torch.full_like(hidden, float("nan")) if excess else torch.empty_like(hidden)
        exchange.collect(route, output[: len(some)])
        ctx.exchange, ctx.route, ctx.regions, ctx.shape = exchange, route, len(weights), index.shape
        ctx.save_for_backward(flat, arrivals.rows, arrivals.scale, arrivals.where, *weights, *firsts)
        ctx.weights = weight.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        exchange, route = ctx.exchange, ctx.route
        flat, rows, scale, where, *rest = ctx.saved_tensors
        weights, firsts = rest[: ctx.regions], rest[ctx.regions :]
        exchange.meet()  # all ranks are done with what arrived in earlier passes
        some = _aligned(gradient[: exchange.max_tokens].to(exchange.dtype))
        exchange.hand_out(route, some, None)
        arrived = exchange.arrange_gradients(route, Arrivals(rows, scale, where))
        to_flat, to_weight = torch.empty_like(flat), torch.empty_like(scale)
        to_inner: list[Tensor] = []
        to_outer: list[Tensor] = []
        results = []
        with torch.autocast(gradient.device.type, enabled=False):
            for region, ends, matrices, first in zip(*_regions(exchange, route), weights, firsts, strict=True):
                inner, outer = split(exchange.shape, matrices)
                raw = functional.grouped_mm(arrived[region], outer, offs=ends)
                to_first, scaled = exchange.activate_backward(raw, first, scale[region], to_weight[region], ends[-1:])
                to_outer += _replicas(exchange, functional.grouped_mm(arrived[region].T, scaled, offs=ends))
                to_inner += _replicas(exchange, functional.grouped_mm(to_first.T, rows[region], offs=ends))
                results.append(functional.grouped_mm(to_first, inner, offs=ends))
        exchange.flatten(route, to_inner[0], to_outer[0], to_flat, lent=False)
        if exchange.spare:
            exchange.flatten(route, to_inner[1], to_outer[1], exchange.lent, lent=True)
        exchange.give_back(route, where, results, to_weight, to_flat)
        to_hidden = torch.full_like(gradient, float("nan"))
        exchange.collect(route, to_hidden[: len(some)])
        to_choices = torch.zeros(ctx.shape, dtype=ctx.weights, device=gradient.device)
        to_choices[: len(some)] = exchange.returned_weight[: len(some) * exchange.choices].view(-1, exchange.choices)
        return to_flat, to_hidden, to_choices, None, None, None


def _regions(exchange: DeviceExchange, route: Route) -> tuple[list[slice], list[Tensor]]:
    """Rows that one product computes, and the ends of its experts: all, or those at home and lent ones apart."""
    if exchange.joined:
        return [slice(0, exchange.rows)], [route.ends]
    owned = exchange.mailbox.shape.owned
    regions = [slice(0, exchange.capacity), slice(exchange.capacity, exchange.rows)]
    return regions, [route.ends[:owned], route.ends[owned:]]


def _replicas(exchange: DeviceExchange, gradients: Tensor) -> Sequence[Tensor]:
    """Gradients of one product's experts, those at home apart from lent ones."""
    return gradients.split([exchange.mailbox.shape.owned, exchange.spare]) if exchange.joined else [gradients]


def _aligned(part: Tensor) -> Tensor:
    """The same numbers one after the other, from an address that kernels can read 16 bytes at a time from."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % 16 else part


def split(shape: Expert, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [replicas, width or 2 * width, hidden] and [replicas, hidden, width], views of their flat form."""
    inner_rows = shape.width * (2 if shape.gated else 1)
    inner, outer = flat.split([inner_rows * shape.hidden, shape.hidden * shape.width], dim=1)
    return inner.unflatten(1, (inner_rows, shape.hidden)), outer.unflatten(1, (shape.hidden, shape.width))
