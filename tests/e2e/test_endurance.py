"""A short sample of `make endurance`: rounds of the same leave a daemon as it was."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.endurance import daemon_with_image, mounts_and_umounts, successions, upgrades_with_open_files
from tests.support.keeper import Keeper


def test_successions_upgrades_of_the_workers_and_mounts_leave_nothing_behind(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("successions", "upgrades", "mounts")]
    for folder in folders:
        folder.mkdir()
    with contextlib.closing(Keeper(tmp_path)) as keeper, daemon_with_image(tmp_path / "own", keeper.args) as daemon:
        assert successions(daemon, keeper, folders[0], mounts=2, rounds=4, warm_up=2).growth() == []
        assert upgrades_with_open_files(daemon, folders[1], mounts=2, rounds=4, warm_up=2).growth() == []
        assert mounts_and_umounts(daemon, folders[2], rounds=14, warm_up=6).growth() == []
