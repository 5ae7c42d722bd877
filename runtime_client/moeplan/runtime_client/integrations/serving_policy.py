"""Layouts for serving engines that ask a function in each of their ranks: the same answer on all, from the same loads.

Engines divide an expert's tokens evenly among its replicas and fill every slot, so that is what is planned for. The
search is limited by work, never by time, so that ranks agree.

Environment: MOEPLAN_EPLB=1 turns the plug-ins on. MOEPLAN_EPLB_MAX_MOVES limits the replicas that a re-plan of a layer
may copy, where the engine tells the layout in force. MOEPLAN_EPLB_WORK is the number of candidate layouts per layer
(2,000 by default). MOEPLAN_EPLB_LOADS names a file to which rank 0 appends the loads that it is asked with, for
`moeplan trace import`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeplan.solvers import Cluster, Demand, Layout, Problem, SolveParameters, SplitRule, solve
from moeplan.solvers.construct.fill import fill_for_even_split
from moeplan.solvers.problem.arrays import Int64

__all__ = ["chosen", "plan_slots"]

WORK = 2_000


def chosen() -> bool:
    """True if MOEPLAN_EPLB turns the plug-ins on.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("MOEPLAN_EPLB", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"MOEPLAN_EPLB = {value}: must be 1 to plan experts with moeplan, or 0")
    return value == "1"


def plan_slots(loads: Int64, slots: int, devices: int, *, groups: int, nodes: int, old: Int64 | None = None) -> Int64:
    """Expert of each slot of each layer, int64[layers, slots], device by device.

    Args:
        loads: int64[steps, layers, experts], tokens.
        slots: Slots of all devices together.
        devices: Devices, contiguous over nodes.
        groups: Groups of consecutive experts.
        nodes: Nodes.
        old: int64[layers, slots], the layout in force.

    Raises:
        ProblemError: the sizes do not go together.
    """
    most = _integer("MOEPLAN_EPLB_MAX_MOVES")
    parameters = SolveParameters(work_limit=_integer("MOEPLAN_EPLB_WORK") or WORK)
    _record(loads, slots, devices)
    cluster = Cluster.uniform(devices, slots // devices, nodes=nodes)
    planned = []
    for layer in range(loads.shape[1]):
        current = None if old is None else _layout(old[layer], devices, loads.shape[2])
        problem = Problem(
            cluster,
            Demand.of(loads[:, layer, np.newaxis]),
            current=current,
            max_moves=most if current is not None else None,
            groups=groups,
            split_rule=SplitRule.EVEN,
        )
        layout = solve(problem, parameters=parameters).layout
        total = loads[:, layer].sum(axis=0).astype(np.float64)
        full = fill_for_even_split(layout, total, current if problem.max_moves is not None else None)
        planned.append(full.slots.reshape(-1).astype(np.int64))
    return np.stack(planned)


def _layout(slots: Int64, devices: int, experts: int) -> Layout | None:
    """The layout in force; None where it holds an expert twice on a device, as engines' own planners allow."""
    table = slots.reshape(devices, -1)
    if any(len(set(row)) < len(row) for row in table.tolist()):
        return None
    return Layout(table.astype(np.int32), experts)


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"{name} = {value}: must be a whole number")
    return int(value)


def _record(loads: Int64, slots: int, devices: int) -> None:
    """Append the loads as vLLM's proposed statistics, each expert in a slot of its own."""
    path = os.environ.get("MOEPLAN_EPLB_LOADS")
    if not path or os.environ.get("RANK", "0") != "0":
        return
    experts: Sequence[int] = range(loads.shape[2])
    with Path(path).open("a") as file:
        for step in loads:
            record = {
                "record_type": "eplb_load_stats",
                "version": 1,
                "num_ranks": devices,
                "num_slots": slots,
                "expert_load": step.tolist(),
                "p2l_map": [list(experts)] * len(step),
            }
            file.write(json.dumps(record) + "\n")
