"""What benchmarks of layers compare."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRACE = "import numpy as np; from moe_layer_gpu import Load; assert Load(trace=np.ones((2, 3), np.int64)) != Load()"


def test_a_trace_is_not_an_even_load() -> None:
    done = subprocess.run([sys.executable, "-c", TRACE], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
