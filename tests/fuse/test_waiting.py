"""Reads that wait, in one front end without a kernel and without a supervisor: what is asked for, and when a wait ends."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from nydusd.errors import ScarceError
from nydusd.formats.model import Extent
from nydusd.frontends.attempt import LATER
from nydusd.frontends.fuse import protocol as p
from nydusd.frontends.fuse.answers import Answers
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.frontends.fuse.journal import Journal
from nydusd.frontends.fuse.mount import INODE_BITS, Mount
from nydusd.frontends.fuse.namespace import Namespace, View
from nydusd.frontends.fuse.parking import Parked, Parking
from nydusd.frontends.fuse.reads import Reads
from nydusd.frontends.fuse.stats import Tally
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import SlotRef
from nydusd.storage.api.io import BlobIoVec, ChunkRun
from tests.fuse.test_dispatch import WholeDevice, no_supervisor, read_in, request
from tests.fuse.tree import sample


class EmptyDevice(WholeDevice):
    """A device that has no chunk."""

    def runs(self, vec: list[Extent]) -> list[ChunkRun]:
        return [ChunkRun(extent.blob, extent.chunk, 1) for extent in vec]

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]:
        return self.runs(list(vec))


class Line:
    """A line to a supervisor, with what was sent on it; `answers` is what comes next."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.cancelled: list[int] = []
        self.released: list[int] = []
        self.arena: dict[int, dict[int, bytearray]] = {}
        self.answers: list[Reply] = []

    def fileno(self) -> int:
        return -1

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        assert flags == 0
        self.asked.append(len(self.asked) + 1 if number is None else number)
        return self.asked[-1]

    def replies(self) -> list[Reply]:
        taken, self.answers = self.answers, []
        return taken

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def pieces(self, slot: SlotRef) -> dict[int, memoryview]:
        return {chunk: memoryview(plain) for chunk, plain in self.arena[slot.lease].items()}

    def release(self, slot: SlotRef) -> None:
        self.released.append(slot.lease)

    def forget_arenas(self) -> None: ...


class Book(Journal):
    """A journal that nobody succeeds to: what was noted of interrupts, and what was dropped."""

    def __init__(self) -> None:
        self.noted: list[int] = []
        self.dropped: list[int] = []
        self._places = itertools.count()

    def keep(self) -> int:
        return next(self._places)

    def interrupted(self, place: int) -> None:
        self.noted.append(place)

    def drop(self, place: int) -> None:
        self.dropped.append(place)


def test_a_read_that_waits_for_more_holds_no_shared_memory_and_needs_it_of_no_supervisor_again() -> None:
    """What it would hold, the rest of it may wait for, or that of another reader who holds something, too."""
    line = Line()
    given: list[list[bytes]] = []

    def finish(read: Parked, code: int) -> None:
        pieces = parking.pieces(read)
        given.append([bytes(pieces[key][part]) for key, part in needed])
        if len(given) < 2:
            parking.again(read, None)  # there is no file descriptor for something else
        else:
            parking.let_go(read)

    parking = Parking(Book(), lambda: line, 30.0, finish, print)
    device = EmptyDevice(sample())
    vec = [Extent(0, 3, 0, 90, 10, 100), Extent(0, 3, 0, 0, 20, 100), Extent(0, 5, 300, 0, 100, 100)]
    needed = [((0, 3), slice(90, 100)), ((0, 3), slice(0, 20)), ((0, 5), slice(0, 100))]
    read = Parked(8, vec, 0, True, Mount("/", device.tree, device), -1, 1, 0)
    parking.park(read, read.ask([ChunkRun(0, 3, 1), ChunkRun(0, 5, 1)]))
    line.arena = {7: {3: bytearray(range(100))}, 9: {5: bytearray(100 * b"5")}}
    line.answers = [Reply(1, 0, SlotRef(7, "arena", 0, []))]
    parking.service()
    assert (line.released, given) == ([7], [])
    line.arena[7][3][:] = bytes(100)  # others have it now
    line.answers = [Reply(2, 0, SlotRef(9, "arena", 0, []))]
    parking.service()
    assert line.released == [7, 9]
    line.arena[9][5][:] = bytes(100)
    parking.ask_successor()
    time.sleep(LATER)
    parking.service()
    assert (line.asked, line.cancelled, line.released) == ([1, 2], [], [7, 9])
    assert given == 2 * [[bytes(range(90, 100)), bytes(range(20)), 100 * b"5"]]


class Hiding(Line):
    """A line to send on which hides that an answer has come: nothing becomes readable then."""

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        if number is not None:
            self.answers.append(Reply(number, 0, None))
        return super().request(run, flags, number)


def test_an_answer_that_came_while_a_request_was_repeated_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def finish(read: Parked, code: int) -> None:
        parking.let_go(read)
        ended.append(code)

    parking = Parking(Book(), Hiding, 30.0, finish, print)
    device = EmptyDevice(sample())
    vec = [Extent(0, 3, 0, 0, 20, 100)]
    read = Parked(8, vec, 0, True, Mount("/", device.tree, device), -1, 1, 0)
    parking.park(read, read.ask([ChunkRun(0, 3, 1)]))
    later = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: later)
    parking.service()
    assert ended == [0]


def test_a_second_answer_to_a_repeated_request_is_cancelled_after_the_first_one_was_used() -> None:
    """Nobody looks for it when nothing waits any more."""
    line = Line()
    cancelled_in_use: list[list[int]] = []

    def finish(read: Parked, code: int) -> None:
        cancelled_in_use.append(list(line.cancelled))
        parking.let_go(read)

    parking = Parking(Book(), lambda: line, 30.0, finish, print)
    device = EmptyDevice(sample())
    read = Parked(8, [Extent(0, 0, 0, 0, 1, 1)], 0, True, Mount("/", device.tree, device), -1, 1, 0)
    parking.park(read, read.ask(device.missing(read.vec)))
    parking.ask_successor()
    line.answers = [Reply(1, 0, None)]
    parking.service()
    assert (line.asked, cancelled_in_use, line.cancelled) == ([1, 1], [[]], [1])


class Unopened(Namespace):
    """Images that cannot be opened; `tried` are those that were to be."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def __missing__(self, index: int) -> View:
        self.tried.append(index)
        raise ScarceError("Too many open files")


class Waiters:
    """Readers of images that cannot be opened yet, and what a front end does for them."""

    def __init__(self, patience: float = 30.0) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.book = Book()
        self.images = Unopened()
        complaints = Complaints("test")
        answers = Answers(self._theirs.fileno(), complaints)
        self.reads = Reads(self.images, answers, Tally(), complaints, self.book, no_supervisor, patience, None)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def wait(self, unique: int, image: int, pid: int) -> None:
        """One more waits."""
        packet = bytearray(request(p.READ, image << INODE_BITS | 1, read_in(0, 1), unique))
        p.REQUEST.pack_into(packet, 0, len(packet), p.READ, unique, image << INODE_BITS | 1, pid)
        self.reads.put_off(memoryview(packet), unique, ScarceError("Too many open files"))

    def later(self) -> list[tuple[int, int]]:
        """What was answered by the time that they have been tried again: (unique, errno)."""
        time.sleep(LATER)
        self.reads.service()
        found: list[tuple[int, int]] = []
        while True:
            try:
                _, error, unique = p.OUT_HEADER.unpack_from(self._ours.recv(4096))
            except BlockingIOError:
                return found
            found.append((unique, -error))


@pytest.fixture
def waiters() -> Iterator[Waiters]:
    made = Waiters()
    yield made
    made.close()


@pytest.fixture
def gone() -> int:
    """The id of a thread that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_who_waits_for_an_image_to_be_opened_is_taken_for_killed_only_if_the_kernel_told(
    waiters: Waiters, gone: int
) -> None:
    for unique, pid in ((2, gone), (4, gone), (6, os.getpid())):
        waiters.wait(unique, 0, pid)
    assert waiters.later() == []
    assert waiters.reads.interrupt(4)
    assert waiters.reads.interrupt(6)
    assert not waiters.reads.interrupt(8)
    assert waiters.later() == [(4, errno.EINTR)]
    assert (waiters.book.noted, waiters.book.dropped) == ([1, 2], [1])
    assert list(waiters.reads.unopened) == [2, 6]


def test_an_image_is_to_be_opened_once_a_round_for_all_who_wait_for_it(waiters: Waiters, gone: int) -> None:
    for unique, image in ((2, 1), (4, 1), (6, 2), (8, 1), (10, 2)):
        waiters.wait(unique, image, gone)
    waiters.reads.interrupt(10)
    assert waiters.later() == [(10, errno.EINTR)]
    assert waiters.images.tried == [1, 2]
