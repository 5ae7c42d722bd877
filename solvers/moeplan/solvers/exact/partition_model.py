"""The exact model where spare slots are few: a partition instead of a placement.

By the theorem of `moeplan.solvers.construct.partition`, with R < D - 1 spare slots the best placement of one scenario
on equal devices is a best partition of devices and experts into D - R groups, where a group of t devices has
t (C - 1) + 1 experts: more groups can be merged, because a merged load per device is never above the larger of the two.

    a[e, j] in {0, 1}       expert e is in group j
    u[t, j] in {0, 1}       group j has t devices
    minimise z  such that   sum_e loads[e] a[e, j] <= t z  where u[t, j]

Tokens are divided inside groups by the sliding window, so no variable counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from moeplan.solvers.construct.sliding_window import sliding_window
from moeplan.solvers.exact.cpsat import minimise
from moeplan.solvers.exact.model import Answer, Effort, Model, Report, check
from moeplan.solvers.problem.arrays import Bool, Int32, Int64

__all__ = ["applies", "groups_of", "solve"]


def applies(model: Model) -> bool:
    """True if the theorem covers the model: one scenario, interchangeable devices, and fewer than D - 1 spare slots."""
    spare = int(model.capacity.sum()) - model.experts
    return (
        model.incumbent is not None
        and model.memory is None
        and model.scenarios == 1
        and model.tail >= 1
        and model.interchangeable
        and spare < model.devices - 1
    )


def groups_of(model: Model) -> tuple[Int64, Int64]:
    """The groups of the incumbent: the connected parts of its split, merged until there are D - R.

    A part of t devices is connected by at most t C replicas, so it has at most t (C - 1) + 1 experts.

    Returns:
        group int64[experts], and devices int64[groups].
    """
    _, x = model.start
    width = int(model.capacity[0])
    part = np.arange(model.devices)
    for e in range(model.experts):
        hosts = np.flatnonzero(x[0, :, e])
        if len(hosts):
            part[np.isin(part, part[hosts])] = part[hosts[0]]
    names, part = np.unique(part, return_inverse=True)
    size = np.bincount(part).astype(np.int64)
    group = np.full(model.experts, -1, np.int64)
    device, expert = np.nonzero(x[0])
    group[expert] = part[device]
    room = size * (width - 1) + 1
    room -= np.bincount(group[group >= 0], minlength=len(names))
    for e in np.flatnonzero(group < 0).tolist():  # experts without load go where there is room
        group[e] = int(room.argmax())
        room[group[e]] -= 1
    wanted = model.experts - model.devices * (width - 1)
    alive = list(range(len(size)))
    while len(alive) > wanted:
        first = max(alive, key=lambda j: int(room[j]))
        second = next(j for j in alive if j != first)
        group[group == second] = first
        size[first] += size[second]
        room[first] += room[second] - 1
        alive.remove(second)
    group = np.searchsorted(np.array(alive), group)
    return group, size[alive]


@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """The formulation: [experts, groups] of booleans `a`, the devices of each group, and the largest load `z`."""

    cp: cp_model.CpModel
    a: npt.NDArray[Any]
    size: list[Any]
    z: Any


def solve(model: Model, effort: Effort, report: Report) -> Answer:
    """Minimise by CP-SAT over partitions, from the incumbent's.

    Raises:
        OutOfTime: the deadline passed before the model was built.
    """
    group, size = groups_of(model)
    order = np.argsort(-size, kind="stable")
    program = _build(model, effort, np.argsort(order, kind="stable")[group], size[order])
    if not model.hinted:
        program.cp.clear_hints()

    def placement(values: Any) -> Bool:
        member = np.array([[values.boolean_value(v) for v in row] for row in program.a])
        return _placement(model, member.argmax(axis=1), np.array([values.value(v) for v in program.size]))

    per_token = float(model.weights[0]) / float(model.speed[0])
    return minimise(program.cp, effort, report, placement, lambda objective: objective * per_token)


def _build(model: Model, effort: Effort, start_group: Int64, start_size: Int64) -> _Program:
    """The formulation with its hint: int64[experts] groups to start from, and int64[groups] devices, most first."""
    cp = cp_model.CpModel()
    groups, largest = len(start_size), model.devices - len(start_size) + 1
    speed = float(model.speed[0])
    z = cp.new_int_var(int(np.ceil(model.floor[0] * speed)), int(np.ceil(model.cap[0] * speed)), "")
    cp.add_hint(z, int(np.ceil(model.level[0] * speed)))
    a = np.empty((model.experts, groups), object)
    size = [cp.new_int_var(1, largest, "") for _ in range(groups)]
    for e in range(model.experts):
        check(effort)
        for j in range(groups):
            a[e, j] = cp.new_bool_var("")
            cp.add_hint(a[e, j], bool(start_group[e] == j))
        cp.add_exactly_one(a[e])
    program = _Program(cp, a, size, z)
    for j in range(groups):
        check(effort)
        _add_group(program, model, j, np.flatnonzero(start_group == j), int(start_size[j]))
    cp.add(cp_model.LinearExpr.sum(size) == model.devices)
    cp.minimize(z)
    return program


def _add_group(program: _Program, model: Model, j: int, start: Int64, start_size: int) -> None:
    """Constrain the load and the size of group `j`, which starts with some experts and devices."""
    cp, members, size = program.cp, list(program.a[:, j]), program.size
    loads, width = model.loads[0], int(model.capacity[0])
    load = cp.new_int_var(0, int(loads.sum()), "")
    cp.add(load == cp_model.LinearExpr.weighted_sum(members, loads.tolist()))
    cp.add(cp_model.LinearExpr.sum(members) == size[j] * (width - 1) + 1)
    cp.add_hint(size[j], start_size)
    cp.add_hint(load, int(loads[start].sum()))
    # Sizes come in descending order, so the j-th group has at most (devices to share out) / (j + 1) extra ones.
    most = 1 + (model.devices - len(size)) // (j + 1)
    choice = [cp.new_bool_var("") for _ in range(most)]
    cp.add_exactly_one(choice)
    cp.add(size[j] == cp_model.LinearExpr.weighted_sum(choice, list(range(1, most + 1))))
    for t, chosen in enumerate(choice, start=1):
        cp.add_hint(chosen, t == start_size)
        cp.add(load <= t * program.z).only_enforce_if(chosen)
    if j:
        cp.add(size[j - 1] >= size[j])


def _placement(model: Model, group: Int64, size: Int64) -> Bool:
    placed = np.zeros((model.devices, model.experts), np.bool_)
    first = 0
    for j, devices in enumerate(size.tolist()):
        members = np.flatnonzero(group == j)
        slots: Int32 = sliding_window(model.loads[0].astype(np.float64), members, devices, int(model.capacity[0]))
        device, slot = np.nonzero(slots >= 0)
        placed[first + device, slots[device, slot]] = True
        first += devices
    return placed
