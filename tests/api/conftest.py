"""A daemon for the tests of its client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.daemon import DaemonProcess, started

from moeplan.api import Client


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    for start in started(lambda: tmp_path_factory.mktemp("data")):
        yield start().serving()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected
