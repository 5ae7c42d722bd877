"""slime's rollouts (`--save-debug-rollout-data`, `--dump-details`), with `--use-rollout-routing-replay`.

A file ``{rollout_id}.pt`` holds ``samples``, each with ``rollout_routed_experts``, int[tokens - 1, decoder layers, k].
A rollout is a step of the trace, with one source: which rank trains a sample is decided later. Dense layers name the
same expert k times. Source: slime 624b824, observability/rollout_data_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.traces.formats.recording import Recording, load_torch, start_of, whole_numbers
from moeplan.planner.traces.trace import TraceError
from moeplan.solvers import ProblemError, count_choices
from moeplan.solvers.problem.arrays import Int32, Int64

__all__ = ["is_slime", "read_slime"]

ROUTES = "rollout_routed_experts"


def is_slime(path: Path) -> bool:
    """True if the file holds such a rollout."""
    head = start_of(path)
    return head.startswith(b"PK") and b"rollout_id" in head and b"samples" in head  # as torch.save writes them


def read_slime(paths: Sequence[Path]) -> Recording:
    """A step of each file, in the order of rollouts; files are read twice, as the number of experts is known last."""
    experts, lasts = 0, []
    used: set[int] = set()
    every = -1  # layers, routed or not
    for path in paths:
        number, samples = _rollout(path)
        lasts.append((number, path))
        experts = max(experts, *(int(sample.max(initial=-1)) + 1 for sample in samples))
        counts = _counts(path, samples, max(experts, 1))
        every = counts.shape[1] if every < 0 else every
        if counts.shape[1] != every:
            raise TraceError(path, f"must have {every} layers, as {paths[0]}", ROUTES, counts.shape[1])
        used |= set(np.flatnonzero(counts.sum(axis=(0, 2))).tolist())
    ordered = sorted(lasts)
    if not used:
        raise TraceError(paths[0], "no layer has a route")
    layers = sorted(used)

    def steps() -> Iterator[Int64]:
        for _, path in ordered:
            counts = _counts(path, _rollout(path)[1], experts).sum(axis=0, dtype=np.int64)
            yield counts[layers, np.newaxis]

    return Recording(layers, 1, experts, steps(), first_step=ordered[0][0], total=len(ordered))


def _rollout(path: Path) -> tuple[int, list[Any]]:
    """Its number, and the routes of its samples."""
    content = load_torch(path)
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list) or not samples:
        raise TraceError(path, "holds no samples of a rollout")
    routes = [sample.get(ROUTES) for sample in samples if isinstance(sample, dict)]
    if len(routes) < len(samples) or any(each is None for each in routes):
        raise TraceError(path, f"has samples without {ROUTES}; run slime with --use-rollout-routing-replay")
    number = content.get("rollout_id", 0)
    return number if isinstance(number, int) else 0, [whole_numbers(path, ROUTES, each, 3) for each in routes]


def _counts(path: Path, samples: list[Any], experts: int) -> Int32:
    try:
        return count_choices(samples, experts)
    except ProblemError as error:
        raise TraceError(path, error.reason, error.field, error.value) from None
