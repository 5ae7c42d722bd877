"""Libraries that are preloaded into daemons, made from the C files of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.daemon import WAIT_S
from tests.support.repository import ROOT


def preloaded(name: str, folder: Path) -> Path:
    """The library `name`, in `folder`; the test is skipped where it cannot be made."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or not Linux")
    source, library = ROOT / f"tests/support/{name}.c", folder / f"{name}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=WAIT_S)
    return library
