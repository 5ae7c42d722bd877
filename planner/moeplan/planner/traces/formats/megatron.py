"""Megatron-core's routing trace (`--moe-routing-trace-path`): a file ``router_trace_rank{r}.jsonl`` per rank.

A line is one pass of one layer: step, block (``decoder`` or ``mtp``), layer, rank and the chosen experts of every token
(``top_indices``), from which counts are made. Layers of multi-token prediction are left out. Source:
megatron/core/transformer/moe/router_trace.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.traces.formats.recording import MOST_EXPERTS, Recording, json_lines, start_of
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers.problem.arrays import Int64

__all__ = ["is_megatron", "read_megatron"]

MTP = "mtp"
FIELDS = ("step", "layer", "rank", "top_indices")


def is_megatron(path: Path) -> bool:
    """True if the content is such a trace."""
    return b'"top_indices"' in start_of(path, 1 << 16)


def read_megatron(paths: Sequence[Path]) -> Recording:
    """The steps that all files hold; files are read twice, as the number of experts is known only at their end."""
    layers: set[int] = set()
    ranks: list[int] = []
    experts, predicted, numbers = 0, 0, []
    dropped: list[str] = []
    for path in paths:
        lines: Counter[int] = Counter()
        rank = -1
        for line in json_lines(path, dropped):
            if line.get("block") == MTP:
                predicted += 1
                continue
            step, layer, rank, chosen = _parts(path, line)
            layers.add(layer)
            lines[step] += 1
            experts = max(experts, int(chosen.max(initial=-1)) + 1)
        if rank in ranks or rank < 0:
            raise TraceError(path, "is empty" if rank < 0 else f"is of rank {rank}, as another file is")
        ranks.append(rank)
        last = max(lines)
        if lines[last] < max(lines.values()):  # written until it was cut off
            del lines[last]
        numbers.append(set(lines))
    whole = set.intersection(*numbers)
    if not whole or not experts:
        raise TraceError(paths[0], "no step is in the files of all ranks")
    order = sorted(layers)
    if left := len(set.union(*numbers) - whole):
        dropped.append(f"{left} steps that not all of {len(paths)} ranks recorded")

    def steps() -> Iterator[Int64]:
        by_rank = [_steps(path, whole, order, experts) for _, path in sorted(zip(ranks, paths, strict=True))]
        for counts in zip(*by_rank, strict=True):
            yield np.stack(counts, axis=1)

    if predicted:
        dropped.append(f"{predicted} passes of multi-token prediction")
    return Recording(order, len(paths), experts, steps(), min(whole), len(whole), dropped)


def _parts(path: Path, line: dict[str, Any]) -> tuple[int, int, int, Int64]:
    try:
        step, layer, rank, chosen = (line[name] for name in FIELDS)
        flat = np.asarray(chosen).reshape(-1)
        if flat.size and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= MOST_EXPERTS):
            raise ValueError(f"experts are whole numbers from 0 and below {MOST_EXPERTS}")
        return int(step), int(layer), int(rank), flat.astype(np.int64)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise TraceError(
            path, f"a line is none of Megatron's routing trace ({type(error).__name__}: {error})"
        ) from None


def _steps(path: Path, whole: set[int], order: list[int], experts: int) -> Iterator[Int64]:
    """int64[layers, experts] of each step, micro-batches added up."""
    row = {layer: i for i, layer in enumerate(order)}
    lines = (_parts(path, line) for line in json_lines(path, []) if line.get("block") != MTP)
    last = -1
    for step, group in groupby(lines, key=lambda parts: parts[0]):
        if step <= last:
            raise TraceError(path, f"step {step} stands after step {last}; steps must be in order")
        last = step
        counts = np.zeros((len(order), experts), np.int64)
        for _, layer, _, chosen in group:
            counts[row[layer]] += np.bincount(chosen, minlength=experts)
        if step in whole:
            yield counts
