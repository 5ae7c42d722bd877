"""Random problems and brute force, shared by tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import highspy
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from moeplan.solvers import Cluster, Constraints, Demand, InfeasibleError, Layout, Problem, ProblemError, evaluate
from moeplan.solvers.problem.arrays import Float64, Int32, Int64
from moeplan.solvers.problem.limits import broken


@st.composite
def problems(draw: st.DrawFn, max_devices: int = 6, max_experts: int = 10, speeds: bool = True) -> Problem:
    """Problems of every shape: unequal slots and speeds, several nodes, zero loads, several scenarios."""
    devices = draw(st.integers(1, max_devices))
    experts = draw(st.integers(1, max_experts))
    slots = draw(st.lists(st.integers(0, 5), min_size=devices, max_size=devices))
    while sum(min(s, experts) for s in slots) < experts:
        slots = [s + 1 for s in slots]
    nodes = draw(st.integers(1, devices))
    unequal = speeds and draw(st.booleans())
    speed = [draw(st.sampled_from([0.5, 1.0, 1.5, 3.0])) if unequal else 1.0 for _ in range(devices)]
    sources = draw(st.sampled_from([1, devices, 2 * devices]))
    scenarios = draw(st.integers(1, 3))
    tokens = np.array(
        draw(
            st.lists(
                st.sampled_from([0, 1, 2, 7, 50, 1000]),
                min_size=scenarios * sources * experts,
                max_size=scenarios * sources * experts,
            )
        )
    )
    cluster = Cluster(
        slots=np.array(slots),
        node=(np.arange(devices) * nodes // devices).astype(np.int32),
        speed=np.array(speed),
    )
    return Problem(cluster, Demand.of(tokens.reshape(scenarios, sources, experts)))


@st.composite
def small_problems(draw: st.DrawFn, scenarios: int = 1) -> Problem:
    """Problems of which every layout can be looked at, of up to so many scenarios."""
    devices, experts = draw(st.sampled_from([(2, 3), (2, 4), (2, 5), (2, 6), (3, 3), (3, 4), (3, 5), (4, 5)]))
    capacity = draw(st.lists(st.integers(1, 2 if devices == 4 else 3), min_size=devices, max_size=devices))
    while sum(min(c, experts) for c in capacity) < experts:
        capacity = [c + 1 for c in capacity]
    speed = draw(st.sampled_from([[1.0] * devices, [1.0, 2.0, 1.5, 0.5][:devices]]))
    count = draw(st.integers(1, scenarios))
    size = count * experts
    tokens = draw(st.lists(st.sampled_from([0, 1, 3, 10, 100, 101, 997]), min_size=size, max_size=size))
    cluster = Cluster(np.array(capacity), np.zeros(devices, int), np.array(speed))
    return Problem(cluster, Demand.of(np.array(tokens).reshape(count, 1, experts)))


@st.composite
def limited_problems(draw: st.DrawFn) -> Problem:
    """Problems of one scenario of which every layout can be looked at, with up to three kinds of limits."""
    problem = draw(small_problems())
    devices, experts = problem.devices, problem.experts
    pairs = st.tuples(st.integers(0, experts - 1), st.integers(0, devices - 1))
    kinds = draw(st.sets(st.sampled_from(["domain", "groups", "min_tokens", "forbidden", "moves"]), max_size=3))
    limits: dict[str, object] = {}
    if "domain" in kinds:
        limits["domain"] = np.arange(devices) % 2
    if "min_tokens" in kinds:
        limits["min_tokens"] = draw(st.integers(1, 100))
    if "forbidden" in kinds:
        limits["forbidden"] = draw(st.lists(pairs, min_size=1, max_size=2))
    sizes = [groups for groups in range(2, experts + 1) if experts % groups == 0]
    groups = 1
    if "groups" in kinds and "domain" not in kinds:
        groups = draw(st.sampled_from(sizes))
        limits["groups_on_node"] = True
    cluster = replace(problem.cluster, node=np.arange(devices, dtype=np.int32) % 2)
    try:
        problem = replace(problem, cluster=cluster, groups=groups, constraints=Constraints(**limits))  # type: ignore[arg-type]
        if "moves" in kinds:
            moves = draw(st.integers(0, 3))
            return replace(problem, current=random_layout(problem, draw(st.integers(0, 99))), max_moves=moves)
    except ProblemError:  # the draw contradicts itself
        assume(False)
    return problem


def random_layout(problem: Problem, seed: int) -> Layout:
    """A valid layout: every expert somewhere, then random replicas in the slots that are left."""
    rng = np.random.default_rng(seed)
    slots = np.full((problem.devices, problem.cluster.max_slots), -1, np.int32)
    used = np.zeros(problem.devices, int)
    for expert in rng.permutation(problem.experts):
        device = rng.choice(np.flatnonzero(used < problem.capacity))
        slots[device, used[device]] = expert
        used[device] += 1
    for device in range(problem.devices):
        absent = np.setdiff1d(np.arange(problem.experts), slots[device])
        extra = rng.permutation(absent)[: rng.integers(0, problem.capacity[device] - used[device] + 1)]
        slots[device, used[device] : used[device] + len(extra)] = extra
    return Layout(slots, problem.experts)


def best_split_by_linear_program(layout: Layout, loads: Int64, speed: Float64) -> float:
    """The least largest load per speed of a layout, by HiGHS."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    top = solver.addVariable(lb=0)
    shares = {
        (device, expert): solver.addVariable(lb=0)
        for device, expert in itertools.product(range(layout.devices), range(layout.experts))
        if layout.placed[device, expert]
    }
    for expert in range(layout.experts):
        solver.addConstr(
            sum(shares[d, expert] for d in range(layout.devices) if (d, expert) in shares) == float(loads[expert])
        )
    for device in range(layout.devices):
        here = [share for (d, _), share in shares.items() if d == device]
        if here:
            solver.addConstr(sum(here) <= float(speed[device]) * top)
    solver.minimize(top)
    return float(solver.getInfoValue("objective_function_value")[1])


def all_layouts(experts: int, capacity: Int32) -> Iterator[Layout]:
    """Every layout that fills as many slots as experts allow."""
    per_device = [list(itertools.combinations(range(experts), min(int(c), experts))) for c in capacity]
    width = max(1, int(capacity.max()))
    for choice in itertools.product(*per_device):
        if len(set().union(*choice)) == experts:
            slots = np.full((len(capacity), width), -1, np.int32)
            for device, content in enumerate(choice):
                slots[device, : len(content)] = content
            yield Layout(slots, experts)


def allowed_layouts(problem: Problem) -> list[Layout]:
    """Every layout with full or partly empty devices that respects the constraints, by enumeration."""
    fill = [range(c + 1) for c in problem.capacity] if not _full_is_enough(problem) else None
    if fill is None:
        tables = list(all_layouts(problem.experts, problem.capacity))
    else:
        tables = [
            layout
            for capacity in itertools.product(*fill)
            if sum(capacity) >= problem.experts
            for layout in all_layouts(problem.experts, np.array(capacity, np.int32))
        ]
    return [layout for layout in tables if broken(problem.limits, layout.placed) is None]


def _full_is_enough(problem: Problem) -> bool:
    return problem.limits.simple and problem.max_moves is None and not problem.expert.activation_bytes


def optimum(problem: Problem) -> float:
    """Least mean imbalance by brute force; infinite if nothing fits."""
    best = np.inf
    for layout in allowed_layouts(problem):
        try:
            best = min(best, evaluate(problem, layout).mean_imbalance)
        except InfeasibleError:  # memory
            continue
    return best
