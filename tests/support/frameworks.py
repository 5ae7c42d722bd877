"""Environments of frameworks whose torch is not ours, and their trainers as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.repository import ROOT

FOLDER = "FRAMEWORK_ENVIRONMENTS"
"""Environment variable: the folder of environments that `make frameworks` makes."""

EXAMPLES = ROOT / "examples/integrations"
LIMIT_S = 280


def python_of(framework: str) -> str:
    """The interpreter that has a framework; the test is skipped where there is none."""
    folder = os.environ.get(FOLDER)
    python = Path(folder or ".") / framework / "bin/python"
    if folder is None or not python.exists():
        pytest.skip(f"{framework}: no environment; run `make frameworks` and set {FOLDER} to the folder")
    return str(python)


def launch(program: Path, *arguments: str, python: str = sys.executable, ranks: int = 2) -> str:
    """What the ranks of a program print."""
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    roots = [str(ROOT / root) for root in ("planner", "solvers", "proto", "runtime_client")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    run = subprocess.run(
        [*command, str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stdout


def train(example: str, *arguments: str, python: str = sys.executable, ranks: int = 2) -> dict[str, Any]:
    """What an example prints as JSON on one of its ranks."""
    said = launch(EXAMPLES / example, *arguments, python=python, ranks=ranks)
    answers = [line[line.index('{"mode"') :] for line in said.splitlines() if '{"mode"' in line]
    assert len(answers) == 1, said[-5000:]
    answer: dict[str, Any]
    answer, _ = json.JSONDecoder().raw_decode(answers[0])  # another rank may have gone on in the same line
    return answer


def check_trained(trained: dict[str, Any], static: dict[str, Any], tolerance: float) -> Any:
    """The same losses, and a checkpoint that the framework's own experts load; [steps, 2], imbalances."""
    assert len(trained["losses"]) == 20
    np.testing.assert_allclose(trained["losses"], static["losses"], rtol=0, atol=tolerance)
    assert trained["loaded_again"]
    return np.array(trained["imbalances"])
