"""A backend that fails, and a cache disk that is full, below the kernel's EROFS: an error, no hole, and then data again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.discipline import wait_until
from tests.support.disk import NO_WRITES, Disk
from tests.support.faulty_server import Faulty, Reply, Request
from tests.support.mounted import CHUNK, Hub, Mounted, Step, Tree

Expect = Callable[..., None]
DRIVERS = ("fanotify", "blobfs")
FAULTS = ("status 404", "status 403", "wrong bytes", "silence", "no server")
NAMES = [f"{number:02}" for number in range(2 * len(FAULTS) + 1)]
"""They lie in this order in the blob, and are read from the last one on: so what is read ahead of a reader was read before."""
CACHED = NAMES[-1]
SECONDS = 60


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


def read(fd: int) -> bytes | int:
    """What is in a file of which nothing is in the page cache; or the errno of a read that failed. All of it, or nothing."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return os.pread(fd, 2 * CHUNK, 0)
    except OSError as error:
        assert error.errno is not None
        return error.errno


@contextlib.contextmanager
def opened(mounted: Mounted, name: str) -> Iterator[int]:
    fd = os.open(mounted.daemon.mountpoint / name, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def is_right(tree: Tree, name: str, fd: int) -> bool:
    """Whether a read succeeds; AssertionError if it gives anything but what is in the file, or another error than EIO."""
    found = read(fd)
    assert found in (errno.EIO, tree.contents[name]), (
        f"{name}: {os.strerror(found) if isinstance(found, int) else 'wrong'}"
    )
    return not isinstance(found, int)


def reads_right(mounted: Mounted, name: str) -> bool:
    """The same for a file that is opened for it."""
    with opened(mounted, name) as fd:
        return is_right(mounted.tree, name, fd)


# --- the backend ------------------------------------------------------------------------------------------------


class Registry:
    """The registry of the daemons; `fails` has a fault begin."""

    def __init__(self, tree: Tree) -> None:
        self._gate = threading.Event()
        self.server = Faulty.that_may_refuse()
        self.hub = Hub(tree, self.server)
        self.hub.open_to_all = True

    def _wrong(self, request: Request) -> Reply:
        right = self.hub.part(request)
        return Reply(right.status, right.headers, bytes(byte ^ 0xFF for byte in right.body))

    def _silent(self, _request: Request) -> Reply:
        self._gate.wait(SECONDS)
        return Reply(silent=True, reset=True)

    @contextlib.contextmanager
    def fails(self, fault: str) -> Iterator[None]:
        if fault == "no server":
            self.server.refuse()
            try:
                yield
            finally:
                self.server.accept()
            return
        answers: dict[str, Step] = {
            "status 404": Reply(404),
            "status 403": Reply(403),
            "wrong bytes": self._wrong,
            "silence": self._silent,
        }
        self.hub.always = answers[fault]
        self._gate.clear()
        try:
            yield
        finally:
            self.hub.always = None
            self._gate.set()


@pytest.fixture(scope="module")
def registry(tree: Tree) -> Iterator[Registry]:
    made = Registry(tree)
    yield made
    made.server.close()


@pytest.fixture(autouse=True)
def _connections_end_with_the_test(registry: Registry) -> Iterator[None]:
    yield
    registry.server.cut()


@pytest.fixture(scope="module")
def mounts(tree: Tree, registry: Registry) -> Iterator[list[Mounted]]:
    """The same image in both ways."""
    with contextlib.ExitStack() as stack:
        made = []
        for driver in DRIVERS:
            backend: dict[str, object] = {"host": registry.server.host}
            tuning: dict[str, object] = {"read_deadline": 1.5}
            mounted = Mounted(tree, backend, verb="erofs", args=("--driver", driver), tuning=tuning)
            made.append(stack.enter_context(mounted))
            assert reads_right(mounted, CACHED)
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_fail_while_the_backend_does_and_are_served_when_it_is_back(
    mounts: list[Mounted], registry: Registry, expect_log: Expect, fault: str
) -> None:
    expect_log("ERROR .*(blob|a read failed)")
    tree = mounts[0].tree
    second, first = NAMES[-3 - 2 * FAULTS.index(fault) :][:2]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(mounted, first)) for mounted in mounts]
        with registry.fails(fault):
            with ThreadPoolExecutor() as pool:
                assert list(pool.map(read, files)) == [errno.EIO] * len(DRIVERS)
            for mounted in mounts:
                assert reads_right(mounted, CACHED), "what is cached needs no backend"
        for fd, mounted in zip(files, mounts, strict=True):
            wait_until(partial(is_right, tree, first, fd), f"the end of {fault} for who has the file open", SECONDS)
            assert reads_right(mounted, first), "who opens it now"
            wait_until(
                partial(reads_right, mounted, second), f"the end of {fault} for what was not read before", SECONDS
            )
            assert mounted.wrong_in_cache() == []


# --- the disk of the cache --------------------------------------------------------------------------------------


@pytest.fixture
def disk() -> Iterator[Disk]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as folder, Disk(Path(folder)) as made:
        yield made


@contextlib.contextmanager
def full(disk: Disk) -> Iterator[None]:
    """A file takes all room that the disk has."""
    ballast = disk.path / "ballast"
    with open(ballast, "wb") as file:
        for size in (1 << 30, 4096):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
        yield
    ballast.unlink()


def told(mounted: Mounted) -> str:
    """What the API says of reads that need the disk; `nydusctl info` says the same."""
    (row,) = mounted.daemon.get("/api/v1/nydusd/mounts")["images"]  # type: ignore[index]
    text = "; ".join(row["uncached"])
    assert not text or text in mounted.daemon.ctl("info")
    return text


def test_with_fanotify_a_full_disk_fails_what_is_not_cached_until_there_is_room(
    tree: Tree, registry: Registry, disk: Disk, expect_log: Expect
) -> None:
    expect_log("a read failed: .*the cache folder cannot be used")
    backend: dict[str, object] = {"host": registry.server.host}
    cache = disk.path / "cache"
    with Mounted(tree, backend, verb="erofs", args=("--driver", "fanotify"), cache=cache) as mounted:
        assert reads_right(mounted, CACHED)
        with opened(mounted, NAMES[0]) as cold:
            with full(disk):
                assert told(mounted) == ""
                assert read(cold) == errno.EIO
                what = f"reads of what is not cached fail until it can be used: cache folder {cache}: "
                assert told(mounted) == what + os.strerror(errno.ENOSPC)
                assert what.removesuffix(f": cache folder {cache}: ") in mounted.log()
                assert "go on uncached" not in mounted.log()
                assert reads_right(mounted, CACHED), "what is cached needs no room"
                assert read(cold) == errno.EIO
            wait_until(partial(is_right, tree, NAMES[0], cold), "room for who has the file open", SECONDS)
        for name in NAMES:
            assert reads_right(mounted, name), name
        assert told(mounted) == ""
        assert "there is room for blob" in mounted.log()
        assert mounted.wrong_in_cache() == []


def test_with_fanotify_what_the_disk_did_not_take_is_never_read_as_zeros(
    tree: Tree, registry: Registry, expect_log: Expect
) -> None:
    """It is ready, in the page cache alone, and nobody would sync it for an hour: one file of the range is missing still."""
    expect_log("its disk did not take all that was written: who needs it waits|a read failed: .*cache folder")
    backend: dict[str, object] = {"host": registry.server.host}
    tuning: dict[str, object] = {"checkpoint_interval": 3600}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-"))
        slow = stack.enter_context(Disk(Path(folder), "commit=300"))
        cache = slow.path / "cache"
        made = Mounted(tree, backend, verb="erofs", args=("--driver", "fanotify"), cache=cache, tuning=tuning)
        mounted = stack.enter_context(made)
        files = {name: stack.enter_context(opened(mounted, name)) for name in reversed(NAMES[1:])}
        for name, fd in files.items():
            assert is_right(tree, name, fd)
        slow.does(NO_WRITES)
        drop(cache / f"{tree.blob_id}.blob.data")
        for name, fd in files.items():
            is_right(tree, name, fd)
        assert "the kernel reads it by itself" not in mounted.log()


def drop(path: Path) -> None:
    """Have the kernel read a file anew from the device, whatever it could not write there; nobody is told of that."""
    with open(path, "rb") as file:
        ctypes.CDLL(None).syncfs(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_with_blobfs_a_full_disk_costs_no_read(tree: Tree, registry: Registry, disk: Disk) -> None:
    backend: dict[str, object] = {"host": registry.server.host}
    with Mounted(tree, backend, verb="erofs", args=("--driver", "blobfs"), cache=disk.path / "cache") as mounted:
        assert reads_right(mounted, CACHED)
        with full(disk):
            for name in NAMES:
                assert reads_right(mounted, name), name
            assert told(mounted).startswith("reads go on uncached: cache folder ")
        for name in NAMES:
            assert reads_right(mounted, name), name
