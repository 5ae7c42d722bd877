"""The distribution: wheel and source archive, installed where nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.support.repository import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: object, folder: Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_changelog_begins_with_the_version() -> None:
    heads = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert any(head.startswith(f"## {VERSION} ") for head in heads[:2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_and_source_archive_work_in_a_clean_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    python, program = tmp_path / "venv/bin/python", tmp_path / "venv/bin/moeplan"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(*install, "hatchling", folder=tmp_path)
    run(python, "-m", "hatchling", "build", "-d", tmp_path / "dist", folder=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    assert wheel.name.startswith(f"moeplan-{VERSION}-")
    for distribution in (wheel, archive):
        again = ("--force-reinstall", "--no-deps") if distribution is archive else ()
        run(*install, *again, distribution, folder=tmp_path)
        assert run(program, "--version", folder=tmp_path) == f"moeplan {VERSION}\n"
        run(program, "trace", "generate", "trace.npz", "--steps", 12, "--layers", 1, folder=tmp_path)
        run(program, "plan", "trace.npz", "--devices", 16, "--slots", 5, folder=tmp_path)
        for face in ("solvers", "api"):
            run(python, "-c", f"from moeplan.{face} import *", folder=tmp_path)
    assert "torch" not in run(python, "-m", "pip", "list", "--format", "freeze", folder=tmp_path)
