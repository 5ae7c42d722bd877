"""`moeplan jobs watch` on a terminal, through the end and the return of its daemon."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from tests.support.daemon import DaemonProcess, Rank, Start, eventually, small_job, tokens

from moeplan.api.jobs import Replan
from moeplan.planner.commands.job_screen import Screen, sparkline
from moeplan.v1 import planner_pb2


def shown(screen: Screen) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(screen.draw(datetime.now(UTC)))
    console.file.close()
    return console.export_text()


def test_the_screen_says_where_a_job_stands(daemon: DaemonProcess) -> None:
    screen = Screen()
    with daemon.client() as client:
        client.create_job("screened", small_job(replan=Replan(every_steps=2)))
        assert screen.read(client, "jobs/screened")
        assert "0 of 2 report, 2 silent" in shown(screen)
        rank = Rank(client, "jobs/screened", 0, hello={"reports_for": [0, 1]})
        for step in range(2):  # one plan: the failure below is of the newest
            rank.report(step, tokens(step, ranks=2))
        eventually(lambda: client.job("jobs/screened").status.plan_version > 1)
        assert screen.read(client, "jobs/screened")
        text = shown(screen)
        assert "2 of 2 report" in text
        assert "gain at step" in text
        assert f"{screen.before[-1]:.3f}" in text
        version = client.job("jobs/screened").status.plan_version
        rank.send(failed=planner_pb2.PlanFailed(version=version, in_force_version=1, reason="[red]not markup[/red]"))
        eventually(lambda: client.job("jobs/screened").status.plan_version > version)
        screen.read(client, "jobs/screened")
        assert "[red]not markup[/red]" in shown(screen)
        rank.close()


def test_a_sparkline_goes_from_one_to_the_most() -> None:
    assert sparkline([1.0, 1.5, 2.0], 2.0) == "▁▅█"
    assert sparkline([1.0], 1.0) == "▁"


@pytest.mark.slow
def test_watching_survives_a_restart_of_the_daemon(start: Start, tmp_path: Path) -> None:
    listen = ("--listen", f"unix:{tmp_path}/s")
    daemon = start(*listen).serving(solver=False)
    with daemon.client() as client:
        client.create_job("watched", small_job())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "moeplan.planner.commands.main", "jobs", "watch", "watched"]
    process = subprocess.Popen(
        [*command, "--server", daemon.address], stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    written: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                written.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        eventually(lambda: b"0 of 2 report" in b"".join(written))
        daemon.kill()
        eventually(lambda: b"does not answer" in b"".join(written))
        start(*listen).serving(solver=False)
        eventually(lambda: b"does not answer" not in b"".join(written[-1:]) and b"version 1" in written[-1])
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)
        reader.join(20)
        os.close(ours)
