"""EROFS with fanotify under systemd: even when everything of ours is killed at once, readers wait and see no hole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.erofs.test_kills import NAMES, Held
from tests.supervisor.test_adoption import Stored
from tests.support import manifest
from tests.support.daemon import Daemon
from tests.support.discipline import cmdline, descendants, detach_mount, is_running, wait_until
from tests.support.faulty_server import faulty
from tests.support.mounted import Hub, Tree
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


def test_fuse_does_not_mount_above_what_a_killed_erofs_daemon_has_left(expect_log: Callable[..., None]) -> None:
    what = image("v6-zstd-blake3")
    with Daemon(what.bootstrap, what.blobs, verb="erofs", args=("--driver", "fanotify")) as daemon:
        erofs, fuse = daemon.command, [*daemon.command[:-2]]
        fuse[fuse.index("erofs")] = "fuse"
        daemon.kill_supervisor()
        daemon.command = fuse
        with pytest.raises(AssertionError, match="has left its mount here"):
            daemon.start()
        detach_mount(str(daemon.mountpoint))
        daemon.command = erofs
        daemon.start()
