"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tests.support.daemon import Start, started

settings.register_profile("new")
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")  # every run draws the same examples; --hypothesis-profile=new draws new ones


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons that end with the test."""
    yield from started(lambda: tmp_path / "data")
