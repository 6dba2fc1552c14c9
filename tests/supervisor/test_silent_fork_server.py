"""Fork servers that are stopped while a daemon serves: real daemons."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, not_started, read_direct, wrong
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until

TRUTH = oracle.truth(IMAGE.name)
PATIENT = """
import sys
from nydusd.forkserver import client
client._PATIENCE = client._PATIENCE_WITH_COPY = 600.0
from nydusd.cli.nydusd import main
sys.exit(main(sys.argv[1:]))
"""
"""A `nydusd` that ends no fork server for being silent alone: who waits for one waits longer than a test may take."""
PATIENT_WITH_ALL = PATIENT.replace(" = 600.0", " = client._PATIENCE_WITH_ALL = 600.0")
"""And loads none beside those that are silent."""


@contextmanager
def patient(code: str, cache: Path, workers: int) -> Iterator[Daemon]:
    """Such a daemon, which has a fork server and its copy, and so many decompress workers."""
    config = config_for(IMAGE, cache, amplify_io=0, nydusd={"decompress_workers": workers})
    with not_started(IMAGE.bootstrap, IMAGE.blobs, cache, config) as daemon:
        daemon.command = [sys.executable, "-c", code, *daemon.command[3:]]
        daemon.start()
        wait_until(lambda: len(daemon.pids("fork server")) == 2, "a fork server and its copy", 60)
        yield daemon


def test_readers_are_served_while_all_fork_servers_are_stopped_and_a_worker_is_missing(tmp_path: Path) -> None:
    with patient(PATIENT_WITH_ALL, tmp_path / "cache", workers=2) as daemon:
        servers, (killed, *_) = daemon.pids("fork server"), daemon.pids("decompress")
        for pid in servers:
            os.kill(pid, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: "starting it again" in daemon.log.read_text(), "its death to be known", 60)
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        assert len(daemon.pids("decompress")) == 1
        for pid in servers:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: len(daemon.pids("decompress")) == 2, "another worker", 60)
        assert daemon.pids("fork server") == servers
        assert wrong(daemon) == []


def test_a_read_is_served_while_all_fork_servers_are_stopped_and_no_worker_is_left(tmp_path: Path) -> None:
    with patient(PATIENT, tmp_path / "cache", workers=1) as daemon:
        servers, (killed,) = daemon.pids("fork server"), daemon.pids("decompress")
        for pid in servers:
            os.kill(pid, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        wait_until(lambda: len(daemon.pids("fork server")) == 2, "a fork server and its copy", 60)
        assert not set(daemon.pids("fork server")) & set(servers)
        assert wrong(daemon) == []
