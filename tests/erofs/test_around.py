"""What surrounds small reads of cached data over blobfs is read into the page cache, by a process that nobody depends on."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from bench.image import build
from nydusd.formats.model import Extent
from nydusd.frontends.blobfs.around import NOTE, WINDOW, Around
from nydusd.frontends.blobfs.device import RangeDevice
from nydusd.frontends.blobfs.notes import REGION, Budget, Notes, NotingDevice, Pauses
from nydusd.storage.api.io import ChunkRun
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import is_running, wait_until

if TYPE_CHECKING:
    from nydusd.storage.api.device import BlobView

_CACHESTAT = 451
PAGE = 4096
PAGES = WINDOW // PAGE
CHUNK = WINDOW // 2
SIZE = 16 * WINDOW
_libc = ctypes.CDLL(None, use_errno=True)


def cached(fd: int, offset: int = 0, size: int = 0) -> int:
    """Pages of a range of a file, or of all of it, that the page cache has."""
    span, counts = (ctypes.c_uint64 * 2)(offset, size), (ctypes.c_uint64 * 5)()
    assert _libc.syscall(_CACHESTAT, fd, span, counts, 0) == 0, os.strerror(ctypes.get_errno())
    return counts[0]


class Mounted(Daemon):
    """An image of one file, `data`, whose blob is the same bytes; nothing is fetched but what is read."""

    def __init__(self, folder: Path) -> None:
        (folder / "tree").mkdir()
        self.data = os.urandom(SIZE)
        (folder / "tree" / "file").write_bytes(self.data)
        built = build(folder / "tree", folder / "image", CHUNK)
        config = image_config(built.blob.parent, folder / "cache") | {"amplify_io": 0}
        super().__init__(built.bootstrap, built.blob.parent, config=config, verb="erofs", args=("--driver", "blobfs"))

    def around(self, without: int = 0) -> int:
        """The pid of the process that reads around, once it does."""
        wait_for_role(self, "around", 1, without)
        (pid,) = self.pids("around")
        wait_until(lambda: any(name.endswith("/notes") for name in open_files(pid)), "the pipe", 30)
        return pid

    def open(self) -> tuple[int, int]:
        """Fds of the file in the image, and of the blob below it."""
        (blob,) = Path(os.environ["NYDUSD_RUNTIME_DIR"]).glob("*.blobs/*")
        fds = os.open(self.mountpoint / "file", os.O_RDONLY), os.open(blob, os.O_RDONLY)
        os.posix_fadvise(fds[0], 0, 0, os.POSIX_FADV_RANDOM)
        return fds

    def read(self, fds: tuple[int, int], offset: int) -> None:
        """One page, which nothing has in the page cache."""
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fds[0], PAGE, offset) == self.data[offset : offset + PAGE]

    def reads_around(self) -> None:
        """Wait until a small read of cached data has the kernel read the window. Each turn takes another one."""
        fds = self.open()
        windows = iter(range(0, SIZE, WINDOW))

        def once() -> bool:
            start = next(windows)
            self.read(fds, start)
            self.read(fds, start + CHUNK)  # both chunks are there now
            limit = time.monotonic() + 1
            while time.monotonic() < limit and cached(fds[1], start, WINDOW) < PAGES:
                time.sleep(0.01)
            return cached(fds[1], start, WINDOW) == PAGES

        try:
            wait_until(once, "a window in the page cache", 30)
        finally:
            for fd in fds:
                os.close(fd)


def open_files(pid: int) -> list[str]:
    """What a process has open; nothing if it has ended."""
    try:
        return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Mounted]:
    with Mounted(tmp_path) as daemon:
        yield daemon


def test_the_window_of_a_small_read_is_read_if_all_of_it_is_there(daemon: Mounted) -> None:
    daemon.around()
    fds = daemon.open()
    daemon.read(fds, 0)  # one of two chunks of this window
    for offset in range(2 * WINDOW, 3 * WINDOW, CHUNK):
        daemon.read(fds, offset)
    wait_until(lambda: cached(fds[1], 2 * WINDOW, WINDOW) == PAGES, "the window whose chunks are there")
    daemon.read(fds, 0)
    fetched = daemon.backend_reads()
    assert fetched == 3
    for offset in range(4 * WINDOW, 5 * WINDOW, CHUNK):
        daemon.read(fds, offset)
    wait_until(lambda: cached(fds[1], 4 * WINDOW, WINDOW) == PAGES, "what was noted after that")
    assert cached(fds[1]) == PAGES
    assert daemon.backend_reads() == fetched + 2
    for fd in fds:
        os.close(fd)


def test_where_two_windows_are_wanted_their_region_is_read(daemon: Mounted) -> None:
    daemon.around()
    assert (daemon.mountpoint / "file").read_bytes() == daemon.data
    fds = daemon.open()
    daemon.read(fds, REGION)
    wait_until(lambda: cached(fds[1]) == PAGES, "the window of one read")

    def reads_in_two() -> bool:  # each front end knows of what it was asked
        daemon.read(fds, REGION + 2 * WINDOW)
        daemon.read(fds, REGION + 5 * WINDOW)
        time.sleep(0.3)
        return cached(fds[1], REGION, REGION) == REGION // PAGE

    wait_until(reads_in_two, "the region", 30)
    assert cached(fds[1]) == REGION // PAGE
    for fd in fds:
        os.close(fd)


def test_it_keeps_no_file_open_that_nobody_reads(daemon: Mounted) -> None:
    pid = daemon.around()
    daemon.reads_around()
    wait_until(lambda: not any(".blobs/" in name for name in open_files(pid)), "the blob closed")


def test_one_that_is_killed_is_replaced(daemon: Mounted) -> None:
    pid = daemon.around()
    daemon.kill(pid)
    daemon.around(without=pid)
    daemon.reads_around()


def test_reads_and_a_stop_do_not_wait_for_one_that_is_stopped(daemon: Mounted) -> None:
    pid = daemon.around()
    daemon.reads_around()
    os.kill(pid, signal.SIGSTOP)
    with open(daemon.mountpoint / "file", "rb") as file:
        assert file.read() == daemon.data
    fds = daemon.open()
    for offset in range(PAGE, SIZE, WINDOW):
        daemon.read(fds, offset)
    for fd in fds:
        os.close(fd)


def test_it_ends_with_its_supervisor_also_when_it_is_stopped_and_the_next_has_another(daemon: Mounted) -> None:
    pid = daemon.around()
    daemon.reads_around()
    os.kill(pid, signal.SIGSTOP)
    daemon.kill_supervisor()
    wait_until(lambda: not is_running(pid), "the end of the former")
    daemon.start()
    daemon.around()
    daemon.reads_around()


def test_what_was_noted_long_ago_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, offset, _size, _advice: asked.append(offset))
    around = Around(str(tmp_path), ["gone", "blob"])
    now = time.monotonic_ns()
    notes = [(1, 0, now - 10**9), (0, 0, now), (1, WINDOW, now), (1, WINDOW, now), (1, 5 * WINDOW, now)]
    around.read(b"".join(NOTE.pack(blob, offset, WINDOW, when) for blob, offset, when in notes))
    assert asked == [WINDOW, 5 * WINDOW]
    around.close()


def test_a_note_that_nobody_can_take_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    notes = Notes(str(path))
    assert not notes.write(0, 0, WINDOW, 1.0)  # there is no pipe
    os.mkfifo(path)
    assert not notes.write(0, 0, WINDOW, 2.0)  # nobody reads it
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    assert not notes.write(0, 0, WINDOW, 2.1)  # it was just looked
    taken = [notes.write(1, number, WINDOW, 3.0) for number in range(10_000)]
    assert taken[0] and not taken[-1]  # it is full
    assert NOTE.unpack(os.read(reader, NOTE.size))[:3] == (1, 0, WINDOW)
    os.read(reader, 1 << 16)
    assert notes.write(2, 0, WINDOW, 4.0)
    os.close(reader)
    assert not notes.write(3, 0, WINDOW, 5.0)
    notes.close()


def test_a_window_that_is_not_kept_is_read_more_and_more_rarely() -> None:
    pauses = Pauses()
    noted = []
    for now in range(0, 60_000, 10):
        if pauses.is_over(0, 0, now / 1000):
            pauses.begin(0, 0, now / 1000)
            noted.append(now)
    between = [later - sooner for sooner, later in itertools.pairwise(noted)]
    assert between[:5] == sorted(between)[:5] and between[0] < 1000 < 10_000 < between[-1]
    assert pauses.is_over(0, WINDOW, 60.0)
    pauses.begin(0, 0, 1000.0)
    assert pauses.is_over(0, 0, 1000.5), "it was left alone for long"


def test_no_more_is_noted_at_once_than_readers_can_wait_for() -> None:
    budget = Budget()

    def noted(now: float) -> int:
        count = 0
        while budget.allows(now):
            budget.add(REGION)
            count += 1
        return count

    assert noted(1.0) == 2
    budget.read(REGION)
    assert noted(1.0) == 1
    assert noted(2.0) == 2, "what never comes is forgotten"


@pytest.mark.parametrize(
    ("start", "length", "counts"),
    [(0, WINDOW, False), (WINDOW, WINDOW, False), (WINDOW // 2, WINDOW, True), (0, 2 * WINDOW, True), (0, PAGE, True)],
)
def test_what_is_read_around_others_is_not_taken_for_a_sequential_reader(
    monkeypatch: pytest.MonkeyPatch, start: int, length: int, counts: bool
) -> None:
    """For whom more would be fetched."""
    device = object.__new__(NotingDevice)
    view = SimpleNamespace(place=5, looked=7)
    device._views = cast("Sequence[BlobView]", [view])
    device.hints = [ChunkRun(1, 1, 1)]

    def missing(_self: object, vec: Sequence[Extent], again: bool = False) -> list[ChunkRun]:
        view.place, view.looked = vec[0].uoff, 8
        device.hints.append(ChunkRun(1, 2, 1))
        return [ChunkRun(1, 3, 1)]

    monkeypatch.setattr(RangeDevice, "missing", missing)
    vec = [Extent(0, 0, 0, start, length // 2, 0), Extent(0, 1, start + length // 2, 0, length - length // 2, 0)]
    assert device.missing(vec) == [ChunkRun(1, 3, 1)]
    assert (view.place, len(device.hints)) == ((0, 2) if counts else (5, 1))


def test_nothing_is_missing_behind_the_end_of_a_blob() -> None:
    device = object.__new__(NotingDevice)
    device._views, device._turn = [], 0
    assert device.missing([]) == []


def test_what_was_noted_long_ago_is_not_read_although_it_came_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes its time to be opened."""
    around = Around("/", ["a", "b"])
    read: list[int] = []
    now = 10**12
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: read.append(fd))

    def file(blob: int) -> int:
        nonlocal now
        now += blob * 10**9
        return blob

    monkeypatch.setattr(around, "_file", file)
    around.read(b"".join(NOTE.pack(blob, 0, WINDOW, now) for blob in (0, 1)))
    assert read == [0]
