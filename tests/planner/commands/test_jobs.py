"""The commands against a real daemon, and how settings come together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tests.support.daemon import WAIT_S, DaemonProcess, Rank, eventually, small_job, tokens

from moeplan.api.jobs import Closing
from moeplan.planner.daemon.settings import load, loopback
from moeplan.solvers import SolveParameters


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeplan.planner.commands.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_jobs(daemon: DaemonProcess) -> None:
    server = ("--server", daemon.address)
    with daemon.client() as client:
        client.create_job("commanded", small_job())
    jobs = json.loads(run("jobs", "list", *server, "--format", "json").stdout)
    assert "jobs/commanded" in [job["name"] for job in jobs]
    shown = json.loads(run("jobs", "show", "commanded", *server, "--format", "json").stdout)
    assert shown["plan"]["reason"] == "initial"
    assert "version 1" in run("jobs", "watch", "commanded", *server, "--count", "1").stdout
    assert run("jobs", "delete", "commanded", *server).returncode == 0
    missing = run("jobs", "show", "commanded", *server)
    assert missing.returncode == 1
    assert "NOT_FOUND" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_options_of_the_daemon_are_those_of_every_command(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given after the command, or by the environment."""
    secret = tmp_path / "token"
    secret.write_text("a token that an open daemon does not ask for")
    monkeypatch.setenv("MOEPLAN_SERVER", daemon.address)
    assert f"jobs at {daemon.address}" in run("jobs", "list", "--token", str(secret)).stdout
    for command in (("list",), ("show", "x"), ("watch", "x"), ("delete", "x")):
        away = run("jobs", *command, "--server", "127.0.0.1:1")
        assert away.returncode == 1
        assert away.stderr == "moeplan: UNAVAILABLE: no daemon answers at 127.0.0.1:1; start one with `moeplan serve`\n"
    monkeypatch.setenv("MOEPLAN_TOKEN_FILE", str(tmp_path / "missing"))
    missing = run("jobs", "list")
    assert missing.returncode == 2
    assert "missing" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_plan_in_the_daemon_is_plan_here(daemon: DaemonProcess, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 100, (6, 2, 4, 8)) ** 2
    np.savez(tmp_path / "trace.npz", counts=counts)
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    sizes = ("--devices", "4", "--slots", "3", "--work-limit", "300")
    base = ("plan", str(tmp_path / "trace.npz"), *sizes)
    assert run(*base, "-o", str(here)).returncode == 0
    assert run(*base, "-o", str(there), "--server", daemon.address).returncode == 0
    assert json.loads(here.read_text()) == json.loads(there.read_text())
    refused = run(*base, "-o", str(there), "--server", daemon.address, "--policy", "magic")
    assert refused.returncode == 2
    assert refused.stderr.startswith("moeplan: --policy = 'magic': must be one of base, eplb")


def test_flags_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "moeplan.toml"
    file.write_text('listen = "127.0.0.1:1"\nworkers = 3\n[limits]\njobs = 1\nqueue = 1\nstreams = 1\n')
    monkeypatch.setenv("MOEPLAN_WORKERS", "4")
    monkeypatch.setenv("MOEPLAN_LIMITS__QUEUE", "2")
    monkeypatch.setenv("MOEPLAN_LIMITS__STREAMS", "2")
    settings = load(file, {"limits": {"streams": "3"}})
    assert (settings.listen, settings.workers) == ("127.0.0.1:1", 4)
    assert (settings.limits.jobs, settings.limits.queue, settings.limits.streams) == (1, 2, 3)


@pytest.mark.parametrize("text", ["lisen = '127.0.0.1:1'", "[limits]\njobz = 1", "workers = 0", "listen = 'nowhere'"])
def test_bad_files_name_the_setting(tmp_path: Path, text: str) -> None:
    file = tmp_path / "moeplan.toml"
    file.write_text(text)
    with pytest.raises(ValidationError) as error:
        load(file, {})
    assert text.split("\n")[-1].split(" ")[0] in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/s", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
    ],
)
def test_loopback(address: str, expected: bool) -> None:
    assert loopback(address) is expected


def test_show_says_what_is_wrong_with_a_job(daemon: DaemonProcess) -> None:
    """Ranks that are silent or late, a solve that failed and why, the age of the plan, and what plans saved."""
    server = ("--server", daemon.address)
    with daemon.client() as client:
        spec = small_job(ranks=6, closing=Closing(max_lag_steps=1, quorum=0.5))
        name = client.create_job("watched", spec).name
        leaders, slow = (Rank(client, name, first, hello={"reports_for": [first, first + 1]}) for first in (0, 4))
        other = Rank(client, name, 2)
        for step in range(6):
            for rank in (leaders, *((slow,) if step == 0 else ())):
                rank.report(step, tokens(step, ranks=2))
            other.report(step, tokens(step + 100))
        other.next("plan_update")
        eventually(lambda: (client.job(name).status.closed_step or 0) >= 3)
        status = client.job(name).status
        assert status.silent_ranks == (3,)
        assert status.late_ranks == (4, 5)
        assert status.saved_s >= 0
        assert status.failure is None
        text = run("jobs", "show", "watched", *server).stdout
        assert "silent ranks  3\n" in text
        assert "late ranks  4, 5\n" in text
        assert "plan age  0:0" in text

        # A solve that is not done in time: the reason stays there, whatever is decided later.
        hasty = client.create_job("hasty", small_job(parameters=SolveParameters(deadline_s=0.5))).name
        (worker,) = eventually(daemon.workers)
        os.kill(worker, signal.SIGSTOP)
        rank = Rank(client, hasty, 0, hello={"reports_for": [0, 1]})
        rank.report(0, tokens(1, ranks=2))
        failure = eventually(lambda: client.job(hasty).status.failure)
        assert failure.step == 0
        assert "deadline" in failure.detail
        assert "step 0: " in run("jobs", "show", "hasty", *server).stdout
        for stream in (leaders, slow, other, rank):
            stream.close()
        client.delete_job(name)
        client.delete_job(hasty)
