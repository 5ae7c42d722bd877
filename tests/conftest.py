"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tests.support.daemon import Start, started

# Before torch is imported, and for all processes that tests start: files run side by side, and threads of one operation
# that wait for each other on processors which others have would burn most of them.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("new", deadline=None)  # no test fails by the time that it takes
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")  # every run draws the same examples; --hypothesis-profile=new draws new ones

LONGEST = ("test_training_faults.py", "test_store.py", "test_faults.py", "test_session.py")
"""Files of tests that take longest. Side by side they come first, so that the others fill the time beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files; `make test` hands them out in this order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons that end with the test."""
    yield from started(lambda: tmp_path / "data")
