"""A cache folder with a data file and its stored chunk map."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.state.stored_map import Cache


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)
