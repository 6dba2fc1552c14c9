"""The wall clock is put forth and back by days while a daemon works: nothing that it does depends on it.

In all processes of a daemon, for all of its code that asks for the time of day (`tests/support/shifted`). Not shown is what the
kernel does by that clock, which gives files the true times, and OpenSSL, which judges certificates by the true time.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.killing.scene import read
from tests.support.clock import Clock
from tests.support.daemon import wait_for_role
from tests.support.discipline import wait_until
from tests.support.faulty_server import Reply, faulty
from tests.support.mounted import CHUNK, Hub, Mounted, Tree

NAMES = [f"{number:02}" for number in range(24)]
JUMPS = (4000, -40)
"""Days from the true time, one after the other."""
QUOTA = 8 * CHUNK
SECONDS = 60.0
ROLES = ("fetch", "decompress")


class Signs:
    """The receiving end of systemd's watchdog: how many signs of life came."""

    def __init__(self, folder: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "400000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.environment["NOTIFY_SOCKET"])
        self._socket.setblocking(False)
        self._count = 0

    def count(self) -> int:
        """So far."""
        try:
            while True:
                self._count += b"WATCHDOG=1" in self._socket.recv(4096)
        except BlockingIOError:
            return self._count

    def close(self) -> None:
        self._socket.close()


class Reader(threading.Thread):
    """Reads all files past the page cache, again and again, while it is let; `rounds` is how often."""

    def __init__(self, mounted: Mounted) -> None:
        super().__init__()
        self._mounted = mounted
        self._stopping = threading.Event()
        self._may_read = threading.Event()
        self._may_read.set()
        self.problems: list[str] = []
        self.rounds = 0

    def run(self) -> None:
        for number in itertools.count():
            self._may_read.wait()
            if self._stopping.is_set():
                return
            name = NAMES[number % len(NAMES)]
            try:
                if read(self._mounted.daemon.mountpoint / name) != self._mounted.tree.contents[name]:
                    self.problems.append(f"{name}: wrong bytes")
            except OSError as error:
                self.problems.append(f"{name}: {error}")
            self.rounds += name == NAMES[-1]

    def pause(self) -> None:
        self._may_read.clear()

    def go_on(self) -> None:
        self._may_read.set()

    def stop(self) -> None:
        self._stopping.set()
        self._may_read.set()
        self.join()


class Jumping:
    """A daemon whose clock jumps, on a registry, with a reader."""

    def __init__(self, mounted: Mounted, hub: Hub, clock: Clock, signs: Signs, reader: Reader) -> None:
        self.mounted = mounted
        self.hub = hub
        self.clock = clock
        self.signs = signs
        self.reader = reader

    def facts(self, what: str) -> dict[str, object]:
        answer = self.mounted.daemon.get(f"/api/v1/nydusd/{what}")
        assert isinstance(answer, dict)
        return answer

    def evicted(self) -> int:
        folders = self.facts("quota")["folders"]
        assert isinstance(folders, dict)
        return sum(int(folder["evicted_chunks"]) for folder in folders.values())

    def workers(self) -> list[dict[str, object]]:
        rows = self.facts("workers")["processes"]
        assert isinstance(rows, list)
        return [row for row in rows if row["role"] in ROLES]

    def goes_on(self, what: str, count: Callable[[], int], more: int = 1) -> None:
        before = count()
        wait_until(lambda: count() >= before + more or bool(self.reader.problems), f"{what} after a jump", SECONDS)
        assert self.reader.problems == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@contextmanager
def jumping(tree: Tree, tmp_path: Path, **workers: float) -> Iterator[Jumping]:
    """`workers`: how they are looked after."""
    clock, signs = Clock(tmp_path), Signs(tmp_path)
    tuning: dict[str, object] = {"cache_quota": QUOTA, "cache_keep": 0, "front_ends": 2, **workers}
    with faulty() as server:
        hub = Hub(tree, server)
        environment = clock.environment | signs.environment
        with Mounted(tree, {"host": server.host}, environment=environment, tuning=tuning) as mounted:
            reader = Reader(mounted)
            reader.start()
            try:
                yield Jumping(mounted, hub, clock, signs, reader)
            finally:
                reader.stop()
                signs.close()
    assert reader.problems == []


def jump(this: Jumping, days: int) -> None:
    """All that is to go on, goes on."""
    hub, reader = this.hub, this.reader
    tokens = hub.given
    this.clock.put(days)
    this.goes_on("reading", lambda: reader.rounds)
    this.goes_on("making room", this.evicted)
    this.goes_on("signs of life", this.signs.count, 3)
    assert hub.given == tokens, "a token that is good for 5 minutes more was thrown away"
    with hub.server.lock:
        hub.good.clear()
        # By the server's clock, which is the true one.
        later = {"Date": formatdate(usegmt=True), "Retry-After": formatdate(time.time() + 1, usegmt=True)}
        hub.steps += [Reply(503), Reply(429, later), Reply(500)]
    wait_until(lambda: hub.given > tokens and not hub.steps, "another token, and all answers", SECONDS)
    this.goes_on("reading", lambda: reader.rounds)
    reader.pause()
    wait_until(lambda: {row["state"] for row in this.workers()} == {"resting"}, "the workers' rest", SECONDS)
    reader.go_on()


def test_readers_quota_rest_watchdog_and_retries_go_on(tree: Tree, tmp_path: Path) -> None:
    with jumping(tree, tmp_path, worker_idle=0.3, worker_patience=60.0) as this:
        this.goes_on("reading", lambda: this.reader.rounds)
        front_ends = this.mounted.daemon.pids("fuse")
        for days in JUMPS:
            jump(this, days)
        assert this.mounted.daemon.pids("fuse") == front_ends
        log = this.mounted.log()
    years = {time.gmtime(time.time() + days * 86400).tm_year for days in JUMPS}
    assert years <= {int(line[1:5]) for line in log.splitlines() if line[1:5].isdecimal()}, "the clock did not jump"
    assert "hung" not in log, "nobody hung"


def test_worker_that_hangs_is_found_out(tree: Tree, tmp_path: Path) -> None:
    """The clock is put back just when it is stopped. That nobody is taken for hung when it is put forth is shown above."""
    with jumping(tree, tmp_path, worker_idle=0, worker_patience=2.0) as this:
        this.goes_on("reading", lambda: this.reader.rounds)
        wait_for_role(this.mounted.daemon, "decompress", 1, seconds=SECONDS)
        (pid,) = this.mounted.daemon.pids("decompress")
        os.kill(pid, signal.SIGSTOP)
        this.clock.put(-40)
        wait_for_role(this.mounted.daemon, "decompress", 1, without=pid, seconds=SECONDS)
        this.goes_on("reading", lambda: this.reader.rounds)
