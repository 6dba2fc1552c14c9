"""State that was torn or flipped anywhere: rebuilt, or refused by name. Never a crash, never a wrong byte.

Files on disk (blob metadata, of which test_torn_metadata.py has more; the chunk map and its record are in test_map_file.py),
records in the run-time folder, and shared memory that a successor reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nydusd.errors import CacheError, FormatError
from nydusd.frontends.erofs import journal as events
from nydusd.frontends.erofs import left, table
from nydusd.frontends.erofs.session import Fds
from nydusd.frontends.fuse import journal as reads
from nydusd.storage.state.segment import _CHECK, _HEADER, CHECK_OFFSET, EMPTY, HEADER_SIZE, READY, Segment
from nydusd.supervisor.checked import read_checked, write_checked
from tests.support.damages import damages
from tests.support.segments import make_segment, segment_name
from tests.workers.harness import Jobs, jobs

SEED = 7


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as made:
        yield Path(made)


class TestBlobMetadata:
    @pytest.fixture
    def used(self) -> Iterator[Jobs]:
        """A blob of which some chunks are in the cache, and its map stored."""
        with folder() as made, jobs("v6-zstd-blake3", made) as image:
            image.prepare()
            image.fill_all()
            image.checkpoint()
            yield image

    def test_damaged_anywhere_it_is_had_again_from_the_backend(
        self, used: Jobs, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also where the damage makes sense in itself: the map was stored for another table."""
        caplog.set_level(logging.CRITICAL)
        meta = used.spec.meta_path
        good = meta.read_bytes()
        choose = random.Random(SEED)
        places = [
            0,
            1,
            len(good) - 1,
            *choose.sample(range(len(good) - 4096), 20),
            *range(len(good) - 4096, len(good) - 3900, 7),
        ]
        for at in places:
            meta.write_bytes(choose.choice(list(damages(good, at))))
            used.new_daemon()
            assert used.prepare()["ready"] == len(used.states()), at
        assert used.wrong_files() == []

    def test_that_makes_sense_is_used_when_there_is_nothing_better(self, used: Jobs) -> None:
        """A release that makes another table of the same bytes must not need the backend."""
        for path in used.blobs.iterdir():
            path.unlink()
        record_file = used.spec.map_path.with_name(used.spec.map_path.name + ".nydusd")
        head, _, bits = record_file.read_bytes().partition(b"\n")
        record_file.write_bytes(json.dumps(json.loads(head) | {"layout": "00" * 32}).encode() + b"\n" + bits)
        used.new_daemon()
        assert used.prepare()["count"] == len(used.states())


class TestSegment:
    def test_header_with_a_flipped_bit_is_refused(self) -> None:
        with segment_name() as name:
            make_segment(name, 9, state=bytes([READY] * 5 + [EMPTY] * 4)).close()
            path = Path("/dev/shm") / name[1:]
            good = path.read_bytes()
            for at in (*range(_HEADER.size), *range(CHECK_OFFSET, CHECK_OFFSET + _CHECK.size)):
                for bad in damages(good, at):
                    path.write_bytes(bad)
                    with pytest.raises(FormatError):
                        Segment.open(name)
            path.write_bytes(good)
            opened = Segment.open(name)
            assert opened is not None
            opened.close()

    def test_segment_of_a_release_without_checksum_is_taken(self) -> None:
        with segment_name() as name:
            make_segment(name, 9).close()
            with open(Path("/dev/shm") / name[1:], "r+b") as file:
                file.seek(256)
                file.write(bytes(8))
            opened = Segment.open(name)
            assert opened is not None
            opened.close()

    @pytest.mark.parametrize(
        "size", [0, 1, 255, 256, 264, 640, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, HEADER_SIZE + 64]
    )
    def test_that_was_cut_off_is_refused(self, size: int) -> None:
        with segment_name() as name:
            make_segment(name, 9).close()
            os.truncate(Path("/dev/shm") / name[1:], size)
            with pytest.raises(FormatError):
                Segment.open(name)


CONTENTS = (
    {"version": 0, "mountpoint": "/mnt/x", "term": 3, "processes": [[1, 2], [3, 4]]},
    {"places": [[1, 1, "", 5, None, 0], [2, 1, "61", 6, 0, 0]], "next": [1, 3, False]},
    {"settings": {"/": {"registry_auth": "YTpi"}}},
    {"source": "/images/\u00e9", "config": None, "prefetch": None, "mounted_at": 1.5, "caches": [[1, "/nydusd.a.b"]]},
)


@pytest.mark.parametrize("content", CONTENTS)
def test_record_of_a_supervisor_is_read_as_it_was_written_or_not_at_all(content: dict[str, object]) -> None:
    with folder() as made:
        path = made / "state.json"
        write_checked(path, content)
        good = path.read_bytes()
        assert read_checked(path) == content
        for at in range(len(good)):
            for bad in damages(good, at):
                path.write_bytes(bad)
                with pytest.raises(CacheError, match=r"state\.json"):
                    assert read_checked(path) == content, "read, and another one"
                    raise CacheError("state.json: damage that changes nothing")


def test_note_of_what_the_kernel_has_mounted_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "left.json"
    left.write(path, [], Fds(0, 1, 2), 3, [("/mnt", "0:40")])
    good = path.read_bytes()
    for at in range(len(good)):
        for bad in list(damages(good, at))[:: 1 + at % 8][:2]:
            path.write_bytes(bad)
            assert left.take(path) is None
            assert isinstance(left.mounted(path), list)


MOUNTED = table.Mounted(3, "/", "/mnt", "id", (table.File(768, "b", 1, "/s", "/d", 1, 2, (0, 4096)),), ("erofs-1",))


@given(st.binary(max_size=300), st.sampled_from((0, 4096, (64 << 20) + 4096)), st.integers(0, 400))
@example(b"\x00" * 16, 0, 0)
@example(b"\xff" * 16, 4096, 0)
def test_table_of_mounts_in_memory_that_makes_no_sense_is_refused(noise: bytes, part: int, at: int) -> None:
    fd = table.create()
    try:
        good = table.Table((MOUNTED,), ("/mnt/a",))
        table.write(fd, good)
        assert table.read(fd) == good
        os.pwrite(fd, noise, part + at)
        with contextlib.suppress(FormatError):
            assert isinstance(table.read(fd), table.Table)
    finally:
        os.close(fd)


@settings(max_examples=40)
@given(st.integers(0, 200_000), st.binary(min_size=1, max_size=2000))
def test_journal_of_reads_that_was_written_over_is_read_without_a_crash(at: int, noise: bytes) -> None:
    """What comes of it is asked of the kernel, which refuses answers to requests that it has not made."""
    fd = reads.create()
    try:
        journal = reads.Journal(fd)
        journal.keep()
        os.pwrite(fd, noise, at)
        found = reads.Journal(fd)
        for place, request, _ in found.left():
            assert 0 <= place < reads.READS and len(request) > 0
    finally:
        os.close(fd)


@settings(max_examples=40)
@given(st.integers(0, 60_000), st.binary(min_size=1, max_size=2000))
def test_journal_of_events_that_was_written_over_is_read_without_a_crash(at: int, noise: bytes) -> None:
    fd = events.create()
    try:
        os.pwrite(fd, noise, at)
        with contextlib.suppress(FormatError):
            for kept in events.Journal(fd).left:
                assert 0 <= kept.place < events.EVENTS
    finally:
        os.close(fd)
