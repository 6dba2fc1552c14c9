"""Reads that wait, in one front end without a kernel and without a supervisor: what is asked for, and when a wait ends."""

from __future__ import annotations

import itertools
import time

from nydusd.formats.model import Extent
from nydusd.frontends.attempt import LATER
from nydusd.frontends.fuse.journal import Journal
from nydusd.frontends.fuse.mount import Mount
from nydusd.frontends.fuse.parking import Parked, Parking
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import SlotRef
from nydusd.storage.api.io import BlobIoVec, ChunkRun
from tests.fuse.test_dispatch import WholeDevice
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
        return {}

    def release(self, slot: SlotRef) -> None: ...

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


def test_a_read_put_off_with_data_in_shared_memory_waits_for_the_next_supervisor_alone() -> None:
    line = Line()
    ended: list[Parked] = []

    def finish(read: Parked, code: int) -> None:
        ended.append(read)
        parking.again(read, None)  # there is no file descriptor for the rest of it

    parking = Parking(Book(), lambda: line, 30.0, finish, print)
    device = EmptyDevice(sample())
    read = Parked(8, [Extent(0, 0, 0, 0, 1, 1)], 0, True, Mount("/", device.tree, device), -1, 1, 0)
    parking.park(read, read.ask(device.missing(read.vec)))
    line.answers = [Reply(1, 0, SlotRef(1, "arena", 0, []))]
    parking.service()
    parking.ask_successor()
    assert (line.asked, ended, read.slots) == ([1, 2], [read], [])
    time.sleep(LATER)
    parking.service()
    assert line.cancelled == []
    assert ended == [read]
