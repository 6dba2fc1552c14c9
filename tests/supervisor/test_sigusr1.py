"""SIGUSR1, to any process of a daemon: its stacks are in the log, and it goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.nbd.test_export import Export
from tests.supervisor.lives import IMAGE, config_for
from tests.support.daemon import Daemon
from tests.support.discipline import cmdline, is_running, parent, wait_until

STACKS = b"most recent call first"


@pytest.mark.parametrize(("verb", "to_file"), [("fuse", False), ("fuse", True), ("erofs", True), ("nbd", True)])
def test_any_process_logs_its_stacks_and_goes_on(tmp_path: Path, verb: str, to_file: bool) -> None:
    # A look at each process each second.
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_idle": 0, "worker_patience": 4})
    file = tmp_path / "it.log"
    if verb == "nbd":
        daemon: Daemon = Export(IMAGE, config=config)
    else:
        daemon = Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, verb=verb)
    daemon.command += ["--log-file", str(file)] if to_file else []
    with daemon:
        wait_until(lambda: len(daemon.pids("fork server")) == 2, "the copy of the fork server", 60)
        log = file if to_file else daemon.log
        # Not those between a fork server and its child: they end at once.
        for pid in [daemon.pid, *(pid for pid in daemon.family() if parent(pid) == daemon.pid and is_running(pid))]:
            before = log.stat().st_size
            os.kill(pid, signal.SIGUSR1)

            def told(before: int = before) -> bool:
                return STACKS in log.read_bytes()[before:]

            wait_until(told, f"the stacks of {cmdline(pid)}", 60)
            assert is_running(pid)
        assert daemon.request("GET", "/api/v1/daemon")[0] == 200
        if to_file:
            fork_servers_follow_a_rotation(daemon, file)


def fork_servers_follow_a_rotation(daemon: Daemon, file: Path) -> None:
    """They log nothing themselves, so they do not notice it by themselves."""
    file.rename(file.with_suffix(".1"))
    file.touch()
    for pid in daemon.pids("fork server"):
        before = file.stat().st_size

        def told(pid: int = pid, before: int = before) -> bool:
            os.kill(pid, signal.SIGUSR1)
            return STACKS in file.read_bytes()[before:]

        wait_until(told, "the stacks of a fork server in the new file", 60)
