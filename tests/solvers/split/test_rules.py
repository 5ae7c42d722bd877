"""Splits: exact optima, whole tokens, certificates, traffic."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ortools.graph.python import max_flow
from scipy.optimize import linprog
from tests.support.instances import best_split_by_linear_program, problems, random_layout

from moeplan.solvers import Cluster, Demand, ExpertSpec, Layout, Link, Problem, ProblemError, evaluate
from moeplan.solvers.plan.cost import LAER, STEP, cost, traffic
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.clock import NEVER
from moeplan.solvers.problem.split_rules import SplitRule
from moeplan.solvers.split.coverage import WHOLE, covered_split, domains, tokens_by_domain
from moeplan.solvers.split.flow import augment, host_table, optimal_quota
from moeplan.solvers.split.rules import fabric_of, local, routes, split


def fits(layout: Layout, loads: np.ndarray, caps: np.ndarray) -> bool:
    """Whether whole tokens fit into device caps, by OR-Tools' max-flow."""
    flow = max_flow.SimpleMaxFlow()
    source, sink = layout.experts + layout.devices, layout.experts + layout.devices + 1
    for expert, load in enumerate(loads):
        flow.add_arc_with_capacity(source, expert, int(load))
    for device, expert in np.argwhere(layout.placed):
        flow.add_arc_with_capacity(int(expert), layout.experts + int(device), int(loads[expert]))
    for device, cap in enumerate(caps):
        flow.add_arc_with_capacity(layout.experts + device, sink, int(cap))
    assert flow.solve(source, sink) == flow.OPTIMAL
    return bool(flow.optimal_flow() == loads.sum())


@settings(max_examples=150)
@given(problems(), st.integers(0, 2**32 - 1))
def test_optimal_split_is_optimal(problem: Problem, seed: int) -> None:
    layout = random_layout(problem, seed)
    speed = problem.cluster.speed
    quota, tight = optimal_quota(layout.slots, problem.loads, speed)
    for loads, shares, inside in zip(problem.loads, quota, tight, strict=True):
        for expert in range(problem.experts):
            assert shares[layout.slots == expert].sum() == loads[expert]
        assert not shares[layout.slots < 0].any()
        level = (shares.sum(axis=1) / speed).max()
        # No whole-token split is better: max-flow with every cap just below the level.
        if loads.sum():
            assert not fits(layout, loads, np.ceil(level * speed - 1e-9) - 1)
        # Nor is any fractional one, beyond rounding.
        fractional = best_split_by_linear_program(layout, loads, speed)
        assert fractional <= level * (1 + 1e-9) + 1e-9
        assert level <= fractional + 1 / speed.min() + 1e-6
        # The tight set carries every token of the experts hosted only there.
        captive = [e for e in range(problem.experts) if inside[layout.placed[:, e]].all()]
        assert loads[captive].sum() >= shares[inside].sum()


class Counted:
    """A table that counts how often it is read."""

    def __init__(self, table: Int32) -> None:
        self.table, self.reads = table, 0

    def __getitem__(self, at: tuple[int, int]) -> int:
        self.reads += 1
        return int(self.table[at])


def test_a_search_for_a_path_looks_at_each_replica_once() -> None:
    """Where it did so for each device that holds the expert, it took the square of their number."""
    devices, width = 16, 3
    slots = np.full((devices + 1, width), -1, np.int32)
    slots[:devices] = np.arange(width)  # every device holds three experts, but for one that has next to nothing to do
    slots[devices, 0] = width
    host, count = host_table(slots.reshape(-1), width + 1, devices)
    quota = np.where(slots < 0, 0, 50).reshape(-1)
    quota[0], quota[-width] = 90, 1
    load = quota.reshape(slots.shape).sum(axis=1)
    seen = np.zeros(width + 2, np.int64)
    scratch = np.empty((3, devices + 1), np.int32), seen, np.empty(devices + 1, np.bool_)
    kernel: Any = augment
    hosts = Counted(host)
    level = kernel.py_func(slots.reshape(-1), hosts, count, width, np.ones(devices + 1), quota, load, *scratch)
    assert level == 153  # 2,440 tokens on 16 devices
    searches = int(seen[-1])
    assert searches > 1
    assert hosts.reads <= searches * (devices * width + devices)


@settings(max_examples=100)
@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from(SplitRule))
def test_every_rule_conserves_tokens(problem: Problem, seed: int, rule: SplitRule) -> None:
    layout = random_layout(problem, seed)
    known = problem.demand.sources > 1 or problem.devices == 1
    if rule.needs_sources and not known:
        with pytest.raises(ProblemError, match=r"demand\.sources"):
            split(problem, layout, rule)
        return
    chosen = split(problem, layout, rule)
    assert (chosen.quota >= 0).all()
    for expert in range(problem.experts):
        of_expert = chosen.quota[:, layout.slots == expert].sum(axis=1)
        assert (of_expert == problem.loads[:, expert]).all()
    if not known:
        return
    sent = routes(problem, layout, chosen)
    hosts = layout.hosts
    assert (sent >= 0).all()
    assert (sent.sum(axis=1) == chosen.quota[:, hosts.device, hosts.slot]).all()
    for expert in range(problem.experts):
        mine = sent[:, :, hosts.start[expert] : hosts.start[expert + 1]].sum(axis=2)
        assert (mine == problem.demand.tokens[:, :, expert]).all()


def test_even_shares_differ_by_at_most_one_token() -> None:
    layout = Layout(np.array([[0, 1], [0, 1], [0, 2]]), 3)
    problem = Problem(Cluster.uniform(3, 2), Demand.of([[10, 5, 3]]))
    quota = split(problem, layout, SplitRule.EVEN).quota[0]
    assert sorted(quota[layout.slots == 0].tolist()) == [3, 3, 4]
    assert sorted(quota[layout.slots == 1].tolist()) == [2, 3]


def test_lite_stays_in_the_source_s_node() -> None:
    # Nodes {0, 1} and {2, 3}; expert 0 on devices 0, 1, 2; expert 1 only on device 3.
    layout = Layout(np.array([[0], [0], [0], [1]]), 2)
    tokens = np.array([[8, 4], [8, 0], [6, 0], [2, 2]])
    problem = Problem(Cluster.uniform(4, 1, nodes=2), Demand.of(tokens))
    sent = routes(problem, layout, split(problem, layout, SplitRule.LITE))[0]
    assert sent.tolist() == [[4, 4, 0, 4], [4, 4, 0, 0], [0, 0, 6, 0], [0, 0, 2, 2]]


@settings(max_examples=60)
@given(problems(max_devices=5, max_experts=6), st.integers(0, 2**32 - 1))
def test_local_is_never_slower_than_allowed_nor_farther_than_optimal(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout = random_layout(problem, seed)
    best = split(problem, layout, SplitRule.OPTIMAL)
    near = local(fabric_of(problem), layout, problem.demand.tokens, 0.1)
    speed = problem.cluster.speed
    limit = (best.device_loads() / speed).max(axis=1) * 1.1
    assert ((near.device_loads() / speed).max(axis=1) <= limit * (1 + 1e-9)).all()
    node = problem.cluster.node
    price = np.where(node[:, None] == node, 125, 1000) * (1 - np.eye(problem.devices, dtype=int))
    spent = [(traffic(problem, layout, choice) * price).sum() for choice in (near, best)]
    assert spent[0] <= spent[1]


@settings(max_examples=100)
@given(problems(max_devices=5, max_experts=6), st.integers(0, 2**32 - 1), st.sampled_from([10.0, 100.0, np.inf]))
def test_local_sends_as_little_as_a_linear_program(problem: Problem, seed: int, inside: float) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    problem = replace(problem, cluster=replace(problem.cluster, intra_node=Link(inside), inter_node=Link(10.0)))
    layout, speed = random_layout(problem, seed), problem.cluster.speed
    best = split(problem, layout, SplitRule.OPTIMAL).device_loads() / speed
    caps = np.floor(best.max(axis=1, keepdims=True) * 1.1 * speed * (1 + 1e-12))
    near = local(fabric_of(problem), layout, problem.demand.tokens, 0.1)
    assert (near.device_loads() <= caps).all()
    hosts, node = layout.hosts, problem.cluster.node
    source, device = problem.source_device[:, None], hosts.device
    price = np.where(node[source] == node[device], 10.0 / inside, 1.0) * (source != device)
    expert = np.repeat(np.arange(problem.experts), layout.replicas)
    sends = np.stack([expert == e for e in range(problem.experts)]).astype(float)
    of_each = np.kron(np.eye(problem.demand.sources), sends)
    on_each = np.tile((device == np.arange(problem.devices)[:, None]).astype(float), problem.demand.sources)
    for s, sent in enumerate(routes(problem, layout, near)):
        tokens = problem.demand.tokens[s].reshape(-1)
        least = linprog(price.reshape(-1), A_ub=on_each, b_ub=caps[s], A_eq=of_each, b_eq=tokens)
        assert least.fun is not None
        assert (sent * price).sum() <= least.fun * (1 + 1e-6) + 1e-6


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1))
def test_local_that_is_late_is_a_split_within_its_tolerance(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout, speed = random_layout(problem, seed), problem.cluster.speed
    late = split(problem, layout, SplitRule.LOCAL, end=0.0)
    assert late.rule is SplitRule.LOCAL
    for expert in range(problem.experts):
        assert (late.quota[:, layout.slots == expert].sum(axis=1) == problem.loads[:, expert]).all()
    best = (split(problem, layout, SplitRule.OPTIMAL).device_loads() / speed).max(axis=1)
    most = np.ceil(best * 1.01 * speed.max()) / speed.max()
    assert ((late.device_loads() / speed).max(axis=1) <= most * (1 + 1e-12)).all()


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1))
def test_home_divides_no_scenario_when_it_is_late(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout, cluster = random_layout(problem, seed), problem.cluster
    late = split(problem, layout, SplitRule.HOME, end=0.0)
    assert (late.quota == split(problem, layout, SplitRule.OPTIMAL).quota).all()
    by_domain = tokens_by_domain(cluster, problem.demand.tokens, problem.source_device)
    stay = np.full(problem.demand.scenarios, WHOLE)
    for end, divided in ((0.0, 0), (NEVER, problem.demand.scenarios)):
        assert covered_split(layout.slots, by_domain, cluster.speed, domains(cluster), stay, end)[1] == divided


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1))
def test_lite_divides_evenly_on_the_node_of_the_source_or_over_all_replicas(problem: Problem, seed: int) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout, node = random_layout(problem, seed), problem.cluster.node
    chosen = split(problem, layout, SplitRule.LITE)
    assert chosen.routes is not None
    hosts = layout.hosts
    assert (chosen.quota[:, hosts.device, hosts.slot] == chosen.routes.sum(axis=1)).all()
    for source, expert in itertools.product(range(problem.demand.sources), range(problem.experts)):
        of_expert = slice(hosts.start[expert], hosts.start[expert + 1])
        near = node[hosts.device[of_expert]] == node[problem.source_device[source]]
        asked, sent = problem.demand.tokens[:, source, expert], chosen.routes[:, source, of_expert]
        used = sent[:, near] if near.any() else sent
        assert (used.sum(axis=1) == asked).all()
        assert (used.max(axis=1) - used.min(axis=1) <= 1).all()


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from(SplitRule))
def test_traffic_is_that_of_the_routes(problem: Problem, seed: int, rule: SplitRule) -> None:
    assume(problem.demand.sources > 1 or problem.devices == 1)
    layout = random_layout(problem, seed)
    chosen = split(problem, layout, rule)
    between = np.zeros((problem.demand.scenarios, problem.devices, problem.devices), np.int64)
    pairs = problem.source_device[:, None], layout.hosts.device
    for s, sent in enumerate(routes(problem, layout, chosen)):
        np.add.at(between[s], pairs, sent)
    assert (traffic(problem, layout, chosen) == between).all()


def test_cost_by_hand() -> None:
    # Device 0 computes 30 of its own tokens and 10 of device 1; device 1 in another node computes 20 of its own.
    layout = Layout(np.array([[0], [1]]), 2)
    cluster = Cluster.uniform(2, 1, nodes=2, speed=[2.0, 1.0], inter_node=Link(bytes_per_s=1000.0, latency_s=0.5))
    spec = ExpertSpec(token_bytes=100, seconds_per_token=0.1)
    problem = Problem(cluster, Demand.of([[30, 0], [10, 20]]), spec)
    plan = evaluate(problem, layout, "optimal", model=STEP)
    assert plan.cost.compute_s.tolist() == pytest.approx([3 * 0.1 * 20])
    assert plan.cost.communication_s.tolist() == pytest.approx([4 * (0.5 + 10 * 100 / 1000)])
    # LAER adds the devices up: both wait for the same message, one as receiver and one as sender.
    summed = cost(problem, layout, plan.split, LAER)
    assert summed.communication_s.tolist() == pytest.approx([4 * 2 * 1.5])
    assert plan.imbalance.tolist() == pytest.approx([20 / (60 / 3)])
