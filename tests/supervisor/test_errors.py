"""A daemon that ends by an error, or whose children do not run: what was mounted before stays. Real daemons."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.frontends.fuse import journal
from nydusd.supervisor import adoption
from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, crash, device_of, not_started, read_direct, wrong
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.discipline import becomes_true, is_running, wait_until

ExpectLog = Callable[..., None]
TRUTH = oracle.truth(IMAGE.name)

BROKEN = """
import sys, types
if "nydusd.forkserver" in sys.orig_argv:
    loop = sys.modules["workers.loop"] = types.ModuleType("workers.loop")
    loop.main = lambda *_: 1
"""
"""`sitecustomize.py` of a start at which workers end by themselves: half of an upgrade of the package is on disk."""

FAILING = """
import os, sys
from nydusd.supervisor import fuse
place = sys.argv.pop(1)
class Failing(fuse.Supervisor):
    def _timeout(self):
        if os.path.exists(place):
            raise RuntimeError("of the test")
        return min(super()._timeout(), 0.1)
fuse.FuseDaemon.__bases__ = (Failing,)
from nydusd.cli.nydusd import main
sys.exit(main(sys.argv[1:]))
"""
"""A `nydusd` with a bug: its loop raises when there is a certain file."""


def wait_for_failure(daemon: Daemon) -> None:
    wait_until(daemon.has_ended, "the end of a daemon that fails", 60)
    assert daemon._process is not None
    assert daemon._process.wait() == 1


@pytest.fixture
def config(tmp_path: Path) -> dict[str, object]:
    return config_for(IMAGE, tmp_path / "cache", amplify_io=0)


def test_a_takeover_whose_api_cannot_be_opened_leaves_all_to_the_next(
    config: dict[str, object], expect_log: ExpectLog, tmp_path: Path
) -> None:
    """Also what its fork server alone holds: all front ends were killed with the supervisor."""
    expect_log("stays mounted", "not a socket")
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        before = device_of(daemon)
        for pid in crash(daemon):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_running(pid), "the end of a front end", 60)  # type: ignore[misc]
        command = daemon.command
        place = command.index("-A") + 1
        (tmp_path / "file").write_text("of somebody else")
        daemon.command = [*command[:place], str(tmp_path / "file"), *command[place + 1 :]]
        daemon.launch()
        wait_for_failure(daemon)
        daemon.command = command
        daemon.start()
        assert device_of(daemon) == before
        assert wrong(daemon) == []


def test_a_takeover_whose_workers_do_not_run_serves_what_is_cached_and_goes_on_trying(
    config: dict[str, object], tmp_path: Path
) -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        before = device_of(daemon)
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        crash(daemon)
        (tmp_path / "sitecustomize.py").write_text(BROKEN)
        daemon._environment["PYTHONPATH"] = str(tmp_path)
        daemon.start()
        wait_until(lambda: daemon.log.read_text().count("ended with status 1; starting it again") > 4, "more tries", 60)
        assert not daemon.has_ended()
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
        crash(daemon)
        del daemon._environment["PYTHONPATH"]
        daemon.start()
        assert device_of(daemon) == before
        assert wrong(daemon) == []


def test_a_daemon_that_has_served_and_ends_by_an_error_leaves_its_mount_to_the_next(
    config: dict[str, object], expect_log: ExpectLog, tmp_path: Path
) -> None:
    expect_log("stays mounted", "of the test", "Traceback")
    bug = tmp_path / "bug"
    with not_started(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        command = daemon.command
        daemon.command = [sys.executable, "-c", FAILING, str(bug), *command[3:]]
        daemon.start()
        before, frontends = device_of(daemon), daemon.pids("fuse")
        with open(daemon.mountpoint / ONE_CHUNK, "rb") as file:
            bug.touch()
            wait_for_failure(daemon)
            assert all(map(is_running, frontends))
            daemon.command = command
            daemon.start()
            assert device_of(daemon) == before
            assert becomes_true(lambda: set(frontends) <= set(daemon.pids("fuse")), 60)
            assert file.read() == TRUTH[ONE_CHUNK.encode()]
        assert wrong(daemon) == []


def test_a_holder_that_closes_another_file_while_it_is_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a front end that nobody has noted would hold the session for ever."""
    held = journal.create()
    with open(held, "rb"):
        command = [
            sys.executable,
            "-c",
            "open('/proc/self/comm', 'w').write('nydusd: fuse 0'); print(flush=True); input()",
        ]
        with subprocess.Popen(
            command, pass_fds=[held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            readlink = os.readlink

            def vanishing(path: str) -> str:
                if path.endswith("/fd/0"):
                    raise FileNotFoundError(path)
                return readlink(path)

            monkeypatch.setattr(os, "readlink", vanishing)
            lane = adoption._Lane(0, 0, 0, 0, os.fstat(held).st_ino)
            found = adoption._strangers(cast(Any, SimpleNamespace(lanes=[lane])), [])
            assert [stranger.pid for stranger in found] == [holder.pid]
            for stranger in found:
                stranger.close()
            holder.communicate("\n")
