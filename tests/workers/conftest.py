"""What the tests of workers have in common.

Cache folders are in memory: these tests sync files all the time, and a disk that others keep busy makes that slow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.harness import Jobs, jobs


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on tmpfs. Tests of what only a real disk does (inode numbers used again) take `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-workers-") as made:
        yield Path(made)


@pytest.fixture
def made(folder: Path) -> Iterator[Jobs]:
    """The jobs of an image of which all is in the cache file."""
    with jobs("v6-zstd-blake3", folder) as image:
        image.prepare()
        image.fill_all()
        yield image
