"""What the supervisor makes of the kernel's messages: a socket in the place of the device, a plain file as the kernel's."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.frontends.fscache.device import CacheDevice
from nydusd.ipc.inflight import InflightRow, make_board, waiting
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Job
from nydusd.supervisor import kernel_files
from nydusd.supervisor.kernel_files import KERNEL, KernelFiles, Wanted
from tests.support.segments import segment_name

OPEN, CLOSE, READ = 0, 1, 2


class World:
    """The files, and all around them. `jobs` were submitted; `busy`: a worker has a job of the blob; `shown`: who waits."""

    def __init__(self, folder: Path, board: str) -> None:
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.kernel.settimeout(10)
        self.device = CacheDevice(ours.detach())
        self.folder = folder
        self.jobs: list[Job] = []
        self.asked: list[tuple[object, ...]] = []
        self.let_go: list[object] = []
        self.closed = 0
        self.busy = self.may_open = False
        self._board = make_board(board, 1)
        self.blob = SimpleNamespace(
            users=1,
            state="new",
            unreachable=False,
            may_open=lambda: self.may_open,
            reason="no backend",
            spec=SimpleNamespace(cookie=(0, 0)),
            segment=None,
        )
        self.blob.spec.info = SimpleNamespace(blob_id="b" * 64)
        self.blob.give = self._give
        self.wanted = {
            "image": Wanted(5000, None, "/image/bootstrap"),
            "blob": Wanted(1 << 20, cast(BlobCache, self.blob), "", prefetch=True),
        }
        self.prefetched: list[object] = []
        router = SimpleNamespace(
            forget=self._forget,
            open_blob=lambda cache: self.asked.append(("open", cache)),
            request=lambda *what: self.asked.append(what),
            cancel=lambda client, number: self.asked.append(("cancel", client, number)),
            release=lambda lease: self.asked.append(("release", lease)),
        )
        prefetch = SimpleNamespace(
            want=lambda cache, first, count: self.prefetched.append((first, count)), cancel=lambda cache: None
        )
        pool = SimpleNamespace(submit=self.jobs.append, has=lambda cache: self.busy)
        mounts = SimpleNamespace(unused=SimpleNamespace(let_go=self.let_go.append))
        make = cast(Callable[..., KernelFiles], KernelFiles)
        self._row = InflightRow(board, 0)
        self.files = make(router, mounts, prefetch, pool, pool, self._find, self._closed, 30.0, self._row)

    def close(self) -> None:
        self.files.close()
        self.device.close()
        self.kernel.close()
        self._row.close()
        self._board.close()

    def shown(self) -> list[tuple[int, int]]:
        """The number and the file of each read that is shown to wait."""
        return [(row["unique"], row["inode"]) for row in waiting(self._board)]

    def _find(self, domain: str, key: str) -> Wanted | None:
        return self.wanted.get(key) if domain == "d" else None

    def _closed(self) -> None:
        self.closed += 1

    def _give(self, cookie: tuple[int, int]) -> None:
        self.blob.spec.cookie = cookie

    def _forget(self, cache: Any) -> None:
        cache.state, cache.spec.cookie = "new", (0, 0)

    def say(self, code: int, body: bytes = b"", number: int = 7, object_id: int = 1) -> None:
        self.kernel.send(struct.pack("=IIII", number, code, 16 + len(body), object_id) + body)
        self.files.take_messages(self.device)

    def open(self, key: str, domain: str = "d", object_id: int = 1) -> tuple[int, str]:
        """OPEN of a file: our descriptor of it, and the answer."""
        fd = self.say_open(key, domain, object_id)
        return fd, self.kernel.recv(100).decode()

    def say_open(self, key: str, domain: str = "d", object_id: int = 1) -> int:
        fd = os.open(self.folder / key, os.O_RDWR | os.O_CREAT)
        volume = f"erofs,{domain}\0".encode()
        body = struct.pack("=IIII", len(volume), len(key), fd, 0) + volume + key.encode()
        self.say(OPEN, body, object_id=object_id)
        return fd


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with segment_name() as board:
        made = World(tmp_path, board)
        yield made
        made.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_files, "_SAY_AGAIN", 0.0)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_that_is_not_known_is_refused_and_closed(world: World) -> None:
    for key, domain in (("stranger", "d"), ("image", "other")):
        fd, answer = world.open(key, domain)
        assert (answer, is_open(fd)) == ("copen 7,-2", False)


def test_a_message_that_is_not_understood_is_refused_and_its_descriptor_closed(world: World) -> None:
    fd = os.open(world.folder / "x", os.O_RDWR | os.O_CREAT)
    world.say(OPEN, struct.pack("=IIII", 4, 1, fd, 0) + b"nfs\0x")
    assert (world.kernel.recv(100), is_open(fd)) == (b"copen 7,-5", False)
    world.say(99)
    world.say(READ, struct.pack("=QQ", 0, 4096), object_id=5)  # of a file that was never opened
    world.say(CLOSE, object_id=5)
    assert world.jobs == []
    assert world.open("image")[1] == "copen 7,5000", "and life goes on"


def test_a_read_of_a_metadata_file_is_a_copy_by_a_worker_and_its_descriptor_outlives_it(world: World) -> None:
    fd, answer = world.open("image")
    assert (answer, os.get_inheritable(fd)) == ("copen 7,5000", False)
    world.say(READ, struct.pack("=QQ", 4096, 8192))
    (job,) = world.jobs
    assert (job.kind, job.payload["path"], job.payload["cookie"]) == (
        "copy_bootstrap",
        "/image/bootstrap",
        [os.getpid(), fd],
    )
    assert job.payload["offset"] <= 4096 < job.payload["offset"] + job.payload["length"]
    assert world.shown() == [(7, os.fstat(fd).st_ino)]
    world.say(CLOSE)
    world.files.turn()
    assert is_open(fd), "the worker may not have borrowed it yet, and its number must not become another's"
    job.done(job, {})
    assert world.shown() == []
    world.files.turn()
    assert (is_open(fd), world.files.waits) == (False, False)


def test_a_blob_is_opened_and_prefetched_and_its_readers_wait_for_that(world: World) -> None:
    fd, answer = world.open("blob")
    assert answer == f"copen 7,{1 << 20}"
    assert (world.blob.users, world.blob.spec.cookie, world.prefetched) == (2, (os.getpid(), fd), [(0, -1)])
    for _ in range(2):  # after a takeover the kernel says once more what was not answered
        world.say(READ, struct.pack("=QQ", 0, 4096), number=8)
        assert world.shown() == [(8, os.fstat(fd).st_ino)]
    assert world.files.waits
    assert all(what[0] == "open" for what in world.asked)
    world.blob.state = "failed"
    world.files.turn()
    assert not world.files.waits, "what cannot be opened fails its readers at once"
    assert world.shown() == []


def test_a_blob_that_could_not_be_opened_is_tried_again_for_who_reads_it_later(world: World) -> None:
    world.open("blob")
    world.blob.state, world.may_open = "failed", True
    world.asked.clear()
    world.say(READ, struct.pack("=QQ", 0, 4096), number=8)
    assert [what[0] for what in world.asked] == ["open"]
    assert world.files.waits
    world.may_open = False  # it has failed again
    world.files.turn()
    assert not world.files.waits


def test_the_descriptor_of_a_blob_is_closed_when_no_worker_has_a_job_of_it(world: World) -> None:
    fd, _ = world.open("blob")
    world.say(READ, struct.pack("=QQ", 0, 4096), number=8)
    world.busy = True
    world.say(CLOSE)
    assert ("cancel", KERNEL, 8) in world.asked
    assert world.shown() == [], "nobody reads a file that is closed"
    assert (world.closed, world.blob.spec.cookie) == (1, (0, 0))
    world.files.turn()
    assert (is_open(fd), world.files.waits, world.let_go) == (True, True, [])
    world.busy = False
    world.files.turn()
    assert (is_open(fd), world.files.waits, world.let_go) == (False, False, [world.blob])


def test_a_blob_that_the_kernel_opens_anew_goes_on_with_the_new_file(world: World) -> None:
    first, _ = world.open("blob", object_id=1)
    second, _ = world.open("blob", object_id=2)
    assert world.blob.spec.cookie == (os.getpid(), second)
    world.say(CLOSE, object_id=1)
    world.files.turn()
    assert (is_open(first), world.blob.spec.cookie) == (False, (os.getpid(), second))


def test_a_read_of_what_a_predecessor_has_open_still_is_asked_for_until_it_can_be_answered(
    world: World, at_once: None
) -> None:
    """A worker of the one before is stuck in a disk, and has the file: no OPEN comes until it has ended."""
    for _ in range(2):
        world.say(READ, struct.pack("=QQ", 0, 4096), number=8, object_id=5)
        world.say(READ, struct.pack("=QQ", 4096, 4096), number=9, object_id=5)
        assert world.files.waits
        world.files.turn()
        assert world.kernel.recv(100) == b"restore"
        assert not world.files.waits, "once for all that was said"
    world.open("image", object_id=6)
    world.say(READ, struct.pack("=QQ", 0, 4096), number=8, object_id=6)
    assert (len(world.jobs), world.files.waits) == (1, False)


def test_the_kernel_is_asked_again_after_a_pause_only(world: World) -> None:
    world.kernel.setblocking(False)
    world.say(READ, struct.pack("=QQ", 0, 4096), object_id=5)
    world.files.turn()
    with pytest.raises(BlockingIOError):
        world.kernel.recv(100)
    assert world.files.waits


def test_an_open_whose_answer_the_kernel_does_not_take_is_asked_for_again(
    world: World, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no memory for the answer: whoever mounts waits until there is one."""
    for key in ("blob", "stranger"):
        with monkeypatch.context() as patch:
            patch.setattr(CacheDevice, "opened", lambda *_: False)
            fd = world.say_open(key)
        assert not is_open(fd), "else the kernel could not open it anew"
        world.files.turn()
        assert world.kernel.recv(100) == b"restore"
    assert world.open("blob")[1] == f"copen 7,{1 << 20}"


def test_what_is_said_again_while_it_is_answered_is_done_once(world: World) -> None:
    world.open("image", object_id=1)
    world.open("blob", object_id=2)
    for _ in range(2):
        world.say(READ, struct.pack("=QQ", 0, 4096), number=8, object_id=1)
        world.say(READ, struct.pack("=QQ", 0, 4096), number=9, object_id=2)
    assert (len(world.jobs), len(world.shown())) == (1, 2)
    assert ("cancel", KERNEL, 9) not in world.asked
    world.say(READ, struct.pack("=QQ", 4096, 4096), number=9, object_id=2)
    assert ("cancel", KERNEL, 9) in world.asked, "its reader was killed, and the number is another's"
    assert len(world.shown()) == 2
    (job,) = world.jobs
    job.done(job, {})
    world.say(READ, struct.pack("=QQ", 0, 4096), number=8, object_id=1)
    assert len(world.jobs) == 2, "the kernel did not take the answer"
