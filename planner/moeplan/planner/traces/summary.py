"""Contents of a trace, in numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moeplan.planner.traces.trace import Trace

__all__ = ["LayerInfo", "TraceHead", "TraceInfo", "describe", "head"]

from typing import TypedDict


class LayerInfo(TypedDict):
    """One layer, averaged over steps.

    `tokens` routed per step; `hottest` expert's load over the mean; `idle` experts without a token; `change`, half the
    sum of differences between the expert shares of consecutive steps.
    """

    layer: int
    tokens: float
    hottest: float
    idle: float
    change: float


class TraceHead(TypedDict):
    """The head of a trace, known before its steps are read; None where it does not tell."""

    steps: int
    first_step: int
    layers: int
    sources: int
    experts: int
    dtype: str
    top_k: int | None
    tokens_per_rank: int | None
    layer_numbers: str | None


class TraceInfo(TraceHead):
    """A whole trace."""

    per_layer: list[LayerInfo]


def head(trace: Trace) -> TraceHead:
    """The facts that need no reading of steps."""
    numbers = trace.layer_numbers
    return TraceHead(
        steps=trace.steps,
        first_step=trace.first_step,
        layers=trace.layers,
        sources=trace.sources,
        experts=trace.experts,
        dtype=str(trace.dtype),
        top_k=trace.top_k,
        tokens_per_rank=trace.tokens_per_rank,
        layer_numbers=None if numbers is None else f"{numbers[0]} to {numbers[-1]}",
    )


def describe(trace: Trace, on_step: Callable[[], None] = lambda: None) -> TraceInfo:
    """Read the whole trace once.

    Raises:
        TraceError: the trace is damaged.
    """
    tokens, hottest, idle, change = (np.zeros(trace.layers) for _ in range(4))
    before = None
    for counts in trace.read():
        loads = counts.sum(axis=1)
        total = loads.sum(axis=1)
        share = loads / np.maximum(total, 1)[:, None]
        tokens += total
        hottest += share.max(axis=1) * trace.experts
        idle += (loads == 0).sum(axis=1)
        if before is not None:
            change += np.abs(share - before).sum(axis=1) / 2
        before = share
        on_step()
    steps = trace.steps
    return TraceInfo(
        **head(trace),
        per_layer=[
            LayerInfo(
                layer=layer,
                tokens=float(tokens[layer] / steps),
                hottest=float(hottest[layer] / steps),
                idle=float(idle[layer] / steps),
                change=float(change[layer] / max(1, steps - 1)),
            )
            for layer in range(trace.layers)
        ],
    )
