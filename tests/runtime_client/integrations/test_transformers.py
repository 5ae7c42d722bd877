"""A tiny Mixtral in transformers' own Trainer, FSDP2 and expert parallelism: as it is, and with each of our words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.daemon import Start
from tests.support.frameworks import EXAMPLES, check_trained, train

pytestmark = pytest.mark.slow
EXAMPLE = "transformers_trainer.py"
TOLERANCE = 1e-5
"""Of losses, which are near 4: sums over choices are in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    subprocess.run([sys.executable, str(EXAMPLES / EXAMPLE), str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def static(folder: Path) -> dict[str, Any]:
    return train(EXAMPLE, str(folder), "static")


def test_recording_changes_nothing(folder: Path, static: dict[str, Any]) -> None:
    trace = folder / "trace.npz"
    imbalances = check_trained(train(EXAMPLE, str(folder), "record", f"trace={trace}"), static, TOLERANCE)
    assert (imbalances[:, 0] == imbalances[:, 1]).all()
    with np.load(trace) as arrays:
        assert arrays["counts"].shape == (19, 2, 2, 8)
        assert (arrays["counts"].sum(axis=(2, 3)) == 2 * 2 * 4 * 32).all()


def test_spilling_balances_with_the_same_losses(folder: Path, static: dict[str, Any]) -> None:
    home, computed = check_trained(train(EXAMPLE, str(folder), "spill"), static, TOLERANCE).T
    assert home.min() > 1.2
    assert computed.max() < 1.01


def test_planned_layouts_balance_with_the_same_losses(folder: Path, static: dict[str, Any], start: Start) -> None:
    daemon = start().serving()
    imbalances = check_trained(
        train(EXAMPLE, str(folder), "planned", f"planner={daemon.address}", "job=tiny"), static, TOLERANCE
    )
    home, computed = imbalances[8:].T  # the planner has what it needs after five steps
    assert (computed < home).all()
    assert computed.max() < 1.1
