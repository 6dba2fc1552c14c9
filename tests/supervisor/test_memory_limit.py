"""A daemon in a control group whose memory is at an end: the kernel kills who it likes there, as often as it likes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.killing.scene import read
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import discipline, is_running, wait_until
from tests.support.memory_group import MemoryGroup
from tests.support.mounted import CHUNK, Tree

NAMES = [f"{number:02}" for number in range(16)]
ROLES = ("decompress", "fetch", "fuse", "api", "fork server", "supervisor")
SPARE = 4 << 20
"""Bytes that a daemon may take more than it has."""
KILLS = 8
"""Fewer than workers may be killed over one job before that is given up."""
SECONDS = 60.0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with MemoryGroup() as made:
        yield made


class Reader(threading.Thread):
    """Reads all files past the page cache, again and again, and compares each byte."""

    def __init__(self, daemon: Daemon, tree: Tree) -> None:
        super().__init__()
        self._daemon = daemon
        self._tree = tree
        self._stopping = threading.Event()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.rounds = 0

    def run(self) -> None:
        for number in itertools.count():
            name = NAMES[number % len(NAMES)]
            if self._stopping.wait(0.001):
                return
            try:
                if read(self._daemon.mountpoint / name) != self._tree.contents[name]:
                    self.wrong.append(name)
            except OSError as error:
                self.failed.append(f"{name}: {error}")
            self.rounds += name == NAMES[-1]

    def go_on(self) -> None:
        before = self.rounds
        wait_until(lambda: self.rounds > before + 1, "the reader to go on", SECONDS)

    def stop(self) -> None:
        self._stopping.set()
        self.join()


@contextmanager
def served(tree: Tree, cache: Path, group: MemoryGroup, kind: str, score: int) -> Iterator[tuple[Daemon, Reader]]:
    """A daemon in the group, and its reader. As systemd does, somebody starts its command again whenever it has ended."""
    device = {
        "backend": {"type": "localfs", "config": {"dir": str(tree.bootstrap.parent / "blobs")}},
        "cache": {"type": kind, "config": {"work_dir": str(cache)}},
    }
    tuning = {"front_ends": 1, "fetch_workers": 1, "decompress_workers": 1, "worker_idle": 0, "cache_keep": 0}
    tuning["cache_quota"] = len(NAMES) * CHUNK // 4
    config = {"device": device, "mode": "direct", "amplify_io": 0, "nydusd": tuning}
    daemon = Daemon(tree.bootstrap, cache.parent, cache=cache, config=config)
    daemon.command = group.command(daemon.command, score)
    over = threading.Event()

    def look_after() -> None:
        while not over.wait(0.05):
            if daemon.has_ended():
                daemon.launch()

    with daemon:
        keeper, reader = threading.Thread(target=look_after), Reader(daemon, tree)
        keeper.start()
        reader.start()
        try:
            yield daemon, reader
        finally:
            group.limit(None)
            reader.stop()
            wait_until(daemon.serves, "the daemon to serve", SECONDS)
            over.set()
            keeper.join()


def victim(daemon: Daemon, role: str) -> int:
    """The process that the kernel is to kill first."""
    pid = daemon.pid if role == "supervisor" else daemon.pids(role)[0]
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    return pid


def test_each_kind_of_process_is_killed_for_want_of_memory_and_no_read_fails(
    tree: Tree, tmp_path: Path, group: MemoryGroup
) -> None:
    """Nothing is cached: each read needs a worker."""
    with served(tree, tmp_path / "cache", group, "", 500) as (daemon, reader):
        strength = {"fuse": 1, "decompress": 1, "fetch": 1, "api": 1, "fork server": 2}
        for role in ROLES:
            for other, count in strength.items():
                wait_for_role(daemon, other, count, seconds=SECONDS)
            pid = victim(daemon, role)
            group.exhaust(SPARE)
            wait_until(lambda pid=pid: not is_running(pid), f"the end of {role} {pid}", SECONDS)  # type: ignore[misc]
            group.limit(None)
            wait_until(daemon.serves, "the daemon to serve", SECONDS)
            reader.go_on()
        assert (reader.wrong, reader.failed) == ([], [])


def test_want_of_memory_that_kills_again_and_again_costs_no_wrong_byte_and_leaves_nothing(
    tree: Tree, tmp_path: Path, group: MemoryGroup
) -> None:
    """Who is killed is the kernel's choice. Reads may fail while all who hold the mount are killed at once, and no later."""
    with served(tree, tmp_path / "cache", group, "blobcache", 1000) as (daemon, reader):
        reader.go_on()
        before = group.killed()
        discipline.logs.allow("Cannot allocate memory")
        group.exhaust(SPARE, KILLS)
        assert group.killed() >= before + KILLS
        group.limit(None)
        wait_until(daemon.serves, "the daemon to serve", SECONDS)
        reader.stop()
        assert reader.wrong == []
        for name in NAMES:
            assert read(daemon.mountpoint / name) == tree.contents[name]
    data = f"{tree.blob_id}.blob.data"
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        *(data, f"{data}.chunk_map", f"{data}.chunk_map.nydusd", f"{tree.blob_id}.blob.meta")
    }
