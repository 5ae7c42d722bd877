"""The exact model where every replica of an expert takes the same share of its tokens, on CP-SAT.

How much a device computes then follows from the numbers of replicas alone, so the model chooses them, too:

    c[e, r] in {0, 1}       expert e has r replicas
    w[d, e, r] in {0, 1}    one of them is on device d
    z[s]                    imbalance of scenario s

    minimise    sum_s share[s] z[s], or the mean of the worst part of it (see `model`)
    such that   sum_r c[e, r] = 1,   sum_d w[d, e, r] = r c[e, r],   w[d, e, r] <= c[e, r]
                sum_{e, r} floor(loads[s, e] / r) w[d, e, r] <= speed[d] floor[s] z[s]
                slots, memory and limits of y[d, e] = sum_r w[d, e, r], as in `model`

Shares are rounded down to whole tokens, so that the bound holds however the tokens that are left over are dealt out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from moeplan.solvers.exact.cpsat import add_limits, minimise
from moeplan.solvers.exact.model import Answer, Effort, Model, Report, check
from moeplan.solvers.problem.arrays import Bool, Float64, Int64
from moeplan.solvers.problem.layout import placed_in

__all__ = ["solve"]

IMBALANCE_UNITS = 100_000
"""z counts hundred thousandths; loads are rounded down to such parts of the mean, so that the bound holds."""

SHARE_UNITS = 10_000
"""Shares of the scenarios in the objective are rounded down to ten thousandths of the largest, or where the worst part
counts, of the whole, so that the bound holds."""


def solve(model: Model, effort: Effort, report: Report) -> Answer:
    """Minimise by CP-SAT, from the incumbent; better placements are reported as they are found.

    Raises:
        OutOfTime: the deadline passed before the model was built.
    """
    cp = cp_model.CpModel()
    w = _placements(cp, model, effort)
    y = np.empty((model.devices, model.experts), object)
    for at in np.ndindex(y.shape):
        y[at] = cp_model.LinearExpr.sum(w[at].tolist())
    for d in range(model.devices):
        cp.add(cp_model.LinearExpr.sum(y[d].tolist()) <= int(model.capacity[d]))
    if model.limits is not None:
        add_limits(cp, y, model.limits)
    if model.memory is not None:
        _fit_memory(cp, w, model)
    _minimise_imbalance(cp, w, model, effort)
    if model.incumbent is not None:
        _hint(cp, w, model)

    def placement(values: Any) -> Bool:
        return np.array([[any(map(values.boolean_value, of_expert)) for of_expert in row] for row in w], np.bool_)

    def bound(objective: float) -> float:
        if model.memory is not None:  # its limit rounds shares up, and leaves layouts out
            return 0.0
        share = float((model.weights * model.floor).max()) if model.tail >= 1 else 1.0
        return share * objective / (IMBALANCE_UNITS * SHARE_UNITS)

    return minimise(cp, effort, report, placement, bound)


def _placements(cp: cp_model.CpModel, model: Model, effort: Effort) -> Any:
    """The variables w[devices, experts, devices], whose last index is the number of replicas less one."""
    w = np.empty((model.devices, model.experts, model.devices), object)
    for e in range(model.experts):
        check(effort)
        count = [cp.new_bool_var("") for _ in range(model.devices)]
        cp.add_exactly_one(count)
        for r, chosen in enumerate(count):
            for d in range(model.devices):
                w[d, e, r] = cp.new_bool_var("")
                cp.add_implication(w[d, e, r], chosen)
            cp.add(cp_model.LinearExpr.sum(w[:, e, r].tolist()) == (r + 1) * chosen)
        for d in range(model.devices):
            cp.add_at_most_one(w[d, e].tolist())
    return w


def _shares(model: Model) -> Int64:
    """int64[scenarios, experts, devices]: tokens of a replica, rounded down, by the number of replicas less one."""
    shares: Int64 = model.loads[:, :, None] // np.arange(1, model.devices + 1)
    return shares


def _minimise_imbalance(cp: cp_model.CpModel, w: Any, model: Model, effort: Effort) -> None:
    parts = _parts(model)
    z, load = [], np.empty((model.scenarios, model.devices), object)
    for s, cap in enumerate(_caps(model, parts).tolist()):
        check(effort)
        z.append(cp.new_int_var(IMBALANCE_UNITS, cap, ""))
        for d in range(model.devices):
            load[s, d] = cp_model.LinearExpr.weighted_sum(w[d].reshape(-1).tolist(), parts[s, d].reshape(-1).tolist())
            cp.add(load[s, d] <= z[s])
        for at in np.argwhere(parts[s] > cap):
            cp.add(w[tuple(at)] == 0)
    if model.interchangeable:
        for d in range(model.devices - 1):
            cp.add(load[0, d] >= load[0, d + 1])
    share = model.weights * model.floor
    if model.tail >= 1:
        weight = np.floor(share / share.max() * SHARE_UNITS).astype(np.int64)
        cp.minimize(cp_model.LinearExpr.weighted_sum(z, weight.tolist()))
        return
    most = max(variable.proto.domain[1] for variable in z)
    eta = cp.new_int_var(IMBALANCE_UNITS, most, "")
    excess = [cp.new_int_var(0, most, "") for _ in z]
    for over, imbalance in zip(excess, z, strict=True):
        cp.add(over + eta >= imbalance)
    weight = np.floor(share / model.tail * SHARE_UNITS).astype(np.int64)
    cp.minimize(SHARE_UNITS * eta + cp_model.LinearExpr.weighted_sum(excess, weight.tolist()))


def _parts(model: Model) -> Int64:
    """int64[scenarios, devices, experts, devices]: what a replica adds to the load of its device, per speed."""
    unit = IMBALANCE_UNITS / np.maximum(model.floor[:, None] * model.speed, 1e-300)
    parts: Int64 = np.floor(_shares(model)[:, None] * unit[:, :, None, None]).astype(np.int64)
    return parts


def _caps(model: Model, parts: Int64) -> Int64:
    """int64[scenarios]: the imbalance that a plan no worse than the incumbent has at most.

    All others perfect, a scenario alone may have what the incumbent has in all.
    """
    most: Int64 = parts.max(axis=(1, 3)).sum(axis=1) + IMBALANCE_UNITS
    if model.incumbent is None or model.memory is not None:  # it may not fit the memory
        return most
    placed = placed_in(model.incumbent, model.experts)
    replicas = placed.sum(axis=0)
    chosen = parts[:, :, np.arange(model.experts), replicas - 1]
    reached = np.maximum((chosen * placed).sum(axis=2).max(axis=1) / IMBALANCE_UNITS, 1.0)
    slack = model.objective(reached * model.floor) - model.objective(model.floor)
    share = model.weights * model.floor
    part = share if model.tail >= 1 else np.minimum(1.0, share / model.tail)
    cap: Float64 = IMBALANCE_UNITS * (1 + slack / part * (1 + 1e-9)) + 2
    return np.minimum(cap, most).astype(np.int64)


def _fit_memory(cp: cp_model.CpModel, w: Any, model: Model) -> None:
    """Limit replicas and activations, each replica with the most tokens that it can be dealt."""
    assert model.memory is not None
    most = -(-model.loads[:, :, None] // np.arange(1, model.devices + 1))
    for s in range(model.scenarios):
        need = (model.replica_bytes + model.activation_bytes * most[s]).reshape(-1).tolist()
        for d in range(model.devices):
            cp.add(cp_model.LinearExpr.weighted_sum(w[d].reshape(-1).tolist(), need) <= int(model.memory[d]))


def _hint(cp: cp_model.CpModel, w: Any, model: Model) -> None:
    """Tell the solver of the incumbent, with interchangeable devices in descending order of their first load."""
    assert model.incumbent is not None
    placed = placed_in(model.incumbent, model.experts)
    replicas = placed.sum(axis=0)
    if model.interchangeable:
        load = placed @ (model.loads[0] // np.maximum(replicas, 1))
        placed = placed[np.argsort(-load, kind="stable")]
    for (d, e, r), variable in np.ndenumerate(w):
        cp.add_hint(variable, bool(placed[d, e]) and replicas[e] == r + 1)
