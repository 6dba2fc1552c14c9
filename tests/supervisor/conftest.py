"""Worlds for the tests of the router."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.supervisor.world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with all blobs open and no worker, consistent at the end."""
    made = World(monkeypatch)
    try:
        made.open_all()
        yield made
        made.check()
    finally:
        made.close()
