"""A short sample of `make endurance`: rounds of the same leave a daemon as it was."""

from __future__ import annotations

from pathlib import Path

from tests.endurance import growth, mounts_and_umounts, upgrades_with_open_files
from tests.support.daemon import Daemon


def test_upgrades_of_the_workers_and_mounts_leave_nothing_behind(tmp_path: Path) -> None:
    with Daemon(None, Path("/nonexistent")) as daemon:
        assert growth(*upgrades_with_open_files(daemon, tmp_path, mounts=4, rounds=8, warm_up=2)) == []
        assert growth(*mounts_and_umounts(daemon, tmp_path, rounds=20, warm_up=10)) == []
