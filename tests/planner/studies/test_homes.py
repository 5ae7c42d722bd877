"""Homes that follow a trace: the figures that the study reports."""

from __future__ import annotations

import json

from tests.support.repository import TRACE

from moeplan.planner.studies.homes import Variant, follow_homes
from moeplan.planner.traces.trace import Trace
from moeplan.solvers import Forecast, SpillOptions


def test_homes_that_follow_the_load_leave_less_than_those_that_stay() -> None:
    trace = Trace.open(TRACE)
    options = SpillOptions.uniform(trace.experts, 16, 2, domain=4)
    window = trace.steps - 6
    steps = []
    variants = [Variant("fixed", 0), Variant("followed", 6, 0.1), Variant("floor", None, foresight=True)]
    study = follow_homes(trace, options, variants, Forecast(window_steps=window), on_step=lambda: steps.append(1))
    assert json.loads(json.dumps(study)) == study
    assert len(steps) == 6
    assert study["samples"] == 6 * trace.layers
    fixed, followed, floor = study["variants"]
    assert fixed["moved"] == 0
    assert 0 < followed["moved_most"] <= 6 / trace.experts
    assert 1 <= study["one_domain"] < floor["imbalance"] < followed["imbalance"] < fixed["imbalance"]
    for row in study["variants"]:
        assert 1 <= row["domains_alone"] <= row["imbalance"]
        assert row["standard_error"] is not None
