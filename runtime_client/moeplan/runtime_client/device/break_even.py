"""The price of a loan and the worth of a token, measured where a layer will run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeplan.runtime_client.device.exchange import DeviceExchange, Route
from moeplan.runtime_client.device.expert import split
from moeplan.runtime_client.device.products import Rows, tile_rows
from moeplan.runtime_client.device.routes import lend_one
from moeplan.runtime_client.group import join, mark

__all__ = ["measure_transfer"]

_ROWS, _REPLICAS = 8192, 4
"""Rows of the products that are timed, and the experts that they belong to."""

_AHEAD = 8
"""Times that the products run before what is timed: some milliseconds, in which the host launches it."""


def measure_transfer(exchange: DeviceExchange) -> float:
    """Time of lending one expert in a forward and a backward pass, in tokens that a rank computes meanwhile.

    For `DeviceExchange.charge`, so that planners lend only what earns its transfer. All ranks call it at the same time,
    outside of passes, and get the same number: the largest time of a loan over the largest of a token. It takes some
    milliseconds after the first call, which compiles kernels. What travels beside products costs little, so a part of
    it is the gradient of a borrowed expert, which is written whole however few tokens it has.

    Args:
        exchange: With spare slots.

    Raises:
        ValueError: the exchange has no spare slots.
    """
    if not exchange.spare:
        raise ValueError("exchange without spare slots: it lends nothing")
    device, elements = exchange.device, exchange.shape.elements
    shape = exchange.mailbox.shape
    experts = torch.randn(1, elements, device=device).to(exchange.dtype)
    gradient = torch.zeros(1, elements, device=device, dtype=exchange.weights)
    rank, lent = exchange.group.rank, torch.empty_like(exchange.lent)
    answers = np.zeros(shape.words, np.int32), lend_one(shape, rank, exchange.group.size)
    none, one = (Route(answer, *[answer[:0]] * 3) for answer in (torch.from_numpy(each).to(device) for each in answers))
    nowhere = torch.full_like(exchange.where, -1)

    tile = tile_rows(device)
    weights = torch.randn(_REPLICAS, elements, device=device).to(exchange.dtype)
    rows = torch.randn(_ROWS, exchange.shape.hidden, device=device).to(exchange.dtype)
    ends = torch.arange(1, _REPLICAS + 1, dtype=torch.int32, device=device) * (_ROWS // _REPLICAS)
    some = (ends * min(exchange.pairs / _ROWS, 1)).int() // tile * tile  # a rank need not have so many
    inner, _ = split(exchange.shape, weights)
    to_first = torch.randn(_ROWS, inner.shape[1], device=device).to(exchange.dtype)
    one_tile = torch.full((exchange.spare,), tile, dtype=torch.int32, device=device)
    to_inner, to_outer = split(exchange.shape, exchange.lent)

    def lend(route: Route) -> None:
        exchange.offer(route, experts)
        exchange.hand_out(route, rows[:0])
        # Beside products, as in a pass: that of experts at home, and one that does not need gradients of weights.
        ready = mark(device)
        exchange.products.apply(rows, inner, some)
        exchange.step_aside(route, ready)
        join(device, exchange.fetch(route, lent, ready))
        for left, right, out in ((to_first, rows, to_inner), (rows, to_first[:, : exchange.shape.width], to_outer)):
            borrowed = Rows(route.answer, slice(0, tile), one_tile, one_tile)
            exchange.products.differentiate(left, right, borrowed, None, out)
        left_at = exchange.leave(exchange.lent)
        exchange.products.apply_back(to_first, inner, some)
        exchange.take_back(route, gradient, 1.0, left_at)
        exchange.give_back(0, nowhere, [rows[:0]], exchange.share)
        join(device)
        exchange.meet()

    def compute() -> None:
        _products(exchange, weights, rows, ends, none.answer)

    with_loan, without, products = _medians_ms((lambda: lend(one), lambda: lend(none), compute), compute)
    times = torch.tensor([with_loan - without, products], dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=exchange.group.tokens)
    loan, products = times.tolist()
    return max(loan, 0.0) * _ROWS / products


def _products(exchange: DeviceExchange, weights: Tensor, rows: Tensor, ends: Tensor, answer: Tensor) -> None:
    """Those of a forward and a backward pass, without what is between them."""
    products, shape = exchange.products, exchange.shape
    inner, outer = split(shape, weights)
    first = products.apply(rows, inner, ends)
    active = first[:, : shape.width].contiguous()
    products.apply(active, outer, ends)
    products.apply_back(rows, outer, ends)
    to_inner, to_outer = split(shape, torch.empty_like(weights, dtype=exchange.weights))
    part = Rows(answer, slice(0, len(rows)), ends, ends)
    products.differentiate(rows, active, part, to_outer)
    products.differentiate(first, rows, part, to_inner)
    products.apply_back(first, inner, ends)


def _medians_ms(works: Sequence[Callable[[], None]], before: Callable[[], None], times: int = 9) -> list[float]:
    """Time of the device for each of `works`, which the host launches while the device is busy with what is `before`.

    They take turns, so that clocks that change and other work on the device are the same for all.
    """
    for work in works:
        for _ in range(3):
            work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times * len(works) + 1)]
    torch.cuda.synchronize()
    for _ in range(_AHEAD):
        before()
    marks[0].record()
    for turn, end in enumerate(marks[1:]):
        works[turn % len(works)]()
        end.record()
    torch.cuda.synchronize()
    took = [start.elapsed_time(end) for start, end in pairwise(marks)]
    return [statistics.median(took[turn :: len(works)]) for turn in range(len(works))]
