"""A small Qwen3-MoE in torchtitan's own Trainer with FSDP2 and expert parallelism, as it is and with its override."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.daemon import Start
from tests.support.frameworks import check_trained, python_of, train

pytestmark = pytest.mark.slow
TOLERANCE = 0.05
"""Of losses, which fall from 7.7 to 3.4: torchtitan computes experts in bfloat16, whose rounding Adam amplifies."""


def run(folder: Path, mode: str, options: dict[str, object]) -> dict[str, Any]:
    python = python_of("torchtitan")
    return train("torchtitan_trainer.py", str(folder), mode, json.dumps(options), python=python)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("static"), "static", {})


def test_recording_changes_nothing(tmp_path: Path, static: dict[str, Any]) -> None:
    imbalances = check_trained(run(tmp_path, "record", {"trace": str(tmp_path / "trace.npz")}), static, tolerance=0)
    assert (imbalances[:, 0] == imbalances[:, 1]).all()
    with np.load(tmp_path / "trace.npz") as arrays:
        assert arrays["counts"].shape == (19, 2, 2, 64)


def test_spilling_balances_with_the_same_losses(tmp_path: Path, static: dict[str, Any]) -> None:
    home, computed = check_trained(run(tmp_path, "spill", {"spare": 2}), static, TOLERANCE).T
    assert home.max() > 1.2
    assert computed.mean() < 1.01


def test_planned_layouts_train_with_the_same_losses(tmp_path: Path, static: dict[str, Any], start: Start) -> None:
    daemon = start().serving()
    check_trained(run(tmp_path, "planned", {"planner": daemon.address, "job": "tiny"}), static, TOLERANCE)
