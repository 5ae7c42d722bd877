"""A pass without the host, and its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeplan.runtime_client.device.exchange import DeviceExchange, Expert, Route
from moeplan.runtime_client.device.mailbox import Turn
from moeplan.runtime_client.device.products import Rows
from moeplan.runtime_client.group import join, mark

__all__ = ["Arrivals", "matrix_sizes", "run_pass", "split"]


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """What brings experts that are on their way, called between sending tokens and computing with them.

    Not before, as weights that set out then would hold up the tokens on the links.

    Attributes:
        forward: Makes the current stream wait for the experts.
        backward: Likewise in the backward pass, for the first tensor of experts and those on its memory.
    """

    forward: Callable[[], None]
    backward: Callable[[Tensor], None]


def run_pass(
    exchange: DeviceExchange,
    turn: Turn,
    experts: Sequence[Tensor],
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    arrivals: Arrivals | None = None,
) -> Tensor:
    """Apply to each token its experts, weighted and summed, without waiting for the device.

    Args:
        exchange: What the layers share.
        turn: Which pass it is.
        experts: This rank's: those at home, [replicas, elements]; or those of a layout's slots, the two matrices of
            each apart, as `matrix_sizes` has them, whose gradients are then made apart, too.
        hidden: [tokens, hidden].
        index: int64[tokens, k].
        weight: [tokens, k].
        dtype: What to compute in, which must be that of the exchange.
        arrivals: Of a layout's experts, which need not have arrived.

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
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            output: Tensor = _Pass.apply(  # type: ignore[no-untyped-call]
                exchange, turn, arrivals, hidden, index, weight, *experts
            )
    except BaseException:  # there is no memory, say: none of it may be used again before what runs beside is over
        join(exchange.device)
        raise
    return output


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: DeviceExchange,
        turn: Turn,
        arrivals: Arrivals | None,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        *parts: Tensor,
    ) -> Tensor:
        # What there is no room for takes no part; the pass fails on all ranks.
        excess = max(len(hidden) - exchange.max_tokens, 0)
        some, chosen, shares = (_aligned(part[: exchange.max_tokens]) for part in (hidden, index, weight))
        flat, owned, spare = parts[0], len(parts[0]), exchange.spare
        lent, converting = flat[:0], False
        if len(parts) > 1:
            own, computed = None, [*parts]
        elif spare == 0 and flat.dtype == exchange.dtype:
            own = _aligned(flat)
            computed = [own]
        elif exchange.joined:
            both = flat.new_empty(owned + spare, flat.shape[1], dtype=exchange.dtype)
            converted, lent = both.split([owned, spare])
            own = _aligned(flat)
            exchange.convert(own, converted)
            converting = True
            computed = [both]
        else:
            own, lent = _aligned(flat), flat.new_empty(spare, flat.shape[1])
            computed = [own, lent]
        route = exchange.plan(chosen, shares, excess, owned + spare, turn)
        tokens = some.to(exchange.dtype)
        exchange.hand_out(route, tokens, own)
        if arrivals is not None:
            arrivals.forward()
        where, matrices = torch.empty_like(exchange.where), _matrices(exchange, computed)
        scales, kept, products = [], [], exchange.products
        for nth in range(exchange.rounds):
            rows, scale = exchange.arrange(route, nth, where)
            if converting and nth == 0:
                join(exchange.device)
            regions = exchange.regions(route, nth)
            inners = [inner for inner, _ in matrices]
            if nth == 0 and spare:
                firsts = _first_and_fetch(exchange, route, regions, rows, inners, lent)
            else:
                each = zip(regions, inners, strict=True)
                firsts = [products.apply(rows[region.part], inner, region.ends) for region, inner in each]
            results = []
            for first, region, (_, outer) in zip(firsts, regions, matrices, strict=True):
                ends = region.ends
                results.append(products.apply(exchange.activate(first, ends[-1:]), outer, ends))
            exchange.give_back(nth, where, results)
            kept += [] if nth else [*firsts, rows]
            scales.append(scale)
        exchange.meet()
        output = _rows(hidden)
        exchange.collect(route, _beginning(output, len(some)))
        ctx.exchange, ctx.route, ctx.turn, ctx.like = exchange, route, turn, (index.shape, weight.dtype)
        ctx.arrive = None if arrivals is None else arrivals.backward
        ctx.parts, ctx.computed = len(parts), len(computed)
        if exchange.rounds == 1:
            tokens = tokens.new_empty(0)  # a part of them would keep them all
        ctx.save_for_backward(*parts, tokens, where, torch.tensor(turn.means, device="cpu"), *computed, *scales, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        exchange, route = ctx.exchange, ctx.route
        products = exchange.products
        saved = _cut(ctx.saved_tensors, ctx.parts, 3, ctx.computed, exchange.rounds)
        parts, (tokens, where, means), computed, scales, kept = saved
        if int(means) != ctx.turn.means:  # saved by a checkpoint's second run
            raise RuntimeError(
                f"{ctx.turn.title}: its layout has changed between a forward pass and its backward, for which an "
                "activation checkpoint has run it again, by the new one. Set layouts once all backward passes of a "
                "step are over, or leave exchange= out"
            )
        matrices = _matrices(exchange, computed)
        exchange.meet()  # all ranks are done with what arrived in earlier passes
        rows = [kept.pop()]
        if exchange.rounds > 1:
            exchange.hand_out(route, tokens, again=True)
            rows += [exchange.arrange_again(route, nth, where) for nth in range(1, exchange.rounds)]
            exchange.meet()
        some = _aligned(gradient[: exchange.max_tokens].to(exchange.dtype))
        exchange.hand_out(route, some)
        if ctx.arrive is not None:
            ctx.arrive(parts[0])
        apart = len(parts) > 1 and exchange.rounds == 1  # gradients of both matrices are tensors of their own
        to_flat, lent = None if apart else _room(exchange, parts), exchange.lent
        if exchange.rounds > 2:
            lent = _wide(lent)
        to_parts = [_rows(part) for part in parts] if to_flat is None else [to_flat]
        to_own, to_lent = _matrices(exchange, to_parts)[0], split(exchange.shape, lent)
        with torch.autocast(gradient.device.type, enabled=False):
            for nth in range(exchange.rounds):
                arrived, to_weight = exchange.arrange_again(route, nth, where), torch.empty_like(scales[nth])
                regions, back = exchange.regions(route, nth), []
                for each, (region, (inner, outer)) in enumerate(zip(regions, matrices, strict=True)):
                    part, ends = region.part, region.ends
                    first = products.apply(rows[nth][part], inner, ends) if nth else kept[each]
                    raw = products.apply_back(arrived[part], outer, ends)
                    to_first, scaled = exchange.activate_backward(
                        raw, first, scales[nth][part], to_weight[part], ends[-1:]
                    )
                    factors = (to_first, rows[nth][part]), (arrived[part], scaled)
                    of_home, of_lent = each == 0, exchange.spare > 0 and each == len(regions) - 1
                    for (left, right), own, borrowed in zip(factors, to_own, to_lent, strict=True):
                        how = left, right, region, route.answer
                        if of_home:
                            products.differentiate(*how, own, scale=ctx.turn.scale, more=nth > 0)
                        if of_lent:
                            products.differentiate(*how, borrowed, borrowed=True, more=nth > 0)
                    back.append((to_first, inner, ends))
                is_last = nth == exchange.rounds - 1
                left = exchange.leave(lent) if is_last else None
                results = [products.apply_back(*factors) for factors in back]
                if is_last and to_flat is not None:
                    exchange.take_back(route, to_flat, ctx.turn.scale, left)
                exchange.give_back(nth, where, results, to_weight)
        exchange.end_loans()
        exchange.meet()
        to_hidden = _rows(gradient)
        exchange.collect(route, _beginning(to_hidden, len(some)))
        shape, dtype = ctx.like
        to_choices = torch.empty(shape, dtype=dtype, device=gradient.device)
        pairs = len(some) * exchange.choices
        _beginning(to_choices, len(some)).copy_(exchange.returned_weight[:pairs].view(-1, exchange.choices))
        if to_flat is not None:
            to_parts = [*to_flat.to(parts[0].dtype).split([part.shape[1] for part in parts], dim=1)]
        return None, None, None, to_hidden, None, to_choices, *to_parts


def _first_and_fetch(
    exchange: DeviceExchange,
    route: Route,
    regions: Sequence[Rows],
    rows: Tensor,
    inners: Sequence[Tensor],
    lent: Tensor,
) -> list[Tensor]:
    """The first products of each region; those of `lent` experts, which are fetched beside the others, at last."""
    home, away = regions[0], regions[-1]
    owned = len(home.ends) - (len(lent) if home is away else 0)
    firsts = [rows.new_empty(len(rows[region.part]), inners[0].shape[1]) for region in regions]
    arranged = mark(exchange.device)
    exchange.products.apply(rows[home.part], inners[0][:owned], home.ends[:owned], firsts[0])
    exchange.fetch(route, lent, arranged)
    exchange.end_loans()
    exchange.products.apply(rows[away.part], inners[-1][-len(lent) :], away.ends, firsts[-1])
    return firsts


def _matrices(exchange: DeviceExchange, computed: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Both matrices of each region's experts: of one or several tensors in flat form, or of two that have one each."""
    shape = exchange.shape
    if computed[0].shape[1] == matrix_sizes(shape)[0]:
        inner, outer = computed
        return [(inner.unflatten(1, (-1, shape.hidden)), outer.unflatten(1, (shape.hidden, -1)))]
    return [split(shape, flat) for flat in computed]


def _cut(tensors: Sequence[Tensor], *lengths: int) -> list[list[Tensor]]:
    """So many in front, so many after them, and so on, and the rest."""
    ends = [0, *accumulate(lengths), len(tensors)]
    return [[*tensors[start:end]] for start, end in pairwise(ends)]


def _room(exchange: DeviceExchange, parts: Sequence[Tensor]) -> Tensor:
    """[replicas, elements]: room for gradients of all parts.

    Sums over rounds and loans are rounded once. Sums of two are so anyway, as products give the first in this type.
    """
    room = parts[0].new_empty(len(parts[0]), sum(part.shape[1] for part in parts))
    return _wide(room) if exchange.rounds + bool(exchange.spare) > 2 else room


def _wide(like: Tensor) -> Tensor:
    """Room for numbers of this shape to be added up in."""
    return torch.empty_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _rows(like: Tensor) -> Tensor:
    """Room for rows one after the other, as kernels write them, whatever the layout of those that it is `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _beginning(rows: Tensor, count: int) -> Tensor:
    """The first rows; those behind, for which there was no room, are made not a number."""
    if count == len(rows):
        return rows
    rows[count:] = float("nan")
    return rows[:count]


def _aligned(part: Tensor) -> Tensor:
    """The same numbers one after the other, from an address that kernels can read 16 bytes at a time from."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % 16 else part


def matrix_sizes(shape: Expert) -> tuple[int, int]:
    """Elements of an expert's first and second matrix, which are one after the other in its flat form."""
    return shape.width * (2 if shape.gated else 1) * shape.hidden, shape.hidden * shape.width


def split(shape: Expert, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [replicas, width or 2 * width, hidden] and [replicas, hidden, width], views of their flat form."""
    inner, outer = flat.split(matrix_sizes(shape), dim=1)
    return inner.unflatten(1, (-1, shape.hidden)), outer.unflatten(1, (shape.hidden, -1))
