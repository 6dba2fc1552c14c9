"""Worlds for the tests of the router, and what stands in for systemd and nydus-snapshotter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.stored import Stored
from tests.supervisor.systemd import Systemd
from tests.supervisor.world import World, opened
from tests.support.keeper import Keeper


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with all blobs open and no worker, consistent at the end."""
    with opened(monkeypatch) as made:
        yield made


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path)
    yield made
    made.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    stand_in = Systemd(tmp_path)
    yield stand_in
    stand_in.socket.close()


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    made = Stored(tmp_path)
    yield made
    made.close()
