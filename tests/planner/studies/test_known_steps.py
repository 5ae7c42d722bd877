"""Steps made of a trace: what is planned with known routes is no worse than spilling alone, and EPLB is beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.repository import TRACE

from moeplan.planner.studies.known_steps import KnownVariant, study_known
from moeplan.planner.traces.trace import Trace, TraceError
from moeplan.solvers import SpillOptions

OPTIONS = SpillOptions.uniform(64, 16, 2, domain=4)
VARIANTS = [KnownVariant("order", 0, reordered=True), KnownVariant("both", 6, reordered=True)]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("trace") / "short.npz"
    with np.load(TRACE) as arrays:
        np.savez(path, counts=arrays["counts"][:13])
    return Trace.open(path)


def test_ways_to_run_the_steps_are_compared(short: Trace) -> None:
    study = study_known(short, OPTIONS, VARIANTS, 4)
    rows = {row["variant"]: row for row in study["rows"]}
    assert study["steps"] == 3
    assert list(rows)[:4] == [
        "static",
        "EPLB, loads of the step, even split",
        "EPLB, loads of the step, best split",
        "spilling alone",
    ]
    imbalance = {name: row["imbalance"] for name, row in rows.items()}
    assert imbalance["both"] < imbalance["order"] <= imbalance["spilling alone"] < imbalance["static"]
    moved = rows["both"]["moved"]
    assert moved is not None
    assert 0 < moved <= 6 / 64
    assert rows["order"]["moved"] == 0
    assert rows["static"]["moved"] is rows["spilling alone"]["moved"] is None
    assert rows["static"]["replicas"] == 0 < rows["spilling alone"]["replicas"]


def test_a_trace_without_a_whole_step_is_refused(short: Trace, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has 13 steps; a step of 14 micro-batches needs as many"):
        study_known(short, OPTIONS, VARIANTS, 14)
