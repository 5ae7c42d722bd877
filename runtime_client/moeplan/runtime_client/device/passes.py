"""A pass without the host, and its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_client.derivatives import once_differentiable
from moeplan.runtime_client.device.exchange import DeviceExchange, Route
from moeplan.runtime_client.device.expert import matrix_sizes, split
from moeplan.runtime_client.device.launches import aligned
from moeplan.runtime_client.device.mailbox import Turn
from moeplan.runtime_client.device.products import Owned, Rows
from moeplan.runtime_client.group import join, mark

__all__ = ["Arrivals", "run_pass"]


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """What brings experts that are on their way.

    Called between sending tokens and computing with them, as weights that set out before would hold up the tokens on
    the links.

    Attributes:
        forward: Makes the current stream wait for the experts.
        ahead: Begins to bring those of the next layer, if there is one, beside the first product, before which the
            argument is a `mark`.
        backward: As `forward` in the backward pass, for the first tensor of experts and those on its memory.
        owned: Makes room for what this rank owns of gradients in the backward pass.
    """

    forward: Callable[[], None]
    ahead: Callable[[torch.cuda.Event | None], None] | None
    backward: Callable[[Tensor], None]
    owned: Callable[[], Owned]


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
        some, chosen, shares = (aligned(part[: exchange.max_tokens]) for part in (hidden, index, weight))
        experts = _Experts.of(exchange, parts)
        if experts.converted is not None:
            exchange.convert(experts.own, experts.converted)
        route = exchange.plan(chosen, shares, excess, len(experts.own) + exchange.spare, turn)
        tokens = some.to(exchange.dtype)
        if experts.converted is None:
            exchange.offer(route, experts.own)  # while tokens set out
        exchange.hand_out(route, tokens)
        if arrivals is not None:
            arrivals.forward()
        where, matrices = torch.empty_like(exchange.where), _matrices(exchange, experts.computed)
        scales, kept, products = [], [], exchange.products
        for nth in range(exchange.rounds):
            rows, scale = exchange.arrange(route, nth, where)
            regions = exchange.regions(route, nth)
            firsts = [rows.new_empty(len(rows[each.part]), matrices[0][0].shape[1]) for each in regions]
            arranged = mark(exchange.device)
            if nth == 0 and (exchange.spare or experts.converted is not None):
                _multiply_first(exchange, route, experts, matrices, regions, rows, firsts, arranged)
            else:
                for first, region, (inner, _) in zip(firsts, regions, matrices, strict=True):
                    products.apply(rows[region.part], inner, region.ends, first)
            if nth == 0 and arrivals is not None and arrivals.ahead is not None:
                arrivals.ahead(arranged)
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
        ctx.arrive, ctx.own = (None, None) if arrivals is None else (arrivals.backward, arrivals.owned)
        ctx.parts, ctx.computed = len(parts), len(experts.computed)
        if exchange.rounds == 1:
            tokens = tokens.new_empty(0)  # a part of them would keep them all
        ctx.save_for_backward(
            *parts, tokens, where, torch.tensor(turn.means, device="cpu"), *experts.computed, *scales, *kept
        )
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
        some = aligned(gradient[: exchange.max_tokens].to(exchange.dtype))
        exchange.hand_out(route, some)
        if ctx.arrive is not None:
            ctx.arrive(parts[0])
        apart = len(parts) > 1 and exchange.rounds == 1  # gradients of both matrices are tensors of their own
        to_flat, lent = None if apart else _room(exchange, parts), exchange.lent
        if exchange.rounds > 2:
            lent = _wide(lent)
        to_parts = [_rows(part) for part in parts] if to_flat is None else [to_flat]
        to_own, to_lent = _matrices(exchange, to_parts)[0], split(exchange.shape, lent)
        # Autograd looks at the gradients of parts in anomaly mode, and would find memory that nothing was written to.
        own_apart = apart and ctx.needs_input_grad[-1] and not torch.is_anomaly_enabled()
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
                    # Here and no sooner, as this waits for gradients of the layer after.
                    owned = _by_matrix(ctx.own(), to_parts) if own_apart and of_home else (None, None)
                    for (left, right), own, mine, borrowed in zip(factors, to_own, owned, to_lent, strict=True):
                        to = own if of_home else None, borrowed if of_lent else None
                        products.differentiate(left, right, region, *to, scale=ctx.turn.scale, more=nth > 0, owned=mine)
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
        exchange.collect(route, _beginning(to_hidden, len(some)), to_parts[0])
        shape, dtype = ctx.like
        to_choices = torch.empty(shape, dtype=dtype, device=gradient.device)
        pairs = len(some) * exchange.choices
        _beginning(to_choices, len(some)).copy_(exchange.returned_weight[:pairs].view(-1, exchange.choices))
        if to_flat is not None:
            to_parts = [*to_flat.to(parts[0].dtype).split([part.shape[1] for part in parts], dim=1)]
        return None, None, None, to_hidden, None, to_choices, *to_parts


@dataclass(frozen=True, slots=True, eq=False)
class _Experts:
    """What a pass computes with.

    Attributes:
        own: [owned, elements], those at home, in the type of the weights; of a layout's, the first of two tensors.
        converted: [owned, elements], room for them in the type that computes, where the weights have another.
        lent: [spare, elements], room for borrowed ones.
        computed: All of them, as `_matrices` has it.
    """

    own: Tensor
    converted: Tensor | None
    lent: Tensor
    computed: Sequence[Tensor]

    @classmethod
    def of(cls, exchange: DeviceExchange, parts: Sequence[Tensor]) -> _Experts:
        if len(parts) > 1:
            return cls(parts[0], None, parts[0][:0], parts)
        own, spare = aligned(parts[0]), exchange.spare
        if spare == 0 and own.dtype == exchange.dtype:
            return cls(own, None, own[:0], [own])
        if exchange.joined:
            both = own.new_empty(len(own) + spare, own.shape[1], dtype=exchange.dtype)
            converted, lent = both.split([len(own), spare])
            return cls(own, converted, lent, [both])
        lent = own.new_empty(spare, own.shape[1])
        return cls(own, None, lent, [own, lent])


def _multiply_first(
    exchange: DeviceExchange,
    route: Route,
    experts: _Experts,
    matrices: Sequence[tuple[Tensor, Tensor]],
    regions: Sequence[Rows],
    rows: Tensor,
    out: Sequence[Tensor],
    arranged: torch.cuda.Event | None,
) -> None:
    """The first products, while borrowed experts and the second matrices are still on their way beside them."""
    device, products, owned, home, away = exchange.device, exchange.products, len(experts.own), regions[0], regions[-1]
    (inner_home, _), (inner_away, _) = matrices[0], matrices[-1]
    if experts.converted is not None:
        join(device)
    products.apply(rows[home.part], inner_home[:owned], home.ends[:owned], out[0])
    exchange.step_aside(route, arranged)
    if experts.converted is not None:
        exchange.offer(route, experts.own, arranged)
    there = exchange.fetch(route, experts.lent, arranged)
    if experts.converted is not None:
        exchange.convert_rest(experts.own, experts.converted, arranged)
    if exchange.spare:
        join(device, there)
        products.apply(rows[away.part], inner_away[-exchange.spare :], away.ends, out[-1])
    join(device)


def _matrices(exchange: DeviceExchange, computed: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Both matrices of each region's experts: of one or several tensors in flat form, or of two that have one each."""
    shape = exchange.shape
    if computed[0].shape[1] == matrix_sizes(shape)[0]:
        inner, outer = computed
        return [(inner.unflatten(1, (-1, shape.hidden)), outer.unflatten(1, (shape.hidden, -1)))]
    return [split(shape, flat) for flat in computed]


def _by_matrix(owned: Owned, gradients: Sequence[Tensor]) -> list[Owned]:
    """The same for each matrix of an expert, [replicas, elements], which follow one another in it."""
    places = accumulate([part.shape[1] for part in gradients[:-1]], initial=0)
    return [replace(owned, begin=owned.begin - place) for place in places]


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
