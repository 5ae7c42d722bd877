"""The benchmark of one layer, as a user runs it, on CPU cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "moe_layer_gpu.py"


def test_loads_are_compared_with_even_ones_of_the_same_rounds(tmp_path: Path) -> None:
    np.savez(tmp_path / "trace.npz", counts=np.arange(1, 17).reshape(1, 1, 2, 8))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)),
        *("--device", "cpu", "--layer", "narrow", "--experts", "8", "--tokens", "64", "--rounds", "1"),
        *("--trace", "trace.npz", "--loads", "trace", "balanced", "--out", "layer.json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    even, traced = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert (even["tokens"], even["quota_of_even"]) == ("balanced", 1.0)
    assert traced["tokens"] == "trace"
    assert traced["ideal"] > even["ideal"] == 1.0
    assert traced["quota_of_even"] > 0
