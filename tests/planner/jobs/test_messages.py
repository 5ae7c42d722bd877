"""From the messages of ranks to the window."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.api import wire
from moeplan.api.jobs import JobSpec
from moeplan.planner.jobs.messages import ReportReader
from moeplan.planner.jobs.window import Window
from moeplan.solvers import Cluster, ProblemError
from moeplan.v1 import planner_pb2

RANKS, EXPERTS = 2_048, 4
MOST = 2**53 // RANKS


def statistics(tokens: int, dtype: type) -> planner_pb2.Statistics:
    counts = wire.write_array(np.full((1, RANKS, EXPERTS), tokens, dtype))
    return planner_pb2.Statistics(sequence=1, step=0, tokens=counts)


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
@pytest.mark.parametrize("merge", [True, False])
def test_the_largest_counts_of_all_ranks_can_be_added(dtype: type, merge: bool) -> None:
    """One more would be refused: at 2^53 each, the sum of 2,048 ranks would be 0 in 64 bits, and planned for."""
    spec = JobSpec(Cluster.uniform(2, 3), layers=1, experts=EXPERTS, ranks=RANKS, merge_sources=merge)
    reader, window = ReportReader(spec, tuple(range(RANKS))), Window(spec)
    window.add(reader.read(statistics(MOST, dtype)), 0.0)
    assert window.close(0.0)
    [(_, demand)] = window.demand_after(None)
    np.testing.assert_array_equal(demand, np.full((1, EXPERTS), 2**53))
    with pytest.raises(ProblemError, match=rf"statistics.tokens\[0, 0, 0\] = {MOST + 1}.*: must be 0 to {MOST}$"):
        reader.read(statistics(MOST + 1, dtype))
