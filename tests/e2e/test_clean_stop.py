"""The ways a daemon is told to end: it leaves no mount, process, socket, shared memory or run-time file, and no cache lost.

What is left behind is found by the discipline of `conftest.py`; these tests check status, mount and cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import manifest
from tests.support.daemon import Daemon
from tests.support.oracle import image

IMAGE = image("v6-zstd-blake3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_ends_the_daemon_and_removes_its_socket(number: signal.Signals) -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        (daemon.mountpoint / "dup" / "a").read_bytes()
        daemon.stop(number)
        assert not daemon.apisock.exists()
        assert os.listdir(daemon.mountpoint) == []


def test_unmount_from_outside_ends_the_daemon() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        subprocess.run(["umount", str(daemon.mountpoint)], check=True)
        daemon.wait_for_end()


def test_stop_before_any_read_is_clean() -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs):
        pass


def test_nothing_is_fetched_twice_over_a_restart(tmp_path: Path) -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as daemon:
        first = manifest.walk(daemon.mountpoint)
        assert daemon.backend_reads() > 0
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path) as daemon:
        assert manifest.walk(daemon.mountpoint) == first
        assert daemon.backend_reads() == 0


def test_two_daemons_of_one_image_do_not_disturb_each_other() -> None:
    expected = manifest.load(IMAGE.manifest)
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as first:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as second:
            assert manifest.differences(expected, manifest.walk(second.mountpoint)) == []
        assert manifest.differences(expected, manifest.walk(first.mountpoint)) == []
