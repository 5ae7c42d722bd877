"""What is known of an instance that nobody has solved: bounds by their time, and the best plan beside them.

    python benchmarks/open_instance.py [--out FILE.json]

E256 D144 C2 with loads by Zipf's law of exponent 0.6, as in `anytime.py`: 32 spare slots for 144 devices.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from anytime import synthetic
from moeplan.solvers import SolveParameters, solve, warm_up
from result_file import Columns, write_result
from result_table import show_rows

NAME = "E256 D144 C2 zipf 0.6"
COLUMNS: Columns = {
    "way": ("solve", "{}"),
    "bound": ("bound", "{:.4f}"),
    "imbalance": ("plan", "{:.4f}"),
    "seconds": ("seconds", "{:.2f}"),
}
WAYS = {
    "0.1 s": SolveParameters(deadline_s=0.1),
    "2 s": SolveParameters(deadline_s=2),
    "2 s, proving": SolveParameters(deadline_s=2, prove=True),
    "10 s, proving": SolveParameters(deadline_s=10, prove=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    arguments = parser.parse_args()
    problem = next(case.problem for case in synthetic() if case.name == NAME)
    warm_up()
    rows = []
    for way, parameters in WAYS.items():
        start = time.perf_counter()
        plan = solve(problem, parameters=parameters)
        seconds = time.perf_counter() - start
        rows.append({"way": way, "bound": plan.bound, "imbalance": plan.objective, "seconds": seconds})
    show_rows(NAME, rows, COLUMNS)
    if arguments.out:
        write_result(arguments.out, rows)


if __name__ == "__main__":
    main()
