"""Cache folders in memory: these tests sync files all the time, and a disk that others keep busy makes that slow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on tmpfs. Tests of what only a real disk does (inode numbers used again) take `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-workers-") as made:
        yield Path(made)
