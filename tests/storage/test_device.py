"""BlobDevice: what is missing, what is read, and what it does when its cache file or its segment is changed under it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nydusd.errors import (
    CacheError,
    CorruptChunkError,
    EvictedError,
    StaleCacheError,
    SyncingError,
    UnreadableError,
)
from nydusd.formats.model import Extent
from nydusd.storage.api import losses
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.doubts import doubt
from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY, VERIFY, Identity, Segment
from tests.support.segments import Place, make_segment, segment_name

PLACES = [Place(0, 5000), Place(5000, 100), Place(8192, 4096), Place(12288, 1), Place(16384, 3000)]
SIZE = 20000
CONTENT = bytes(i * 7 % 251 for i in range(SIZE))


class Blob:
    """A cache file with its segment, and a device that looks at it as blob 0 of an image; blob 1 is a second one."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.names = names
        self.paths = [folder / f"{i}.blob.data" for i in range(2)]
        self.segments = [self._make(i) for i in range(2)]
        self.device = self.open_device(0)

    def _make(self, index: int, generation: int = 1) -> Segment:
        self.paths[index].write_bytes(CONTENT)
        fd = os.open(self.paths[index], os.O_RDONLY)
        identity = Identity.of(fd, SIZE, b"L" * 32)
        os.close(fd)
        return make_segment(self.names[index], PLACES, identity=identity, generation=generation)

    def open_device(self, row: int) -> BlobDevice:
        blobs = [
            {"blob_id": f"b{i}", "handle": 70 + i, "segment": self.names[i], "data": str(self.paths[i])}
            for i in range(2)
        ]
        return BlobDevice.from_spec(blobs, row)

    def replace(self) -> None:
        """A new file and a new segment, nothing of it ready."""
        self.paths[0].unlink()
        self.segments[0].close()
        self.segments[0] = self._make(0, 2)

    def close(self) -> None:
        self.device.close()
        for segment in self.segments:
            segment.close()


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[Blob]:
    with segment_name() as one, segment_name() as two:
        made = Blob(tmp_path, [one, two])
        yield made
        made.close()


def _extent(chunk: int, offset: int = 0, length: int | None = None, blob: int = 0) -> Extent:
    place = PLACES[chunk]
    return Extent(blob, chunk, place.uoff, offset, place.usize - offset if length is None else length, place.usize)


@st.composite
def _extents(draw: st.DrawFn) -> Extent:
    chunk = draw(st.integers(0, len(PLACES) - 1))
    offset = draw(st.integers(0, PLACES[chunk].usize - 1))
    length = draw(st.integers(1, PLACES[chunk].usize - offset))
    return _extent(chunk, offset, length, draw(st.integers(0, 1)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vec=st.lists(_extents(), max_size=8),
    states=st.lists(st.sampled_from([EMPTY, PENDING, READY, READY, FAILED, VERIFY]), min_size=10, max_size=10),
    in_slots=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 4))),
)
def test_reads_against_a_model(
    blob: Blob, vec: list[Extent], states: list[int], in_slots: set[tuple[int, int]]
) -> None:
    for i, segment in enumerate(blob.segments):
        segment.state[:] = bytes(states[5 * i : 5 * i + 5])
    before = [segment.totals() for segment in blob.segments]
    runs = blob.device.missing(vec)
    expected = {(e.blob, e.chunk) for e in vec if states[5 * e.blob + e.chunk] != READY}
    assert {(r.blob, c) for r in runs for c in range(r.first, r.first + r.count)} == expected
    for i, segment in enumerate(blob.segments):
        mine = [e for e in vec if e.blob == i]
        hit = [e.length for e in mine if states[5 * i + e.chunk] == READY]
        missed = [e.length for e in mine if states[5 * i + e.chunk] != READY]
        added = [now - then for now, then in zip(segment.totals(), before[i], strict=True)]
        assert added == [len(hit), sum(hit), len(missed), sum(missed), 0, 0]
    pieces = {
        (i, c): memoryview(CONTENT[PLACES[c].uoff : PLACES[c].uoff + PLACES[c].usize])
        for i, c in in_slots | (expected if expected <= in_slots else set())
    }
    wanted = b"".join(CONTENT[e.uoff + e.offset : e.uoff + e.offset + e.length] for e in vec)
    buf = bytearray(len(wanted) + 3)
    with memoryview(buf) as view:
        assert blob.device.read_into(vec, view, pieces or None) == len(wanted)
    assert bytes(buf) == wanted + bytes(3)
    after = [segment.totals() for segment in blob.segments]
    assert blob.device.missing(vec, again=True) == runs
    assert [segment.totals() for segment in blob.segments] == after, "a second look is not counted"


def test_neighbours_are_asked_for_together(blob: Blob) -> None:
    vec = [_extent(0, 10, 20), _extent(0, 50, 60), _extent(1), _extent(2), _extent(4), _extent(3), _extent(4, blob=1)]
    assert blob.device.missing(vec) == [ChunkRun(0, 0, 3), ChunkRun(0, 4, 1), ChunkRun(0, 3, 1), ChunkRun(1, 4, 1)]


@pytest.mark.parametrize(
    "extent",
    [
        Extent(0, 5, 0, 0, 1, 1),
        Extent(0, 1 << 40, 0, 0, 1, 1),
        Extent(0, -1, 16384, 0, 1, 1),
        Extent(0, 1, 5001, 0, 1, 100),
        Extent(0, 1, 0, 0, 1, 100),
        Extent(0, 1, 5000, 0, 101, 101),
        Extent(0, 1, 5000, 100, 1, 100),
        Extent(0, 1, 5000, 0, 1, 101),
    ],
)
def test_extent_that_disagrees_with_the_blob_is_refused(blob: Blob, extent: Extent) -> None:
    with pytest.raises(CorruptChunkError, match="blob b0 chunk"):
        blob.device.missing([extent])


def test_all_is_missing_until_segment_and_file_are_there(blob: Blob, tmp_path: Path) -> None:
    segment, path = blob.segments[0], blob.paths[0]
    segment.state[:] = bytes([READY] * 5)
    os.rename(f"/dev/shm{blob.names[0]}", f"/dev/shm{blob.names[0]}.away")
    assert blob.device.missing([_extent(0)]) == [ChunkRun(0, 0, 1)]
    os.rename(f"/dev/shm{blob.names[0]}.away", f"/dev/shm{blob.names[0]}")
    path.rename(tmp_path / "away")
    assert blob.device.missing([_extent(0)]) == [ChunkRun(0, 0, 1)]
    path.write_bytes(bytes(SIZE))
    assert blob.device.missing([_extent(0)]) == [ChunkRun(0, 0, 1)], "another file than the segment's"
    path.unlink()
    (tmp_path / "away").rename(path)
    assert blob.device.missing([_extent(0)]) == []


def test_file_recreated_with_the_same_inode_number_is_not_used(blob: Blob) -> None:
    blob.segments[0].state[:] = bytes([READY] * 5)
    for _ in range(5):
        blob.paths[0].unlink()
        blob.paths[0].write_bytes(bytes(SIZE))
        assert blob.device.missing([_extent(0)]) == [ChunkRun(0, 0, 1)]


def _read(device: BlobDevice, vec: list[Extent]) -> bytes:
    buf = bytearray(sum(e.length for e in vec))
    with memoryview(buf) as view:
        assert device.read_into(vec, view) == len(buf)
    return bytes(buf)


def test_short_read_is_stale_and_the_next_look_opens_anew(blob: Blob) -> None:
    blob.segments[0].state[:] = bytes([READY] * 5)
    vec = [_extent(0), _extent(2)]
    assert blob.device.missing(vec) == []
    kept = blob.paths[0].with_name("bad")
    os.truncate(blob.paths[0], 9000)
    assert _read(blob.device, [_extent(0)]) == CONTENT[:5000], "what is still there is right"
    with pytest.raises(StaleCacheError, match=r"gave 808 of 4096 bytes at 8192"):
        _read(blob.device, vec)
    blob.paths[0].rename(kept)  # what `prepare` does with it
    kept.touch()
    blob.segments[0].close()
    blob.segments[0] = blob._make(0, 2)
    assert blob.device.missing(vec) == [ChunkRun(0, 0, 1), ChunkRun(0, 2, 1)]
    blob.segments[0].state[:] = bytes([READY] * 5)
    assert _read(blob.device, vec) == CONTENT[:5000] + CONTENT[8192:12288]


def test_reading_without_looking_first_is_stale_not_a_crash(blob: Blob) -> None:
    with pytest.raises(StaleCacheError, match="no cache file"):
        _read(blob.device, [_extent(0)])


def test_failing_disk_is_an_error_of_ours(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    blob.segments[0].state[:] = bytes([READY] * 5)
    assert blob.device.missing([_extent(0)]) == []

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CacheError, match="cache file at 0: Input/output error"):
        _read(blob.device, [_extent(0)])


def test_old_pair_is_read_until_it_is_refreshed(blob: Blob) -> None:
    blob.segments[0].state[:] = bytes([READY, READY, EMPTY, EMPTY, EMPTY])
    assert blob.device.missing([_extent(0)]) == []
    blob.replace()
    blob.segments[0].state[2] = READY
    assert blob.device.missing([_extent(0)]) == []
    assert _read(blob.device, [_extent(0)]) == CONTENT[:5000], "the deleted file still has them"
    assert blob.device.missing([_extent(2)]) == [ChunkRun(0, 2, 1)]
    blob.device.refresh([_extent(2), _extent(1, blob=1)])
    assert blob.device.missing([_extent(2)]) == []
    assert blob.device.missing([_extent(0)]) == [ChunkRun(0, 0, 1)]


def test_errors_are_counted_once_a_blob_and_only_where_a_segment_is(blob: Blob) -> None:
    blob.device.count_errors([_extent(0), _extent(1)])
    assert blob.segments[0].totals()[4] == 0
    blob.device.missing([_extent(0)])
    blob.device.count_errors([_extent(0), _extent(1)])
    assert [segment.totals()[4] for segment in blob.segments] == [1, 0]


def test_refreshing_and_closing_leak_nothing(blob: Blob) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        blob.device.refresh([_extent(0), _extent(0, blob=1)])
    blob.device.close()
    blob.paths[0].unlink()
    for _ in range(30):
        blob.device.missing([_extent(0)])
    blob.device.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_of_many_front_ends_never_reach_the_states(blob: Blob) -> None:
    device = blob.open_device(200)
    for _ in range(3):
        device.missing([_extent(0)])
    assert bytes(blob.segments[0].state) == bytes(5)
    assert blob.segments[0].totals()[2] == 3
    device.close()


def test_dummy_cache_gives_only_what_is_in_slots() -> None:
    with segment_name() as name:
        segment = make_segment(name, PLACES)
        device = BlobDevice.from_spec([{"blob_id": "b", "handle": 7, "segment": name, "data": None}], 0)
        assert device.handle(0) == 7
        assert device.missing([_extent(1)]) == [ChunkRun(0, 1, 1)]
        buf = bytearray(50)
        piece = {(0, 1): memoryview(CONTENT[5000:5100])}
        with memoryview(buf) as view:
            assert device.read_into([_extent(1, 50)], view, piece) == 50
            assert bytes(view) == CONTENT[5050:5100]
            with pytest.raises(StaleCacheError):
                device.read_into([_extent(0, 0, 50)], view, piece)
        device.close()
        segment.close()


def test_misses_from_before_the_segment_is_there_are_counted_when_it_is(tmp_path: Path) -> None:
    with segment_name() as name:
        data = tmp_path / "data"
        device = BlobDevice.from_spec([{"blob_id": "b", "handle": 7, "segment": name, "data": str(data)}], 0)
        assert device.missing([_extent(0), _extent(2, 0, 10)]) == [ChunkRun(0, 0, 1), ChunkRun(0, 2, 1)]
        assert device.missing([_extent(0)], again=True) == [ChunkRun(0, 0, 1)]
        data.write_bytes(CONTENT)
        with open(data, "rb") as file:
            segment = make_segment(name, PLACES, identity=Identity.of(file.fileno(), SIZE))
        device.missing([_extent(4)])
        hits, hit_bytes, misses, miss_bytes, *_ = segment.totals()
        assert (hits, hit_bytes, misses, miss_bytes) == (0, 0, 3, 5000 + 10 + 3000)
        device.close()
        segment.close()


class TestHints:
    """Chunks of 64 KiB; 16 MiB are 256 of them, and a reader is looked at again after 16."""

    COUNT = 1000

    @pytest.fixture
    def long(self, tmp_path: Path) -> Iterator[tuple[BlobDevice, Segment]]:
        with segment_name() as name:
            places = [Place(i << 16, 1 << 16) for i in range(self.COUNT)]
            data = tmp_path / "data"
            with open(data, "wb+") as file:
                file.truncate(self.COUNT << 16)
                identity = Identity.of(file.fileno(), self.COUNT << 16)
            segment = make_segment(name, places, identity=identity, state=bytes([READY]) * self.COUNT)
            device = BlobDevice.from_spec([{"blob_id": "b", "handle": 7, "segment": name, "data": str(data)}], 0)
            yield device, segment
            device.close()
            segment.close()

    @staticmethod
    def read(device: BlobDevice, chunks: range | list[int]) -> list[int]:
        """The chunks at which the device gave a hint while these were read."""
        for chunk in chunks:
            assert device.missing([Extent(0, chunk, chunk << 16, 0, 1 << 16, 1 << 16)]) == []
        assert all(run.blob == 7 and run.count == 1 for run in device.hints)
        found = [run.first for run in device.hints]
        device.hints.clear()
        return found

    def test_come_every_mebibyte_from_a_sequential_reader_of_what_ends_soon(
        self, long: tuple[BlobDevice, Segment]
    ) -> None:
        device, segment = long
        segment.state[400:] = bytes([EMPTY]) * (self.COUNT - 400)
        assert self.read(device, range(200)) == [144, 160, 176, 192]

    def test_do_not_come_when_all_is_there_or_on_its_way(self, long: tuple[BlobDevice, Segment]) -> None:
        device, segment = long
        segment.state[400:] = bytes([PENDING]) * (self.COUNT - 400)
        assert self.read(device, range(400)) == []

    def test_do_not_come_from_a_reader_that_jumps(self, long: tuple[BlobDevice, Segment]) -> None:
        device, segment = long
        segment.state[500:] = bytes([EMPTY]) * (self.COUNT - 500)
        assert self.read(device, [499, 100, 400, 3, 499, 300, 120]) == []

    def test_come_from_a_reader_whose_other_half_another_front_end_serves(
        self, long: tuple[BlobDevice, Segment]
    ) -> None:
        device, segment = long
        segment.state[400:] = bytes([EMPTY]) * (self.COUNT - 400)
        assert len(self.read(device, [chunk for chunk in range(200) if chunk // 16 % 2])) >= 2


class TestEviction:
    def ready(self, blob: Blob) -> None:
        for segment in blob.segments:
            segment.state[:] = bytes([READY]) * len(PLACES)

    def test_read_during_which_chunks_are_taken_away_does_not_count(
        self, blob: Blob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.ready(blob)
        vec = [_extent(0), _extent(2)]
        buf = memoryview(bytearray(SIZE))
        real = os.preadv

        def preadv(*args: object) -> int:
            got = real(*args)  # type: ignore[arg-type]
            blob.segments[0].epoch[0] += 1
            return got

        assert blob.device.missing(vec) == []
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(EvictedError):
            blob.device.read_into(vec, buf)
        monkeypatch.undo()
        blob.segments[0].state[2] = EMPTY
        assert blob.device.missing(vec, again=True) == [ChunkRun(0, 2, 1)]
        assert blob.device.missing([_extent(0)]) == []
        assert blob.device.read_into([_extent(0)], buf) == PLACES[0].usize

    def test_eviction_between_the_look_and_the_read_is_noticed_in_every_blob_of_the_read(self, blob: Blob) -> None:
        """The first blob comes twice: its first look counts."""
        self.ready(blob)
        vec = [_extent(0), _extent(1, blob=1), _extent(2)]
        for index in (0, 1):
            assert blob.device.missing(vec) == []
            blob.segments[index].epoch[0] += 1
            with pytest.raises(EvictedError):
                blob.device.read_into(vec, memoryview(bytearray(SIZE)))
        assert blob.device.missing(vec) == []
        assert blob.device.read_into(vec, memoryview(bytearray(SIZE))) > 0

    def test_eviction_before_the_look_costs_nothing(self, blob: Blob) -> None:
        self.ready(blob)
        blob.segments[0].epoch[0] += 1
        assert blob.device.missing([_extent(0)]) == []
        assert blob.device.read_into([_extent(0)], memoryview(bytearray(SIZE))) == PLACES[0].usize

    def test_number_of_evictions_changes_with_each(self, blob: Blob) -> None:
        vec = [_extent(0), _extent(1, blob=1)]
        blob.device.missing(vec)
        seen = {blob.device.evictions(vec)}
        for segment in blob.segments:
            segment.epoch[0] += 1
            seen.add(blob.device.evictions(vec))
        assert len(seen) == 3

    def test_segment_that_was_replaced_is_looked_at_no_more(self, blob: Blob) -> None:
        """Same file, another segment: the old one knows nothing of what is taken away from now on."""
        self.ready(blob)
        assert blob.device.missing([_extent(0)]) == []
        old = blob.segments[0]
        fd = os.open(blob.paths[0], os.O_RDONLY)
        identity = Identity.of(fd, SIZE, b"L" * 32)
        os.close(fd)
        blob.segments[0] = make_segment(blob.names[0], PLACES, identity=identity, generation=2)
        old.retire()
        assert blob.device.missing([_extent(0)]) == [ChunkRun(0, 0, 1)]
        with pytest.raises(EvictedError):
            # What had been looked at before the old one was retired.
            blob.device._views[0].before = 0
            blob.segments[0].epoch[0] = 1
            blob.device.read_into([_extent(0)], memoryview(bytearray(SIZE)))
        old.close()

    def test_retired_segment_that_has_its_name_still_is_believed_nowhere_in_a_read(self, blob: Blob) -> None:
        """The first blob comes twice; the worker that was to publish its next segment was killed."""
        self.ready(blob)
        blob.segments[0].retire()
        missing = blob.device.missing([_extent(0), _extent(1, blob=1), _extent(2)])
        assert missing == [ChunkRun(0, 0, 1), ChunkRun(0, 2, 1)]

    def test_what_is_asked_for_is_marked_with_the_clock(self, blob: Blob) -> None:
        self.ready(blob)
        blob.segments[0].clock[0] = 77
        blob.segments[0].state[4] = EMPTY
        blob.device.missing([_extent(0), _extent(4)])
        assert list(blob.segments[0].touched) == [77, 0, 0, 0, 77]
        assert not any(blob.segments[1].touched)


class TestLosses:
    """The kernel's answer is the test's; `tests/supervisor/test_lost_writes.py` has the kernel's own."""

    VEC = (_extent(0), _extent(2))

    @pytest.fixture(autouse=True)
    def _kernel(self, blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.lost = False
        self.now = 100.0
        monkeypatch.setattr(losses, "has_lost_writes", self._answer)
        monkeypatch.setattr("nydusd.storage.api.losses.time.monotonic", lambda: self.now)
        for segment in blob.segments:
            segment.state[:] = bytes([READY]) * len(PLACES)

    def _answer(self, _fd: int) -> bool:
        self.asked += 1
        lost, self.lost = self.lost, False
        return lost

    def read(self, device: BlobDevice) -> None:
        """AssertionError if it gives anything but what is there."""
        assert device.missing(self.VEC) == []
        assert _read(device, list(self.VEC)) == CONTENT[:5000] + CONTENT[8192:12288]

    def doubt(self, segment: Segment) -> None:
        """What a worker does, but for the states."""
        segment.syncing[0] = 1
        segment.lost[0] = 0
        segment.doubts[0] += 2
        segment.syncing[0] = 0

    def test_kernel_is_asked_only_while_the_disk_may_not_have_it(self, blob: Blob) -> None:
        self.read(blob.device)
        known = blob.device.known(1, self.VEC[0])
        target = [memoryview(bytearray(100))]
        assert known is not None and known.read(0, 100, target)
        assert self.asked == 0
        segment = blob.segments[0]
        for marks in (segment.dirty, segment.syncing):
            self.asked, marks[0] = 0, 1
            assert known.read(0, 100, target)
            assert self.asked == 1
            self.read(blob.device)
            assert self.asked > 1
            marks[0] = 0
        assert blob.segments[1].dirty[0] == 0

    def test_what_may_be_lost_is_read_past_the_file_until_all_was_doubted(self, blob: Blob) -> None:
        """Others, who open the file now, hear of it by the segments, of whichever image."""
        segment = blob.segments[0]
        with segment_name() as name:
            twin = make_segment(name, PLACES, identity=segment.identity)
            other = blob.open_device(1)
            segment.dirty[0] = 1
            self.read(blob.device)
            known = blob.device.known(1, self.VEC[0])
            self.lost = True
            assert known is not None and not known.read(0, 100, [memoryview(bytearray(100))])
            assert segment.lost[0] == twin.lost[0] == 1
            for device in (blob.device, other) * 2:
                with pytest.raises(UnreadableError, match="its disk did not take all that was written"):
                    self.read(device)
            segment.syncing[0], segment.lost[0] = 1, 0
            segment.doubts[0] += 1
            for device in (blob.device, other):
                with pytest.raises(UnreadableError):
                    self.read(device)
            segment.doubts[0] += 1
            segment.syncing[0] = 0
            for device in (blob.device, other):
                self.read(device)
            other.close()
            twin.close()

    def test_read_during_which_all_was_doubted_does_not_count(
        self, blob: Blob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segment = blob.segments[0]
        real = os.preadv
        self.read(blob.device)
        known = blob.device.known(1, self.VEC[0])
        assert known is not None

        def preadv(*args: object) -> int:
            got = real(*args)  # type: ignore[arg-type]
            self.doubt(segment)
            return got

        monkeypatch.setattr(os, "preadv", preadv)
        assert not known.read(0, 100, [memoryview(bytearray(100))])
        with pytest.raises(EvictedError, match="doubted"):
            self.read(blob.device)
        monkeypatch.setattr(os, "preadv", real)
        self.read(blob.device)

    def test_who_opens_the_file_during_a_sync_waits_for_its_end(self, blob: Blob) -> None:
        """Its worker may have been told already, and nobody is told again."""
        segment = blob.segments[0]
        segment.syncing[0] = 1
        for _ in range(2):
            with pytest.raises(SyncingError, match="is being synced"):
                self.read(blob.device)
        segment.syncing[0] = 0
        self.read(blob.device)
        segment.syncing[0] = 1
        self.read(blob.device)  # has been told of nothing, and was there when this one began
        blob.device.close()
        with pytest.raises(SyncingError):
            self.read(blob.device)
        self.now += 40.0
        with pytest.raises(UnreadableError, match="not on the disk yet"):
            self.read(blob.device)
        blob.device.close()
        with pytest.raises(SyncingError):
            self.read(blob.device)
        segment.syncs[0] += 1
        self.read(blob.device)  # it is the next one, of which we are told

    def test_after_one_who_was_killed_while_he_doubted_nothing_is_believed_before_the_next_one_is_done(
        self, blob: Blob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segment = blob.segments[0]
        segment.dirty[0] = 1
        self.read(blob.device)
        self.lost = True
        with pytest.raises(UnreadableError):
            self.read(blob.device)
        segment.lost[0], segment.doubts[0] = 0, 1  # killed here

        def states_change(what: str) -> None:
            if what == "doubts: begun":
                with pytest.raises(UnreadableError):
                    self.read(blob.device)

        monkeypatch.setattr("nydusd.points.reach", states_change)
        doubt(segment)
        assert not segment.doubts[0] % 2
        segment.state[:] = bytes([READY]) * len(PLACES)
        self.read(blob.device)
