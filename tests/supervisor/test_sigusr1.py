"""SIGUSR1, to any process of a daemon: its stacks are in the log, and it goes on."""

from __future__ import annotations

from pathlib import Path

from tests.supervisor.lives import IMAGE, config_for
from tests.support.daemon import Daemon
from tests.support.discipline import is_running, parent, wait_until


def test_any_process_logs_its_stacks_and_goes_on(tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_idle": 0})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        wait_until(lambda: len(daemon.pids("fork server")) == 2, "the copy of the fork server")
        # Not those between a fork server and its child: they end at once.
        pids = [daemon.pid, *(pid for pid in daemon.family() if parent(pid) == daemon.pid and is_running(pid))]
        for pid in pids:
            daemon.ask_for_stacks(pid)
        assert all(map(is_running, pids))
        assert daemon.request("GET", "/api/v1/daemon")[0] == 200
