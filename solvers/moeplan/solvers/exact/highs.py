"""HiGHS without its banner, which it prints to the standard output when the first solver of a process is made."""

from __future__ import annotations

import os
import sys
from functools import cache

__all__ = ["silence"]


@cache
def silence() -> None:
    """Make the first solver of this process, with the standard output closed to it: ours may be read by a machine."""
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
