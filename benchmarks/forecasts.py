"""What to plan for: the next step, when a layout is planned for one forecast of it or another.

    python benchmarks/forecasts.py TRACE:DEVICES:SLOTS:MOVES:OFFSETS ... [--ways drawn] [--seeds 0,1] [--out FILE.json]

As `moeplan compare` does, a plan is made from ten steps with a limit of moves and judged on the one after them with the
best split, every 20 steps from each of the offsets (`0,5`), in every layer. A step is calm unless experts' shares of it
differ from those of the step before by far more than is usual in the trace: the first step of a new domain, which
nothing before it foretells. Where sources are many, changes between steps are drawn from the sum of all sources.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track

from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Cluster, Demand, Forecast, ForecastMethod, Widening, forecast, widened
from moeplan.solvers.problem.arrays import Int64
from result_file import write_result
from scenarios import EVERY, WINDOW, follow, integers

SHIFT = 1.75
"""A step is calm up to this many times the trace's median change from step to step."""


class Coming(Protocol):
    """From a window int64[steps, sources, experts] to the demand to plan for."""

    def __call__(self, window: Int64, *, seed: int) -> Demand: ...


@dataclass(frozen=True, slots=True)
class Way:
    """A forecast and what a plan makes of it.

    Attributes:
        coming: The forecast.
        tail: Part of its scenarios that the plan is for, the worst ones.
    """

    coming: Coming
    tail: float = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="+", metavar="TRACE:DEVICES:SLOTS:MOVES:OFFSETS")
    parser.add_argument("--ways", default="", help="only those whose names have this in them")
    parser.add_argument("--seeds", type=integers, default=(0,), help="of the draws and the search, comma-separated")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    rows = []
    for name in track([name for name in WAYS if arguments.ways in name], transient=True):
        row: dict[str, Any] = {"scenarios": name}
        for text in arguments.traces:
            row |= measured(WAYS[name], text, arguments.seeds)
        Console().print(row)
        rows.append(row)
    if arguments.out:
        write_result(arguments.out, rows)


def measured(way: Way, text: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Figures of a way on a trace, of which each name says the trace."""
    path, devices, slots, moves, offsets = text.rsplit(":", 4)
    trace, cluster = Trace.open(path), Cluster.uniform(int(devices), int(slots))
    calm = calm_steps(trace)
    found = []
    for seed in seeds:
        steps = []
        for first in integers(offsets):
            rows = follow(trace, cluster, int(moves), partial(way.coming, seed=seed), seed, first, way.tail)
            step = first + WINDOW + EVERY * (np.arange(len(rows)) // trace.layers)
            steps.append(np.column_stack([rows, calm[step]]))
        found.append(np.concatenate(steps))
    fitted, judged, moved, seconds, is_calm = np.moveaxis(np.stack(found), -1, 0)  # each [seeds, layer-steps]
    figures = {
        "layer_steps": judged.shape[1],
        "fitted": float(fitted.mean()),
        "mean": float(judged.mean()),
        "error": float(judged.mean(axis=0).std(ddof=1) / np.sqrt(judged.shape[1])),
        "calm": float(judged[is_calm > 0].mean()),
        "moved": float(np.nanmean(moved)),
        "plan_ms": float(np.median(seconds) * 1e3),
    }
    of = trace.path.stem.replace("-", "_")
    return {f"{of}_{key}": value for key, value in figures.items()}


def calm_steps(trace: Trace) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool[steps]; the change of a step is the part of its tokens that would have to go to other experts."""
    loads = np.stack([step.sum(axis=1) for step in trace.read()])
    share = loads / loads.sum(axis=-1, keepdims=True)
    change = np.abs(np.diff(share, axis=0)).sum(axis=-1).mean(axis=-1) / 2
    return np.concatenate([[True], change <= SHIFT * np.median(change)])


def drawn(**options: Any) -> Coming:
    return lambda window, *, seed: widened(window, Widening(seed=seed, **options))


def changed(**options: Any) -> Coming:
    """From changes between steps, as where there are few sources."""
    return lambda window, *, seed: widened(window.sum(axis=1, keepdims=True), Widening(seed=seed, **options))


WAYS = {
    "the newest step": Way(lambda window, *, seed: forecast(window, Forecast(ForecastMethod.LAST))),
    "mean of the ten steps": Way(
        lambda window, *, seed: forecast(window, Forecast(ForecastMethod.MEAN, window_steps=WINDOW))
    ),
    "the ten steps alike": Way(lambda window, *, seed: Demand.of(window)),
    "the last five alike": Way(lambda window, *, seed: Demand.of(window[-5:])),
    "the ten, weights by age 0.7": Way(drawn(spread=0, newest=0.3)),
    "the ten, weights by age 0.5": Way(drawn(spread=0)),
    "changes between steps, each expert by itself": Way(changed(together=0)),
    "changes between steps, all together": Way(changed(together=1)),
    "changes between steps, half and half": Way(changed()),
    "sources drawn anew (the default)": Way(drawn()),
    "the same, x 1.5": Way(drawn(spread=1.5)),
    "the same, x 2": Way(drawn(spread=2)),
    "the same, x 3": Way(drawn(spread=3)),
    "the same, weights by age 0.7": Way(drawn(newest=0.3)),
    "the same, mean of the worst half": Way(drawn(), tail=0.5),
}

if __name__ == "__main__":
    main()
