"""Daemons for tests of the daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.support.daemon import DaemonProcess, started
from tests.support.slow_link import SlowLink, link_to

GIB = 1024**3


@pytest.fixture(scope="session")
def frugal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that the system gives 1 GiB: a request that makes it take more fails, or ends it."""
    wrapper = ["prlimit", f"--data={GIB}"]
    for start in started(lambda: tmp_path_factory.mktemp("data")):
        yield start("--limit", "hello_s=1", "--limit", "job_bytes=100000000", wrapper=wrapper).serving()


@pytest.fixture
def link(postgres: str) -> Iterator[Callable[[float], SlowLink]]:
    """Makes links to the database."""
    made: list[SlowLink] = []

    def make(delay_s: float) -> SlowLink:
        made.append(link_to(postgres, delay_s))
        return made[-1]

    yield make
    for one in made:
        one.dead.clear()
        one.close()
