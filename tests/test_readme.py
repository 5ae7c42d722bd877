"""The README's commands, run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.daemon import Start
from tests.support.repository import ROOT, TRACE

from moeplan.solvers import Layout

STEPS = 24


def commands() -> list[list[str]]:
    """Every `moeplan` command of the README's blocks but the one that serves for ever, split into words."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("moeplan ")]
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    return [words for words in found if words[0] != "serve"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run(tmp_path: Path, start: Start) -> None:
    with np.load(TRACE) as whole:
        np.savez(tmp_path / "trace.npz", counts=whole["counts"][:STEPS, :1])
    (tmp_path / "limits.json").write_text(json.dumps({"forbidden": [[0, 1]]}))
    daemon = start().serving()
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": [[[3, 1, 2, 2]]] * 2}))
    words_of_the_page = {"TRACE": "trace.npz", "RECORDING": "loads.json", "127.0.0.1:7433": daemon.address}
    for words in commands():
        arguments = [words_of_the_page.get(word, word) for word in words]
        if words[:2] == ["trace", "import"]:  # the other commands want a larger trace than this one
            arguments[-1] = "imported.npz"
        if words[0] == "jobs":  # the page's daemon is where commands look by default
            arguments += ["--server", daemon.address]
        done = subprocess.run(
            [sys.executable, "-m", "moeplan.planner.commands.main", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr)


def test_the_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    names: dict[str, object] = {
        "counts": np.random.default_rng(0).integers(1, 99, (16, 64)),
        "layout": Layout.contiguous(64, np.full(16, 5)),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
