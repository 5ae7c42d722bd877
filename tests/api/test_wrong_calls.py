"""Wrong calls from Python: each is answered by one line that names what was written and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moeplan.api
import moeplan.solvers
from moeplan.solvers import ProblemError

sv: Any = moeplan.solvers  # untyped, as mypy would refuse most of these calls before they run
api: Any = moeplan.api

CLUSTER = sv.Cluster.uniform(4, 3)
DEMAND = sv.Demand.of([[5, 6, 7, 8]])
LAYOUT = sv.Layout.contiguous(4, CLUSTER.slots)
PROBLEM = sv.Problem(CLUSTER, DEMAND)
ARRAY = np.ones((2, 4), np.int64)


def job(**fields: Any) -> Any:
    return api.JobSpec(**{"cluster": CLUSTER, "layers": 1, "experts": 4, **fields})


def problem(**fields: Any) -> Any:
    return sv.Problem(**{"cluster": CLUSTER, "demand": DEMAND, **fields})


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: sv.Cluster.uniform(2.5, 3), "cluster.devices = 2.5: must be an integer; round or cast it first"),
        (lambda: sv.Cluster.uniform(4, None), "cluster.slots = None: must be an integer; round or cast it first"),
        (
            lambda: sv.Cluster.uniform(4, 3, memory_bytes=[1, 2]),
            "cluster.memory_bytes = 2 values: must have one per dev",
        ),
        (lambda: sv.Cluster.uniform(4, 3, speed=["a"] * 4), "cluster.speed = ['a', 'a', 'a', 'a']: must hold numbers"),
        (lambda: sv.Demand.of([[1, 2], [3]]), "demand.tokens = [[1, 2], [3]]: must be an array of numbers whose lists"),
        (
            lambda: sv.Demand.of([[1.5, 2]]),
            "demand.tokens = array of float64: must hold integers; round or cast it first",
        ),
        (lambda: sv.Demand.of([-1, 2]), "demand.tokens[0, 0, 0] = -1: must be at least 0"),
        (
            lambda: sv.Demand.of([2**60]),
            "demand.tokens[0, 0, 0] = 1152921504606846976: must be at most 9007199254740992",
        ),
        (lambda: sv.Demand.of(None), "demand.tokens = None: must hold numbers"),
        (
            lambda: sv.Demand.of(np.ma.masked_array([1, 2], mask=[False, True])),
            "must have a value everywhere; fill them first",
        ),
        (lambda: sv.Layout([[0, 0]], 1), "layout.slots[0] = [0, 0]: holds expert 0 twice"),
        (lambda: sv.Layout([[0, 1]], 3), "layout.experts = 3: must be at most the number of slots (2)"),
        (lambda: sv.Layout([[0, 1]], "4"), "layout.experts = '4': must be an integer; round or cast it first"),
        (
            lambda: problem(demand=ARRAY),
            "demand = array([[1, 1, 1, 1], [1, 1, 1, 1]]): must be Demand; write Demand.of",
        ),
        (lambda: problem(cluster=4), "cluster = 4: must be Cluster; write Cluster.uniform(devices, slots)"),
        (lambda: problem(current=[[0, 1]]), "current = [[0, 1]]: must be Layout; write Layout(slots, experts)"),
        (lambda: problem(expert={"weight_bytes": 3}), "expert = {'weight_bytes': 3}: must be ExpertSpec; write Expert"),
        (lambda: problem(constraints={}), "constraints = {}: must be Constraints; write Constraints(...)"),
        (
            lambda: problem(constraints=sv.Constraints(forbidden=[[9, 0]])),
            "constraints.forbidden[0] = expert 9, device 0",
        ),
        (lambda: problem(groups=3), "groups = 3: must divide the number of experts (4)"),
        (lambda: problem(max_moves=3), "max_moves = 3: needs `current`, the layout that moves start from"),
        (lambda: problem(split_rule="evne"), "split_rule = 'evne': must be one of even, lite, optimal, home, local"),
        (lambda: PROBLEM.without(7), "failed = 7: must be Iterable; write a list of devices"),
        (lambda: PROBLEM.without([7]), "failed[0] = 7: must be 0 to 3"),
        (lambda: sv.ExpertSpec(weight_bytes=-1), "expert.weight_bytes = -1: must be 0 to 2**53"),
        (lambda: sv.SolveParameters(seed=1.5), "parameters.seed = 1.5: must be an integer; round or cast it first"),
        (lambda: sv.SolveParameters(deadline_s="4"), "parameters.deadline_s = '4': must be a number"),
        (lambda: sv.solve(ARRAY), "must be Problem; write Problem(cluster, demand)"),
        (lambda: sv.solve(PROBLEM, policy="hybird"), "policy = 'hybird': did you mean hybrid?"),
        (lambda: sv.solve(PROBLEM, parameters={"seed": 1}), "parameters = {'seed': 1}: must be SolveParameters; write"),
        (
            lambda: sv.solve(PROBLEM, parameters=sv.SolveParameters(solver="gurobbi")),
            "parameters.solver = 'gurobbi': must",
        ),
        (
            lambda: sv.evaluate(PROBLEM, LAYOUT, "best"),
            "rule = 'best': must be one of even, lite, optimal, home, local",
        ),
        (lambda: sv.evaluate(PROBLEM, [[0, 1]]), "layout = [[0, 1]]: must be Layout; write Layout(slots, experts)"),
        (lambda: sv.solve_layers(PROBLEM), "must be Sequence; write a list of Problem, one per layer"),
        (
            lambda: sv.solve_layers([PROBLEM, 3]),
            "problems[1].problem = 3: must be Problem; write Problem(cluster, demand)",
        ),
        (lambda: job(layers=0), "job.layers = 0: must be 1 to 4096"),
        (lambda: job(cluster=4), "job.cluster = 4: must be Cluster; write Cluster.uniform(devices, slots)"),
        (lambda: job(replan=5), "job.replan = 5: must be Replan; write Replan(...)"),
        (lambda: job(experts=400), "cluster.slots = 12 slots: 400 experts need 388 more; add slots or devices"),
        (lambda: api.Forecast(window_steps=0), "forecast.window_steps = 0: must be 1 to 4096"),
        (
            lambda: api.Forecast(method="foo"),
            "forecast.method = 'foo': must be one of last, mean, ema, steps, scenarios",
        ),
        (lambda: api.Client("planner"), "address = 'planner': must be 'host:port' or 'unix:path'"),
        (lambda: api.Client(7433), "address = 7433: must be 'host:port' or 'unix:path'"),
    ],
)
def test_one_line_says_what_to_write(call: Callable[[], object], line: str) -> None:
    with pytest.raises(ProblemError) as refused:
        call()
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
