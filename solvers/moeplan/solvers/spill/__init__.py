"""Exact-load planning inside the rank: spill tokens of overloaded devices to transient replicas in spare slots.

Every expert has a home device that keeps its master weights. Once the router has spoken, the counts of one layer and
micro-batch are exact; each rank calls the same deterministic function on the same counts and gets the same plan.
"""

from moeplan.solvers.spill.llep import LlepPlanner
from moeplan.solvers.spill.options import NO_CAP, SpillOptions, transfer_tokens
from moeplan.solvers.spill.plan import SpillPlan
from moeplan.solvers.spill.quota import QuotaPlanner
from moeplan.solvers.spill.reference import ExactSpill, solve_exactly

__all__ = [
    "NO_CAP",
    "ExactSpill",
    "LlepPlanner",
    "QuotaPlanner",
    "SpillOptions",
    "SpillPlan",
    "solve_exactly",
    "transfer_tokens",
]
