"""Homes for the layers of a job whose experts are resident: the slow time scale, beside the spilling of its ranks."""

from __future__ import annotations

import time

import numpy as np

from moeplan.api.jobs import JobSpec
from moeplan.planner.jobs.job_plan import Candidate, replica_time_s
from moeplan.planner.jobs.outlook import LayerOutlook
from moeplan.solvers import NO_CAP, SpillOptions, forecast, plan_homes
from moeplan.solvers.problem.arrays import Int32
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.split_rules import SplitRule

__all__ = ["home_candidate"]


def home_candidate(layer: int, outlook: LayerOutlook) -> Candidate:
    """Forecast a layer and plan its homes.

    The price of a move is what it must gain within the job's horizon, so that each exchange pays for itself.

    Raises:
        ProblemError: a field contradicts another.
    """
    spec, start = outlook.spec, time.monotonic()
    demand = forecast(np.stack(outlook.steps), spec.forecast)
    options = _options(spec, outlook.current)
    tokens = float(demand.weights @ demand.loads().sum(axis=1))
    balanced_s = tokens * spec.expert.seconds_per_token / float(options.speed.sum())
    plan = plan_homes(demand, options, max_moves=spec.max_moves, price=_price(spec, balanced_s), groups=spec.groups)
    return Candidate(
        layer=layer,
        layout=_with_homes(outlook.current, plan.home),
        split_rule=spec.split_rule or SplitRule.OPTIMAL,
        cost_s=plan.after * balanced_s,
        imbalance=plan.after,
        bound=1.0,
        gap=plan.after - 1,
        cost_before_s=plan.before * balanced_s,
        imbalance_before=plan.before,
        seconds=time.monotonic() - start,
    )


def _options(spec: JobSpec, current: Layout) -> SpillOptions:
    """Options of the ranks' spilling; memory that experts leave is for tokens and transient replicas."""
    cluster, expert = spec.cluster, spec.expert
    home = _home(current)
    cap = np.full(cluster.devices, NO_CAP, np.int64)
    if cluster.memory_bytes is not None and expert.activation_bytes:
        owned = np.bincount(home, minlength=cluster.devices) * expert.replica_bytes
        cap = np.clip((cluster.memory_bytes - owned) // expert.activation_bytes, 0, NO_CAP)
    return SpillOptions(
        home=home,
        spare=np.full(cluster.devices, spec.spill_slots or 0, np.int32),
        domain=cluster.node,
        node=cluster.node,
        speed=cluster.speed,
        token_cap=cap,
        replica_tokens=-(-expert.weight_bytes // expert.activation_bytes) if expert.activation_bytes else 0,
    )


def _price(spec: JobSpec, balanced_s: float) -> float:
    """Imbalance that moving all experts, as many to each device, must gain to pay; 0 where moving is free."""
    payback = spec.replan.payback
    if payback is None or balanced_s == 0:
        return 0.0
    seconds = spec.experts / spec.cluster.devices * replica_time_s(spec.cluster, spec.moved_bytes)
    return payback.cost_factor * seconds / (payback.horizon_steps * balanced_s)


def _home(layout: Layout) -> Int32:
    """int32[experts], device of the only replica of each."""
    return layout.hosts.device.astype(np.int32)


def _with_homes(current: Layout, home: Int32) -> Layout:
    """The layout of other homes: experts that arrive take, in order, the slots of those that leave."""
    slots, before = current.slots.copy(), _home(current)
    for device in np.unique(home[home != before]):
        leaves = np.isin(slots[device], np.flatnonzero((before == device) & (home != device)))
        slots[device, leaves] = np.flatnonzero((before != device) & (home == device))
    return Layout(slots, current.experts)
