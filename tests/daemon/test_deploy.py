"""Examples and deployment files, as far as they can be checked without a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.daemon.harness import WAIT_S, DaemonProcess

from moeplan.planner.client import NotFoundError
from moeplan.planner.daemon.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def node_modules() -> None:
    """The packages of the example, installed beside it."""
    folder = ROOT / "examples" / "node"
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node")
    if not (folder / "node_modules" / "@grpc" / "grpc-js").exists():
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
        if subprocess.run(command, cwd=folder, capture_output=True, timeout=WAIT_S, check=False).returncode:
            pytest.skip("npm cannot install @grpc/grpc-js here")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_rank_in_javascript(daemon: DaemonProcess, node_modules: None, tmp_path: Path, compressed: bool) -> None:
    counts = np.random.default_rng(0).integers(0, 100, (6, 2, 4, 8)) ** 2
    (np.savez_compressed if compressed else np.savez)(tmp_path / "trace.npz", counts=counts)
    command = ["node", str(ROOT / "examples" / "node" / "rank.js"), daemon.address, str(tmp_path / "trace.npz"), "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"device \d+: ([-\d ]+)", done.stdout)
    assert len(rows) == 2 * 4
    for layer in range(2):
        experts = {int(e) for row in rows[layer * 4 : layer * 4 + 4] for e in row.split()} - {-1}
        assert experts == set(range(8))
    with daemon.client() as client, pytest.raises(NotFoundError):
        client.job("jobs/node-example")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("no systemd-analyze")
    unit = (ROOT / "deploy" / "systemd" / "moeplan.service").read_text()
    copy = tmp_path / "moeplan.service"
    copy.write_text(unit.replace("/opt/moeplan/bin/moeplan", "/bin/true"))  # which must exist for the check
    done = subprocess.run([tool, "verify", str(copy)], capture_output=True, text=True, timeout=WAIT_S, check=False)
    complaints = [line for line in done.stderr.splitlines() if "moeplan.service" in line]
    assert not complaints


def test_the_manifest_names_settings_that_exist() -> None:
    text = (ROOT / "deploy" / "kubernetes" / "moeplan.yaml").read_text()
    names = set(re.findall(r"name: MOEPLAN_(\w+)", text))
    assert names
    for name in names:
        first, _, second = name.lower().partition("__")
        field = Settings.model_fields[first]
        if second:
            assert second in field.annotation.model_fields  # type: ignore[union-attr]
