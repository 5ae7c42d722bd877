"""From the messages of ranks to reports for the window."""

from __future__ import annotations

import numpy as np

from moeplan.api import wire
from moeplan.api.jobs import JobSpec
from moeplan.planner.jobs.window import Report
from moeplan.solvers.problem.errors import ProblemError
from moeplan.v1 import planner_pb2

__all__ = ["read_report"]


def read_report(spec: JobSpec, speaks_for: tuple[int, ...], message: planner_pb2.Statistics) -> Report:
    """Statistics of a stream that reports for `speaks_for`.

    Raises:
        ProblemError: a layer, a rank, the shape or a count is not one of the job.
    """
    if message.step < 0:
        raise ProblemError("statistics.step", message.step, "must be at least 0")
    # What the message leaves out needs no check, and nearly every message leaves out both.
    if message.layers:
        layers = np.array(message.layers, np.int64)
        _check_ids("statistics.layers", layers, spec.layers)
    else:
        layers = np.arange(spec.layers, dtype=np.int64)
    ranks = np.array(message.ranks or speaks_for, np.int64)
    if message.ranks:
        _check_ids("statistics.ranks", ranks, spec.ranks)
        if not set(message.ranks) <= set(speaks_for):
            stranger = min(set(message.ranks) - set(speaks_for))
            raise ProblemError("statistics.ranks", stranger, "must be one of the ranks that the hello reports for")
    tokens = wire.read_counts("statistics.tokens", message.tokens)
    expected = (len(layers), len(ranks), spec.experts)
    if tokens.shape != expected:
        raise ProblemError(
            "statistics.tokens.shape", list(tokens.shape), f"must be [layers, ranks, experts] = {list(expected)}"
        )
    return Report(message.step, layers, ranks, tokens)


def _check_ids(name: str, ids: np.ndarray[tuple[int], np.dtype[np.int64]], limit: int) -> None:
    if len(ids) == 1:
        if not 0 <= ids[0] < limit:
            raise ProblemError(name, int(ids[0]), f"must be 0..{limit - 1}")
        return
    outside = (ids < 0) | (ids >= limit)
    if outside.any():
        raise ProblemError(name, int(ids[outside][0]), f"must be 0..{limit - 1}")
    if len(np.unique(ids)) != len(ids):
        raise ProblemError(name, ids.tolist()[:16], "must not repeat")
