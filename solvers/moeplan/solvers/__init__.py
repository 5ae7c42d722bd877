"""Placement of Mixture-of-Experts replicas: the problem, the bounds, and every policy.

from moeplan.solvers import Cluster, Demand, Problem, solve

problem = Problem(Cluster.uniform(devices=8, slots=9, nodes=1), Demand.of(tokens_per_expert))
plan = solve(problem)
plan.layout.slots, plan.mean_imbalance, plan.bound, plan.gap

The names are those of `__init__.pyi`. Each is imported at its first use: the compiler of the kernels alone takes half a
second.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
