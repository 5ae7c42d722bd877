"""What `warm_up` promises: after it, a solve has nothing left to import or to compile."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from moeplan.solvers import Cluster, Demand, Problem, SolveParameters, solve, warm_up

warm_up()
modules = set(sys.modules)
kernels = [(kernel, len(kernel.signatures)) for kernel in gc.get_objects() if isinstance(kernel, Dispatcher)]
tokens = np.random.default_rng(1).geometric(0.003, (3, 8, 24))
for slots, problem_of in ((2, 16), (4, 8)):
    problem = Problem(Cluster.uniform(problem_of, slots, nodes=2), Demand.of(tokens))
    plan = solve(problem, parameters=SolveParameters(deadline_s=0.3, target_gap=0.0))
    solve(Problem(problem.cluster, problem.demand, current=plan.layout, max_moves=3))
ours = ("moeplan", "ortools", "highspy", "scipy", "numba")
print([name for name in set(sys.modules) - modules if name.split(".")[0] in ours])
print([kernel.py_func.__name__ for kernel, before in kernels if kernel.signatures[before:]])
"""


def test_after_warming_up_nothing_is_imported_or_compiled() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["[]", "[]"]
