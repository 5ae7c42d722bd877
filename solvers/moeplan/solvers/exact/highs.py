"""HiGHS without its banner, and in a process whose other parts use it, too."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

__all__ = ["run_highs", "silence"]


@cache
def silence() -> None:
    """Make the first solver of this process, whose banner goes to standard output, which a machine may read."""
    import highspy

    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def run_highs(solver: Any) -> None:
    """Run a solver, a `highspy.Highs`.

    A process has one pool of threads for all solvers, as large as the first to run has asked for, and HiGHS refuses to
    run with any other number: then as many must do as there are.
    """
    import highspy

    if solver.run() == highspy.HighsStatus.kError:
        solver.setOptionValue("threads", 0)
        solver.run()
