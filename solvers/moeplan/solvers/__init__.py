"""Placement of Mixture-of-Experts replicas: the problem, the bounds, and every policy.

from moeplan.solvers import Cluster, Demand, Problem, solve

problem = Problem(Cluster.uniform(devices=8, slots=9, nodes=1), Demand.of(tokens_per_expert))
plan = solve(problem)
plan.layout.slots, plan.mean_imbalance, plan.bound, plan.gap
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeplan.solvers.assignment import Assignment, balanced_assignment, optimal_assignment
    from moeplan.solvers.cluster import Cluster, Link
    from moeplan.solvers.constraints import Constraints
    from moeplan.solvers.cost import LAER, STEP, Cost, CostModel
    from moeplan.solvers.demand import Demand
    from moeplan.solvers.errors import InfeasibleError, ProblemError
    from moeplan.solvers.layers import solve_layers
    from moeplan.solvers.layout import EMPTY, Layout
    from moeplan.solvers.moves import Moves
    from moeplan.solvers.parameters import SolveParameters
    from moeplan.solvers.plan import Plan
    from moeplan.solvers.policy import Policy, available_policies
    from moeplan.solvers.problem import ExpertSpec, Problem
    from moeplan.solvers.sharing import Shares, share_slots
    from moeplan.solvers.solver import evaluate, solve, solve_anytime
    from moeplan.solvers.splits import Split
    from moeplan.solvers.warm import warm_up

__all__ = [
    "EMPTY",
    "LAER",
    "STEP",
    "Assignment",
    "Cluster",
    "Constraints",
    "Cost",
    "CostModel",
    "Demand",
    "ExpertSpec",
    "InfeasibleError",
    "Layout",
    "Link",
    "Moves",
    "Plan",
    "Policy",
    "Problem",
    "ProblemError",
    "Shares",
    "SolveParameters",
    "Split",
    "available_policies",
    "balanced_assignment",
    "evaluate",
    "optimal_assignment",
    "share_slots",
    "solve",
    "solve_anytime",
    "solve_layers",
    "warm_up",
]

_HOMES = {
    "assignment": ("Assignment", "balanced_assignment", "optimal_assignment"),
    "cluster": ("Cluster", "Link"),
    "constraints": ("Constraints",),
    "cost": ("Cost", "CostModel", "LAER", "STEP"),
    "demand": ("Demand",),
    "errors": ("InfeasibleError", "ProblemError"),
    "layout": ("EMPTY", "Layout"),
    "moves": ("Moves",),
    "parameters": ("SolveParameters",),
    "plan": ("Plan",),
    "policy": ("Policy", "available_policies"),
    "problem": ("ExpertSpec", "Problem"),
    "layers": ("solve_layers",),
    "sharing": ("Shares", "share_slots"),
    "solver": ("evaluate", "solve", "solve_anytime"),
    "splits": ("Split",),
    "warm": ("warm_up",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562): the compiler of the kernels alone takes half a second."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
