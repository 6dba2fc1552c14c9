"""Told to end while a start waits for another process: real daemons, a disk that stands still, a process that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, device_of, not_started, read_direct, state_file, wrong
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.discipline import descendants, is_running, mounts_under, wait_until
from tests.support.disk import make_ext4, mounted

TRUTH = oracle.truth(IMAGE.name)
OTHER = "sizes/300K-text"
STOPS_FORK_SERVER = """
import os, signal, sys
from nydusd.forkserver import client
from nydusd.forkserver.client import ForkServer
client._PATIENCE_STOPPED = 600.0
whole = ForkServer._start
def start(self):
    whole(self)
    os.kill(self.pid, signal.SIGSTOP)
ForkServer._start = start
from nydusd.cli.nydusd import main
sys.exit(main(sys.argv[1:]))
"""
"""A `nydusd` whose fork servers hang from the beginning: it does not see that they are stopped."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    make_ext4(tmp_path / "image")
    with mounted(tmp_path / "image", tmp_path / "disk", "rw"):
        yield tmp_path / "disk"


@contextmanager
def standing_still(disk: Path) -> Iterator[None]:
    """Whoever writes to this disk waits, and cannot be killed."""
    subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(disk)], check=True)


def held_by_disk(pids: list[int]) -> list[int]:
    return [pid for pid in pids if ") D " in Path(f"/proc/{pid}/stat").read_text()]


@contextmanager
def stopped_fork_server(daemon: Daemon) -> Iterator[None]:
    """What is launched meanwhile has a fork server that does nothing."""
    command = daemon.command
    daemon.command = [sys.executable, "-c", STOPS_FORK_SERVER, *command[3:]]
    try:
        yield
    finally:
        daemon.command = command


def told_to_end(daemon: Daemon, number: signal.Signals) -> int:
    """Its exit status; AssertionError if that does not come soon, while what it waits for goes on as it is."""
    assert daemon._process is not None
    daemon._process.send_signal(number)
    wait_until(daemon.has_ended, "its end", 60)
    return daemon._process.wait()


def test_while_it_waits_it_leaves_to_the_next_what_is_mounted(disk: Path) -> None:
    """For a worker of the daemon before, which a disk holds; and, what is there having been taken over, for its fork server."""
    cache = disk / "cache"
    config = config_for(IMAGE, cache, amplify_io=0, nydusd={"checkpoint_interval": 0.1})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=cache, config=config) as daemon:
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        before, front_ends, workers = device_of(daemon), daemon.pids("fuse"), daemon.pids("fetch")
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        assert read_direct(daemon.mountpoint / OTHER) == TRUTH[OTHER.encode()]
        with standing_still(disk):
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda: bool(held_by_disk(workers)), "one to store the chunk map", 60)
            (held,) = held_by_disk(workers)
            daemon.kill_supervisor()
            daemon.launch()
            wait_until(lambda: f"ending pid {held}, left by" in daemon.log.read_text(), "the next to wait", 60)
            assert told_to_end(daemon, signal.SIGINT) == 0
            assert is_running(held)
            assert read_direct(daemon.mountpoint / OTHER) == TRUTH[OTHER.encode()]
        with stopped_fork_server(daemon):
            daemon.launch()
        wait_until(lambda: noted_supervisor(daemon) == daemon.pid, "it to have taken over", 60)
        started = descendants(daemon.pid)
        assert told_to_end(daemon, signal.SIGTERM) == 0
        assert read_direct(daemon.mountpoint / OTHER) == TRUTH[OTHER.encode()]
        daemon.start()
        assert not any(map(is_running, [held, *started]))
        assert set(front_ends) <= set(daemon.pids("fuse"))
        assert device_of(daemon) == before
        assert wrong(daemon) == []


def noted_supervisor(daemon: Daemon) -> int:
    return int(json.loads(state_file(daemon).read_bytes())["processes"][0][0])


def test_while_it_waits_for_its_fork_server_a_first_start_leaves_nothing() -> None:
    with not_started(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        with stopped_fork_server(daemon):
            daemon.launch()
        wait_until(lambda: mounts_under(daemon.folder) != set(), "the mount", 60)
        daemon.stop()
