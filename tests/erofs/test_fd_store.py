"""EROFS with fanotify under systemd: even when everything of ours is killed at once, readers wait and see no hole."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.erofs.test_images import differences
from tests.erofs.test_kills import NAMES, Held, own
from tests.erofs.test_mounts import SMALL, Many
from tests.killing.plan import ROOT
from tests.supervisor.stored import Stored
from tests.support import manifest
from tests.support.daemon import Daemon
from tests.support.discipline import cmdline, descendants, is_running, wait_until
from tests.support.faulty_server import faulty
from tests.support.mounted import CHUNK, Hub, Tree
from tests.support.oracle import image


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    made = Stored(tmp_path)
    yield made
    made.close()


def test_readers_wait_while_nobody_of_ours_lives_and_the_next_daemon_answers_them(tree: Tree, stored: Stored) -> None:
    with faulty() as server:
        held = Held(tree, Hub(tree, server))
        daemon = held.daemon
        daemon._environment |= stored.environment
        command = daemon.command
        with held.mounted:
            stored.until_ready()
            assert {name.rsplit("-", 1)[1] for name in stored.fds} == {"group", "journal", "table"}
            reader = held.waiting_reader(NAMES[0])
            kill_all(daemon)
            late = held.read(NAMES[1])
            assert reader.poll() is None and late.poll() is None
            held.gate.set()
            daemon.command = stored.giving(command)
            daemon.start()
            stored.until_ready()
            held.right(reader, NAMES[0])
            held.right(late, NAMES[1])
            assert "is taken over" in daemon.log_tail()
            daemon.command = command


def kill_all(daemon: Daemon) -> None:
    """SIGKILL of every process at one moment: all are stopped first."""
    pids = [daemon.pid, *daemon.family()]
    pids += [pid for pid in descendants(os.getpid()) if cmdline(pid).startswith("nydusd: ") and pid not in pids]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    daemon.kill_supervisor()
    wait_until(lambda: not any(is_running(pid) for pid in pids), "their end", 60)


@pytest.mark.parametrize(("name", "driver"), [("v6-zstd-blake3", "fanotify"), ("v6-tarfs", "tarfs")])
def test_a_restart_by_systemd_keeps_the_mount(name: str, driver: str, tmp_path: Path, stored: Stored) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text("#!/bin/sh\necho 1 ours.service restart running\n")
    systemctl.chmod(0o755)
    what = image(name)
    environment = stored.environment | {"NYDUSD_UNIT": "ours.service", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    daemon = Daemon(what.bootstrap, what.blobs, verb="erofs", args=("--driver", driver), environment=environment)
    with daemon:
        rows = manifest.load(what.manifest).values()
        path = next(manifest.unescape(str(row["path"])) for row in rows if row.get("size") and "sha256" in row)
        device = os.stat(daemon.mountpoint).st_dev
        with open(daemon.mountpoint / path.decode(), "rb") as held:
            os.kill(daemon.pid, signal.SIGTERM)
            assert daemon._process is not None and daemon._process.wait(60) == 0
            assert os.stat(daemon.mountpoint).st_dev == device
            del daemon._environment["NYDUSD_UNIT"]
            daemon.start()
            assert os.stat(daemon.mountpoint).st_dev == device
            assert held.read()
        assert "is taken over" in daemon.log_tail()


SCARCE = """
import os, sys
if "erofs" in sys.orig_argv:
    from nydusd.errors import ScarceError
    from nydusd.supervisor.mounts import Mounts
    really = Mounts.know
    def know(self, recorded):
        if recorded.place == "/b" and os.path.exists(os.environ["SCARCE"]):
            raise ScarceError("no file descriptor is left")
        return really(self, recorded)
    Mounts.know = know
"""
"""Done by the interpreter itself in a supervisor, for which too little is left to know one image again."""


def test_a_restart_in_a_takeover_keeps_what_is_not_known_again_yet(tmp_path: Path, stored: Stored) -> None:
    systemctl, custom, scarce = tmp_path / "systemctl", tmp_path / "sitecustomize.py", tmp_path / "scarce"
    systemctl.write_text("#!/bin/sh\necho 1 ours.service restart running\n")
    systemctl.chmod(0o755)
    custom.write_text(SCARCE)
    many = Many()
    many._environment |= stored.environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SCARCE": str(scarce)}
    many._environment |= {"NYDUSD_UNIT": "ours.service", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    places = ("/a", "/b")
    with many:
        for place in places:
            assert many.put(place) == (204, "")
        devices = [os.stat(many.at(place)).st_dev for place in places]
        many.kill_supervisor()
        scarce.touch()
        many.launch()
        wait_until(lambda: "/b is known again later" in many.log_tail(), "one image not to be known", 60)
        os.kill(many.pid, signal.SIGTERM)
        wait_until(many.has_ended, "its end", 60)
        many.forget()
        scarce.unlink()
        assert [os.stat(many.at(place)).st_dev for place in places] == devices
        del many._environment["NYDUSD_UNIT"]
        many.start()
        assert [os.stat(many.at(place)).st_dev for place in places] == devices
        for place in places:
            assert differences(SMALL, many.at(place)) == []


def test_readers_of_a_mount_that_cannot_be_taken_over_get_an_error_and_no_hole(
    stored: Stored, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    """Nobody but systemd has the fds, and it is told to let go of them: a guard of theirs has them before."""
    expect_log("a read failed: .*(the daemon was stopped|nobody has fetched it in time)")
    tree = Tree(NAMES, tmp_path)
    with faulty() as server:
        held = Held(tree, Hub(tree, server))
        daemon = held.daemon
        daemon._environment |= stored.environment
        command = daemon.command
        with held.mounted:
            stored.until_ready()
            reader = held.waiting_reader(NAMES[0])
            late = os.open(daemon.mountpoint / NAMES[1], os.O_RDONLY)
            kill_all(daemon)
            os.utime(tree.bootstrap)  # it is another image now
            held.gate.set()
            daemon.command = stored.giving(command)
            daemon.start()
            stored.until_ready()
            reader.communicate(timeout=60)
            assert reader.returncode == errno.EIO
            with pytest.raises(OSError) as failure:
                os.pread(late, CHUNK, 0)
            assert failure.value.errno == errno.EIO
            os.close(late)
            held.right(held.read(NAMES[2]), NAMES[2])
            wait_until(lambda: len(own("erofs")) == 1 and len(own("guard")) == 1, "the end of its guard", 60)
            daemon.command = command
