"""Compiled kernels: what is cached on disk is what the sources say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CALLEE = """
from constants import FACTOR
from moeplan.solvers.problem.kernel import kernel

@kernel
def step(x: int) -> int:
    return x + FACTOR * {step}
"""
CALLER = """
from callee import step
from moeplan.solvers.problem.kernel import kernel

@kernel
def twice(x: int) -> int:
    return step(step(x))

if __name__ == "__main__":
    import caller
    print(caller.twice(0), sum(caller.twice.stats.cache_hits.values()))
"""


def test_a_change_of_what_a_kernel_calls_is_seen_though_the_callers_file_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)

    def run(step: int, factor: int) -> list[str]:
        (tmp_path / "callee.py").write_text(CALLEE.format(step=step))
        (tmp_path / "constants.py").write_text(f"FACTOR = {factor}\n")
        command = [sys.executable, "-B", "caller.py"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()

    assert run(1, 1) == ["2", "0"]
    assert run(1, 1) == ["2", "1"]
    assert run(5, 1) == ["10", "0"]
    assert run(5, 3) == ["30", "0"]
    assert run(5, 3) == ["30", "1"]
