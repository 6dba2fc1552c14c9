"""BlobDevice: what is missing, what is read, and what it does when its cache file or its segment is changed under it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nydusd.errors import (
    CacheError,
    CorruptChunkError,
    StaleCacheError,
)
from nydusd.formats.model import Extent
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY, VERIFY, Identity
from tests.storage.device_blob import CONTENT, PLACES, SIZE, Blob, extent_of, read_of
from tests.support.segments import make_segment, segment_name


@st.composite
def _extents(draw: st.DrawFn) -> Extent:
    chunk = draw(st.integers(0, len(PLACES) - 1))
    offset = draw(st.integers(0, PLACES[chunk].usize - 1))
    length = draw(st.integers(1, PLACES[chunk].usize - offset))
    return extent_of(chunk, offset, length, draw(st.integers(0, 1)))


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
    vec = [
        extent_of(0, 10, 20),
        extent_of(0, 50, 60),
        extent_of(1),
        extent_of(2),
        extent_of(4),
        extent_of(3),
        extent_of(4, blob=1),
    ]
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
    assert blob.device.missing([extent_of(0)]) == [ChunkRun(0, 0, 1)]
    os.rename(f"/dev/shm{blob.names[0]}.away", f"/dev/shm{blob.names[0]}")
    path.rename(tmp_path / "away")
    assert blob.device.missing([extent_of(0)]) == [ChunkRun(0, 0, 1)]
    path.write_bytes(bytes(SIZE))
    assert blob.device.missing([extent_of(0)]) == [ChunkRun(0, 0, 1)], "another file than the segment's"
    path.unlink()
    (tmp_path / "away").rename(path)
    assert blob.device.missing([extent_of(0)]) == []


def test_file_recreated_with_the_same_inode_number_is_not_used(blob: Blob) -> None:
    blob.segments[0].state[:] = bytes([READY] * 5)
    for _ in range(5):
        blob.paths[0].unlink()
        blob.paths[0].write_bytes(bytes(SIZE))
        assert blob.device.missing([extent_of(0)]) == [ChunkRun(0, 0, 1)]


def test_short_read_is_stale_and_the_next_look_opens_anew(blob: Blob) -> None:
    blob.segments[0].state[:] = bytes([READY] * 5)
    vec = [extent_of(0), extent_of(2)]
    assert blob.device.missing(vec) == []
    kept = blob.paths[0].with_name("bad")
    os.truncate(blob.paths[0], 9000)
    assert read_of(blob.device, [extent_of(0)]) == CONTENT[:5000], "what is still there is right"
    with pytest.raises(StaleCacheError, match=r"gave 808 of 4096 bytes at 8192"):
        read_of(blob.device, vec)
    blob.paths[0].rename(kept)  # what `prepare` does with it
    kept.touch()
    blob.segments[0].close()
    blob.segments[0] = blob._make(0, 2)
    assert blob.device.missing(vec) == [ChunkRun(0, 0, 1), ChunkRun(0, 2, 1)]
    blob.segments[0].state[:] = bytes([READY] * 5)
    assert read_of(blob.device, vec) == CONTENT[:5000] + CONTENT[8192:12288]


def test_reading_without_looking_first_is_stale_not_a_crash(blob: Blob) -> None:
    with pytest.raises(StaleCacheError, match="no cache file"):
        read_of(blob.device, [extent_of(0)])


def test_failing_disk_is_an_error_of_ours(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    blob.segments[0].state[:] = bytes([READY] * 5)
    assert blob.device.missing([extent_of(0)]) == []

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CacheError, match="cache file at 0: Input/output error"):
        read_of(blob.device, [extent_of(0)])


@pytest.mark.parametrize("call", ["open", "fstat"])
def test_file_of_which_its_disk_says_nothing_is_not_there_and_not_kept_open(
    blob: Blob, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file system that was shut down: what is asked for then comes past it."""
    vec = [extent_of(0)]
    blob.segments[0].state[0] = READY
    before = len(os.listdir("/proc/self/fd"))
    asked = getattr(os, call)

    def fails(what: object, *more: int) -> object:
        if str(blob.paths[0]) in (str(what), isinstance(what, int) and os.readlink(f"/proc/self/fd/{what}")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return asked(what, *more)

    monkeypatch.setattr(os, call, fails)
    for _ in range(3):
        assert blob.device.missing(vec) == [ChunkRun(0, 0, 1)]
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before
    assert blob.device.missing(vec) == []


def test_old_pair_is_read_until_it_is_refreshed(blob: Blob) -> None:
    blob.segments[0].state[:] = bytes([READY, READY, EMPTY, EMPTY, EMPTY])
    assert blob.device.missing([extent_of(0)]) == []
    blob.replace()
    blob.segments[0].state[2] = READY
    assert blob.device.missing([extent_of(0)]) == []
    assert read_of(blob.device, [extent_of(0)]) == CONTENT[:5000], "the deleted file still has them"
    assert blob.device.missing([extent_of(2)]) == [ChunkRun(0, 2, 1)]
    blob.device.refresh([extent_of(2), extent_of(1, blob=1)])
    assert blob.device.missing([extent_of(2)]) == []
    assert blob.device.missing([extent_of(0)]) == [ChunkRun(0, 0, 1)]


def test_errors_are_counted_once_a_blob_and_only_where_a_segment_is(blob: Blob) -> None:
    blob.device.count_errors([extent_of(0), extent_of(1)])
    assert blob.segments[0].totals()[4] == 0
    blob.device.missing([extent_of(0)])
    blob.device.count_errors([extent_of(0), extent_of(1)])
    assert [segment.totals()[4] for segment in blob.segments] == [1, 0]


def test_refreshing_and_closing_leak_nothing(blob: Blob) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        blob.device.refresh([extent_of(0), extent_of(0, blob=1)])
    blob.device.close()
    blob.paths[0].unlink()
    for _ in range(30):
        blob.device.missing([extent_of(0)])
    blob.device.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_of_many_front_ends_never_reach_the_states(blob: Blob) -> None:
    device = blob.open_device(200)
    for _ in range(3):
        device.missing([extent_of(0)])
    assert bytes(blob.segments[0].state) == bytes(5)
    assert blob.segments[0].totals()[2] == 3
    device.close()


def test_dummy_cache_gives_only_what_is_in_slots() -> None:
    with segment_name() as name:
        segment = make_segment(name, PLACES)
        device = BlobDevice.from_spec([{"blob_id": "b", "handle": 7, "segment": name, "data": None}], 0)
        assert device.handle(0) == 7
        assert device.missing([extent_of(1)]) == [ChunkRun(0, 1, 1)]
        buf = bytearray(50)
        piece = {(0, 1): memoryview(CONTENT[5000:5100])}
        with memoryview(buf) as view:
            assert device.read_into([extent_of(1, 50)], view, piece) == 50
            assert bytes(view) == CONTENT[5050:5100]
            with pytest.raises(StaleCacheError):
                device.read_into([extent_of(0, 0, 50)], view, piece)
        device.close()
        segment.close()


def test_misses_from_before_the_segment_is_there_are_counted_when_it_is(tmp_path: Path) -> None:
    with segment_name() as name:
        data = tmp_path / "data"
        device = BlobDevice.from_spec([{"blob_id": "b", "handle": 7, "segment": name, "data": str(data)}], 0)
        assert device.missing([extent_of(0), extent_of(2, 0, 10)]) == [ChunkRun(0, 0, 1), ChunkRun(0, 2, 1)]
        assert device.missing([extent_of(0)], again=True) == [ChunkRun(0, 0, 1)]
        data.write_bytes(CONTENT)
        with open(data, "rb") as file:
            segment = make_segment(name, PLACES, identity=Identity.of(file.fileno(), SIZE))
        device.missing([extent_of(4)])
        hits, hit_bytes, misses, miss_bytes, *_ = segment.totals()
        assert (hits, hit_bytes, misses, miss_bytes) == (0, 0, 3, 5000 + 10 + 3000)
        device.close()
        segment.close()
