"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import Start, started


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons that end with the test."""
    yield from started(lambda: tmp_path / "data")
