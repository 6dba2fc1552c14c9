"""Reads of the export while chunks are lost, taken away or unreadable: right bytes, or an error, and never zeros."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from nydusd.errors import ScarceError
from nydusd.frontends.blobfs.device import RangeDevice
from nydusd.frontends.nbd.connection import Connection
from nydusd.frontends.nbd.layout import Layout, Piece
from nydusd.frontends.nbd.protocol import Request
from nydusd.frontends.nbd.reads import Reads
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import LOST, UNREADABLE, SlotRef
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.eviction import punch
from nydusd.storage.state.segment import EMPTY, READY, Identity
from tests.support.discipline import wait_until
from tests.support.segments import Place, make_segment, segment_name

PLACES = [Place(0, 4096), Place(8192, 4096)]
"""Between the two there is padding."""
SIZE = 12288
CONTENT = [b"A" * 4096 + bytes(4096) + b"B" * 4096, b"C" * 4096 + bytes(4096) + b"D" * 4096]


class TwoBlobs(Layout):
    """A disk of two blobs, one behind the other."""

    def __init__(self) -> None:
        self.metadata = memoryview(b"")

    def pieces(self, offset: int, length: int) -> list[Piece]:
        found = []
        while length:
            blob, start = divmod(offset, SIZE)
            part = min(length, SIZE - start)
            found.append(Piece(blob, start, part))
            offset, length = offset + part, length - part
        return found


class Client(Connection):
    """Who reads."""

    def __init__(self) -> None:
        self.closed = False
        self.got: tuple[int, bytes] | None = None

    def reserve(self, length: int) -> None:
        """There is always room."""

    def answer(self, asked: Request, code: int, data: memoryview | None) -> None:
        self.got = code, bytes(data or b"")


class Disk:
    """Two blobs with all chunks ready, the front end's reads, and the supervisor, which the test plays."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.paths = [folder / f"{number}.blob.data" for number in range(2)]
        self.segments = []
        for path, name, content in zip(self.paths, names, CONTENT, strict=True):
            path.write_bytes(content)
            with open(path, "rb") as file:
                identity = Identity.of(file.fileno(), SIZE)
            self.segments.append(make_segment(name, PLACES, state=bytes([READY, READY]), identity=identity))
        device = RangeDevice.from_spec(
            [
                {"blob_id": f"b{number}", "handle": 70 + number, "segment": name, "data": str(path)}
                for number, (path, name) in enumerate(zip(self.paths, names, strict=True))
            ],
            0,
        )
        assert isinstance(device, RangeDevice)
        self.device = device
        self.reads = Reads(TwoBlobs(), device, lambda: self, 30.0)
        self.asked: dict[int, tuple[ChunkRun, int]] = {}
        """What was asked for, by number, and not served yet."""
        self._numbers = count(1)
        self._replies: list[Reply] = []
        self._slots: dict[int, dict[int, memoryview]] = {}

    def read(self, offset: int, length: int) -> Client:
        client = Client()
        self.reads.begin(client, Request(0, 0, offset, length))
        return client

    def evict(self, blob: int) -> None:
        """What the supervisor and a worker do (`storage/state/eviction.py`)."""
        segment = self.segments[blob]
        segment.state[:] = bytes([EMPTY, EMPTY])
        segment.epoch[0] += 1
        with open(self.paths[blob], "r+b") as file:
            punch(file.fileno(), [(0, SIZE)])

    def fill(self, blob: int) -> None:
        with open(self.paths[blob], "r+b") as file:
            file.write(CONTENT[blob])
        self.segments[blob].state[:] = bytes([READY, READY])

    def serve(self, in_memory: bool | Sequence[int] = False) -> list[tuple[ChunkRun, int]]:
        """Say that all is there that was asked for, or give it (of these blobs) in shared memory; gives what that was."""
        asked = self.asked
        self.asked = {}
        for number, (run, _) in asked.items():
            slot = None
            if in_memory is True or (in_memory and run.blob in in_memory):
                slot = SlotRef(number, "arena", run.blob, [])
                plain = CONTENT[run.blob - 70]
                self._slots[number] = {
                    chunk: memoryview(plain[place.uoff : place.uoff + place.usize])
                    for chunk, place in enumerate(PLACES[run.first : run.first + run.count], run.first)
                }
            self._replies.append(Reply(number, 0, slot))
        self.reads.service()
        return list(asked.values())

    def close(self) -> None:
        assert not self._slots, "what came in shared memory was not given back"
        self.device.close()
        for segment in self.segments:
            segment.close()

    # --- the line to the supervisor ---------------------------------------------------------------------------

    def fileno(self) -> int:
        return -1

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        number = next(self._numbers) if number is None else number
        self.asked[number] = run, flags
        return number

    def replies(self) -> list[Reply]:
        replies, self._replies = self._replies, []
        return replies

    def cancel(self, request: int) -> None:
        """Nothing of it is left here."""

    def pieces(self, slot: SlotRef) -> dict[int, memoryview]:
        return self._slots[slot.lease]

    def release(self, slot: SlotRef) -> None:
        del self._slots[slot.lease]

    def forget_arenas(self) -> None:
        """There are none."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with segment_name() as one, segment_name() as two:
        made = Disk(tmp_path, [one, two])
        yield made
        made.close()


def during_the_first_read(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Of any cache file, from now on."""
    real = os.preadv

    def preadv(*args: object) -> int:
        monkeypatch.undo()
        happens()
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)


def test_what_is_there_is_answered_at_once(disk: Disk) -> None:
    assert disk.read(100, 2 * SIZE - 200).got == (0, (CONTENT[0] + CONTENT[1])[100:-100])
    assert disk.asked == {}


def test_an_answer_that_came_while_a_request_was_repeated_is_not_waited_for(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.evict(0)
    client = disk.read(0, SIZE)
    assert client.got is None
    real = disk.request

    def request(run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        assert number is not None
        disk.fill(0)
        disk._replies.append(Reply(number, 0, None))
        return real(run, flags, number)

    monkeypatch.setattr(disk, "request", request)
    later = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: later)
    disk.reads.service()
    assert client.got == (0, CONTENT[0])


@pytest.mark.parametrize("victim", [0, 1])
def test_chunks_taken_away_while_others_of_the_read_are_read_are_asked_for(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    during_the_first_read(monkeypatch, lambda: disk.evict(victim))
    client = disk.read(0, 2 * SIZE)
    assert client.got is None
    disk.fill(victim)
    assert disk.serve() == [(ChunkRun(70, 0, 2), 0), (ChunkRun(71, 0, 2), 0)]
    assert client.got == (0, CONTENT[0] + CONTENT[1])


def test_a_range_without_chunks_is_read_although_others_were_taken_away(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_the_first_read(monkeypatch, lambda: disk.evict(0))
    client = disk.read(5000, 100)
    disk.serve()
    assert client.got == (0, bytes(100))


def test_what_the_disk_does_not_give_comes_in_shared_memory(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError(errno.EIO, "Input/output error")

    during_the_first_read(monkeypatch, fails)
    client = disk.read(0, SIZE)
    assert client.got is None
    assert disk.serve(in_memory=True) == [(ChunkRun(70, 0, 2), UNREADABLE)]
    assert client.got == (0, CONTENT[0])
    assert "cache file at 0: Input/output error: fetching it again" in caplog.text


def test_a_cache_file_for_which_no_file_descriptor_is_left_is_read_later(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_more)
    client = disk.read(0, SIZE)
    assert client.got is None
    monkeypatch.undo()
    wait_until(lambda: disk.reads.service() is None, "the answer", 60)
    assert client.got == (0, CONTENT[0])
    assert disk.asked == {}
    assert "cache file: [Errno 24] Too many open files: who needs it waits" in caplog.text


def test_a_cache_file_that_was_opened_during_a_sync_is_read_when_that_is_over(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.segments[0].syncing[0] = 1
    client = disk.read(0, SIZE)
    assert client.got is None and not disk.asked
    disk.segments[0].syncing[0] = 0
    wait_until(lambda: disk.reads.service() is None, "the read to be tried again", 60)
    assert client.got == (0, CONTENT[0])
    assert caplog.text == ""


def test_chunks_are_asked_for_when_there_can_be_a_line_to_the_supervisor(disk: Disk) -> None:
    lines: list[Disk] = []

    def connect() -> Disk:
        if not lines:
            raise ScarceError("no file descriptor is left")
        return lines[0]

    disk.reads = Reads(TwoBlobs(), disk.device, connect, 30.0)
    disk.evict(0)
    client = disk.read(0, SIZE)
    assert client.got is None
    lines.append(disk)
    wait_until(lambda: disk.reads.service() is not None and bool(disk.asked), "the request", 60)
    disk.fill(0)
    assert disk.serve() == [(ChunkRun(70, 0, 2), 0)]
    assert client.got == (0, CONTENT[0])


def test_a_cache_file_that_was_cut_off_is_fetched_again(disk: Disk) -> None:
    os.truncate(disk.paths[0], 4096)
    client = disk.read(0, SIZE)
    os.truncate(disk.paths[0], SIZE)
    disk.fill(0)
    assert disk.serve() == [(ChunkRun(70, 0, 2), LOST)]
    assert client.got == (0, CONTENT[0])


def test_a_deleted_file_of_a_blob_that_was_not_opened_is_opened_when_it_is_there_again(disk: Disk) -> None:
    disk.paths[0].rename(disk.paths[0].with_suffix(".away"))
    client = disk.read(8192, 4096)
    assert disk.serve() == [(ChunkRun(70, 0, 1), 0)]
    assert [flags for _, flags in disk.asked.values()] == [LOST]
    disk.paths[0].with_suffix(".away").rename(disk.paths[0])
    disk.segments[0].state[1] = EMPTY
    disk.serve()
    disk.fill(0)
    assert disk.serve() == [(ChunkRun(70, 1, 1), 0)]
    assert client.got == (0, b"B" * 4096)


def test_a_blob_without_a_cache_file_is_read_from_shared_memory(tmp_path: Path) -> None:
    with segment_name() as one, segment_name() as two:
        disk = Disk(tmp_path, [one, two])
        disk.segments[0].close()
        disk.segments[0] = make_segment(one, PLACES, identity=Identity(0, 0, SIZE))
        client = disk.read(0, SIZE + 10)
        assert disk.serve(in_memory=True) == [(ChunkRun(70, 0, 2), 0)]
        assert client.got == (0, (CONTENT[0] + CONTENT[1])[: SIZE + 10])
        padding = disk.read(5000, 100)
        assert padding.got == (0, bytes(100))
        disk.close()


def test_data_of_a_blob_of_which_nothing_is_read_by_now_is_given_back_unread(tmp_path: Path) -> None:
    """A table may say that a blob is longer than it is."""
    with segment_name() as one, segment_name() as two:
        disk = Disk(tmp_path, [one, two])
        os.rename(disk.paths[1], tmp_path / "away")  # nothing is known of it at first: all of the range is asked for
        disk.evict(0)
        client = disk.read(SIZE - 10, 20)
        disk.segments[1].close()
        disk.segments[1] = make_segment(two, PLACES, identity=Identity(0, 0, 0))
        disk.serve(in_memory=[71])
        disk.fill(0)
        while disk.asked:
            disk.serve()
        assert client.got == (0, CONTENT[0][-10:] + bytes(10))
        disk.close()


def test_chunks_reported_but_never_there_are_an_error_and_no_zeros(disk: Disk) -> None:
    disk.evict(1)
    client = disk.read(SIZE, 10)
    asked = []
    while disk.asked:
        asked += disk.serve()
    assert [flags for _, flags in asked] == [0] + 4 * [LOST]
    assert client.got == (errno.EIO, b"")


def test_a_read_that_waits_for_more_holds_no_shared_memory(disk: Disk) -> None:
    """What it would hold, the rest of it may wait for, or that of another reader who holds something, too."""
    disk.evict(0)
    disk.evict(1)
    client = disk.read(4000, 2 * SIZE - 5000)
    rest = {number: ask for number, ask in disk.asked.items() if ask[0].blob == 71}
    disk.asked = {number: ask for number, ask in disk.asked.items() if ask[0].blob == 70}
    disk.serve(in_memory=True)
    assert client.got is None
    assert not disk._slots
    disk.asked = rest
    disk.serve(in_memory=True)
    assert client.got == (0, (CONTENT[0] + CONTENT[1])[4000 : 2 * SIZE - 1000])


def test_a_read_that_has_to_ask_once_more_holds_no_shared_memory(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.evict(0)
    client = disk.read(8192, SIZE)
    during_the_first_read(monkeypatch, lambda: disk.evict(1))
    disk.serve(in_memory=True)
    assert client.got is None
    assert not disk._slots
    disk.serve(in_memory=True)
    assert client.got == (0, (CONTENT[0] + CONTENT[1])[8192 : 8192 + SIZE])
