"""The distribution: wheel and source archive, installed where nothing else is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
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


def interpreters() -> list[str]:
    """Pythons to install into: those that MOEPLAN_PYTHONS names, separated by spaces, else those of these names."""
    named = os.environ.get("MOEPLAN_PYTHONS", "python3.11 python3.12 python3.13").split()
    return [found for name in named if (found := shutil.which(name)) and works(found)]


def works(python: str) -> bool:
    return subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Environment:
    """A new virtual environment, and an empty folder to work in."""

    folder: Path

    def program(self, name: str, *arguments: object) -> str:
        return run(self.folder / "venv/bin" / name, *arguments, folder=self.folder)

    def install(self, *what: object) -> None:
        """What pip finds, at the versions of the constraints."""
        quiet = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
        self.program("python", *quiet, *what)


def environment(python: str, folder: Path) -> Environment:
    run(python, "-m", "venv", folder / "venv", folder=folder)
    return Environment(folder)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and source archive of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    builder = environment(sys.executable, folder)
    builder.install("hatchling")
    run(folder / "venv/bin/python", "-m", "hatchling", "build", "-d", folder / "dist", folder=ROOT)
    (wheel,), (archive,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, archive


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("python", interpreters())
def test_the_wheel_works_in_a_clean_environment(distributions: tuple[Path, Path], python: str, tmp_path: Path) -> None:
    wheel, _ = distributions
    assert wheel.name.startswith(f"moeplan-{VERSION}-")
    clean = environment(python, tmp_path)
    clean.install(wheel)
    check_the_program(clean)
    assert "torch" not in clean.program("python", "-m", "pip", "list", "--format", "freeze")
    with pytest.raises(AssertionError, match=re.escape("moeplan[torch]")):
        clean.program("python", "-c", "from moeplan.runtime_client import ResidentExperts")
    clean.install(f"moeplan[postgres] @ {wheel.as_uri()}")
    clean.program("python", "-c", "import psycopg")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_source_archive_works_with_torch(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    _, archive = distributions
    clean = environment(sys.executable, tmp_path)
    clean.install("torch==2.13.0")  # pinned first, as the Makefile does: the latest may be gigabytes of CUDA
    clean.install(f"moeplan[torch] @ {archive.as_uri()}")
    check_the_program(clean)
    clean.program("python", "-c", "from moeplan.runtime_client import *")


def check_the_program(clean: Environment) -> None:
    """A trace is generated and planned from, and the faces are whole."""
    assert clean.program("moeplan", "--version") == f"moeplan {VERSION}\n"
    clean.program("moeplan", "trace", "generate", "trace.npz", "--steps", 12, "--layers", 1)
    clean.program("moeplan", "plan", "trace.npz", "--devices", 16, "--slots", 5)
    for face in ("solvers", "api"):
        clean.program("python", "-c", f"from moeplan.{face} import *")
