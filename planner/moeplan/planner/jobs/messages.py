"""From the messages of ranks to reports for the window."""

from __future__ import annotations

import numpy as np

from moeplan.api import wire
from moeplan.api.jobs import JobSpec
from moeplan.planner.jobs.window import Cells, Report
from moeplan.solvers.problem.arrays import MAX_TOKENS, Int64
from moeplan.solvers.problem.errors import ProblemError
from moeplan.v1 import planner_pb2

__all__ = ["ReportReader"]


class ReportReader:
    """Reads the statistics of one stream.

    Args:
        spec: The stream's job.
        speaks_for: Ranks of the job that it reports for, distinct.
    """

    def __init__(self, spec: JobSpec, speaks_for: tuple[int, ...]) -> None:
        self._spec = spec
        self._layers, self._ranks = np.arange(spec.layers, dtype=np.int64), np.array(speaks_for, np.int64)
        self._all = Cells.of(self._layers, self._ranks)
        self._most = MAX_TOKENS // spec.ranks  # so that the counts of all ranks can be added

    def read(self, message: planner_pb2.Statistics) -> Report:
        """What a message says.

        Raises:
            ProblemError: a layer, a rank, the shape or a count is not one of the job.
        """
        if message.step < 0:
            raise ProblemError("statistics.step", message.step, "must be at least 0")
        # Nearly every message leaves both out.
        cells = self._cells(message) if message.layers or message.ranks else self._all
        tokens = wire.read_counts("statistics.tokens", message.tokens, self._most)
        expected = (*cells.shape, self._spec.experts)
        if tokens.shape != expected:
            raise ProblemError(
                "statistics.tokens.shape", list(tokens.shape), f"must be [layers, ranks, experts] = {list(expected)}"
            )
        return Report(message.step, cells, tokens)

    def _cells(self, message: planner_pb2.Statistics) -> Cells:
        layers, ranks = self._layers, self._ranks
        if message.layers:
            layers = np.array(message.layers, np.int64)
            _check_ids("statistics.layers", layers, self._spec.layers)
        if message.ranks:
            ranks = np.array(message.ranks, np.int64)
            _check_ids("statistics.ranks", ranks, self._spec.ranks)
            strangers = np.setdiff1d(ranks, self._ranks)
            if len(strangers):
                raise ProblemError(
                    "statistics.ranks", int(strangers[0]), "must be one of the ranks that the hello reports for"
                )
        return Cells.of(layers, ranks)


def _check_ids(name: str, ids: Int64, limit: int) -> None:
    outside = (ids < 0) | (ids >= limit)
    if outside.any():
        raise ProblemError(name, int(ids[outside][0]), f"must be 0..{limit - 1}")
    if len(np.unique(ids)) != len(ids):
        raise ProblemError(name, ids.tolist()[:16], "must not repeat")
