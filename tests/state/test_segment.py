"""Segments: made whole or not at all, opened, replaced, closed, and what is no segment."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from nydusd import points
from nydusd.errors import FormatError, InternalError, ScarceError
from nydusd.storage.state.names import names, remove
from nydusd.storage.state.segment import COUNTER_ROWS, EMPTY, HEADER_SIZE, READY, RECORD, Identity, Segment, boot_id
from tests.support.segments import Place, in_child, join, make_segment, segment_name


@pytest.fixture
def name() -> Iterator[str]:
    with segment_name() as chosen:
        yield chosen


def _opened(name: str) -> Segment:
    segment = Segment.open(name)
    assert segment is not None
    return segment


def test_what_was_put_in_is_found(name: str) -> None:
    identity = Identity(7, 8, 1 << 40, 9, bytes(range(32)))
    places = [Place(0, 5, 3, 1), Place(4096, 7, 9, 2, 3)]
    made = Segment.create(
        name,
        generation=4,
        identity=identity,
        records=b"".join(RECORD.pack(p.uoff, p.uoff, p.csize, p.usize, p.flags, p.ctx, 0, 0) for p in places),
        digests=b"a" * 32 + b"b" * 32,
        contexts=b"c" * 80,
        dict_offset=11,
        dict_size=12,
        state=bytes([READY, EMPTY]),
    )
    made.close()
    segment = _opened(name)
    assert (segment.count, segment.generation, segment.identity) == (2, 4, identity)
    assert bytes(segment.state) == bytes([READY, EMPTY])
    assert segment.record(1)[:6] == (4096, 4096, 9, 7, 2, 3)
    assert segment.digest(1) == b"b" * 32
    assert bytes(segment.contexts) == b"c" * 80
    assert (segment.dict_offset, segment.dict_size, segment.boot_id) == (11, 12, boot_id())
    segment.close()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 4096])
def test_areas_do_not_overlap(name: str, count: int) -> None:
    made = make_segment(name, count)
    records = bytes(made.records)
    made.state[:] = bytes([READY]) * count
    made.counters(COUNTER_ROWS - 1)[5] = (1 << 64) - 1
    assert bytes(made.records) == records
    assert bytes(made.state) == bytes([READY]) * count
    assert made.totals() == [0, 0, 0, 0, 0, (1 << 64) - 1]
    made.close()


def test_counters_of_more_processes_than_rows_do_not_reach_the_state(name: str) -> None:
    segment = make_segment(name, 100)
    for row in range(3 * COUNTER_ROWS):
        with segment.counters(row) as counters:
            for field in range(6):
                counters[field] += (1 << 58) - 1
    assert bytes(segment.state) == bytes(100)
    segment.close()


def test_absent_segment_is_none(name: str) -> None:
    assert Segment.open(name) is None
    remove(name)


@pytest.mark.parametrize("size", [0, 1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 100])
def test_what_is_no_segment_is_refused(name: str, size: int) -> None:
    Path(f"/dev/shm{name}").write_bytes(bytes(size))
    with pytest.raises(FormatError, match=r"size|header"):
        Segment.open(name)


def test_cut_or_longer_segment_is_refused(name: str) -> None:
    make_segment(name, 10).close()
    size = os.stat(f"/dev/shm{name}").st_size
    for change in (-1, 1):
        os.truncate(f"/dev/shm{name}", size + change)
        with pytest.raises(FormatError, match="header"):
            Segment.open(name)


def test_header_with_areas_outside_is_refused(name: str) -> None:
    make_segment(name, 10).close()
    for at in (16, 72, 80, 88, 104):  # count; where state, records and digests are; count of contexts
        with open(f"/dev/shm{name}", "r+b") as file:
            file.seek(at)
            old = file.read(8)
            file.seek(at)
            file.write(struct.pack("<Q", 1 << 60))
        with pytest.raises(FormatError, match="header"):
            Segment.open(name)
        with open(f"/dev/shm{name}", "r+b") as file:
            file.seek(at)
            file.write(old)
        _opened(name).close()


def test_full_shared_memory_is_a_want_that_may_end_and_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ScarceError, match="No space left") as caught:
        make_segment(name, 10)
    assert caught.value.cause_errno == errno.ENOMEM, "no disk is full"
    assert names(name[1:]) == []


def test_segment_for_which_shared_memory_has_no_inode_can_be_made_later(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(posix_ipc, "SharedMemory", full)
    with pytest.raises(ScarceError, match="No space left"):
        make_segment(name, 3)


def test_more_than_shared_memory_has_is_an_error(name: str) -> None:
    st = os.statvfs("/dev/shm")
    with pytest.raises(OSError) as caught, open(f"/dev/shm{name}", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, st.f_blocks * st.f_frsize + 4096)
    assert caught.value.errno == errno.ENOSPC, "fallocate is what tells us: a full /dev/shm must fail there"


def test_segment_is_allocated_in_full(name: str) -> None:
    make_segment(name, 100_000).close()
    st = os.stat(f"/dev/shm{name}")
    assert st.st_blocks * 512 >= st.st_size


def test_leftover_of_a_killed_builder_goes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        os._exit(9)

    monkeypatch.setattr(os, "rename", killed)
    assert join(in_child(lambda: make_segment(name, 10).close())) == 9
    monkeypatch.undo()
    assert Segment.open(name) is None
    (left,) = names(name[1:])
    assert left.startswith(f"{name}.")
    make_segment(name, 10).close()
    assert names(name[1:]) == [name]


def test_what_another_builder_is_at_stays_and_gets_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers may build the segment of one blob: whoever is later replaces it."""
    ready, begun = os.pipe()
    go, done = os.pipe()

    def wait(point: str) -> None:
        if point == "segment: written":
            os.write(begun, b"x")
            os.read(go, 1)

    monkeypatch.setattr(points, "reach", wait)
    slow = in_child(lambda: make_segment(name, 10, generation=2).close())
    monkeypatch.undo()
    os.close(begun)
    assert os.read(ready, 1) == b"x"
    make_segment(name, 10).close()
    os.write(done, b"x")
    assert join(slow) == 0
    opened = _opened(name)
    assert opened.generation == 2
    opened.close()
    assert names(name[1:]) == [name]
    for fd in (ready, go, done):
        os.close(fd)


def test_replaced_segment_stays_with_who_has_it(name: str) -> None:
    old = make_segment(name, 10)
    new = make_segment(name, 20, generation=2)
    old.state[3] = READY
    assert bytes(new.state) == bytes(20)
    opened = _opened(name)
    assert (opened.generation, opened.count) == (2, 20)
    for segment in (old, new, opened):
        segment.close()


def test_replacing_removes_the_lock_of_the_old_one(name: str) -> None:
    old = make_segment(name, 10)
    with old.lock():
        pass
    assert len(names(name[1:])) == 2
    new = make_segment(name, 10, generation=2)
    assert names(name[1:]) == [name]
    with new.lock():
        pass
    for segment in (old, new):
        segment.close()
    remove(name)
    assert names(name[1:]) == []


def test_close_gives_everything_back(name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        segment = make_segment(name, 10)
        with segment.lock():
            segment.counters(1).release()
        segment.close()
        _opened(name).close()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if name[1:] in line]


def test_areas_that_do_not_fit_are_our_bug(name: str) -> None:
    with pytest.raises(InternalError):
        Segment.create(
            name,
            generation=1,
            identity=Identity(0, 0, 0),
            records=bytes(39),
            digests=bytes(32),
            contexts=b"",
            dict_offset=0,
            dict_size=0,
            state=bytes(1),
        )


def test_identity_tells_a_recreated_file_from_the_first(tmp_path: Path) -> None:
    path = tmp_path / "data"
    seen = set()
    for _ in range(8):  # ext4 gives the same inode number again at once
        path.write_bytes(b"x" * 10)
        fd = os.open(path, os.O_RDONLY)
        identity = Identity.of(fd, 10)
        assert identity.is_of(fd)
        seen.add(identity)
        os.close(fd)
        path.unlink()
    assert len(seen) == 8
