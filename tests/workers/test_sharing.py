"""Several tables of chunks over one cache file: those that agree share it, others do not touch it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.formats.model import ChunkFlag
from nydusd.storage.state import map_file, sharing
from nydusd.storage.state.segment import EMPTY, READY, RECORD, VERIFY, Segment
from tests.workers.harness import Jobs
from tests.workers.shared_file import UNLISTED, again, twin


@pytest.mark.parametrize(
    ("record", "digest", "why"),
    [
        (None, None, ""),
        ({"usize": 0, "csize": 0, "flags": 0}, None, ""),
        ({"coff": 1}, None, "another place"),
        ({"flags": 0}, None, "another digest|another place"),
        (None, b"d" * 32, "another digest"),
        ({"uoff": 0}, None, "over the one before|another place"),
    ],
)
def test_only_tables_that_agree_share_a_file(
    made: Jobs, record: dict[str, int] | None, digest: bytes | None, why: str
) -> None:
    with twin(made, 7, record, digest):
        said = again(made)
    assert not said if not why else any(part in said for part in why.split("|"))


def test_difference_behind_what_is_compared_first_is_found(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_PIECE", 64)
    with made.segment() as segment:
        last = segment.count - 1
    with twin(made, last, None, b"d" * 32):
        assert "another digest" in again(made)
    with twin(made):
        assert again(made) == ""


def test_image_of_a_daemon_that_is_gone_contradicts_nobody(
    made: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path))
    with twin(made, 7, {"coff": 1}) as other:
        path = Path("/dev/shm", other.name[1:])
        kept = path.read_bytes()
        (tmp_path / f"other{os.getpid()}.lock").touch()
        assert "another place" in again(made)  # somebody maps it
    path.write_bytes(kept)
    assert not again(made)
    assert not path.exists()


def test_chunk_over_another_ones_place_is_a_contradiction(made: Jobs) -> None:
    """A table may leave out a chunk and give its place to the next."""
    with made.segment() as segment:
        before, after = segment.record(7), segment.record(8)
    record = {"uoff": before.uoff, "usize": after.usize}
    with twin(made, 7, {"usize": 0, "csize": 0, "flags": 0}), twin_of(made, 8, record):
        assert again(made)


@contextlib.contextmanager
def twin_of(made: Jobs, chunk: int, record: dict[str, int]) -> Iterator[None]:
    """Of the other image's segment, one chunk more."""
    other = Segment.open(f"/nydusd.other{os.getpid()}.0123456789abcdef")
    assert other is not None
    RECORD.pack_into(other.records, chunk * 40, *other.record(chunk)._replace(**record))
    with made.segment() as own:
        RECORD.pack_into(own.records, chunk * 40, *own.record(chunk)._replace(usize=0))
    yield
    other.close()


def test_chunks_that_another_image_has_are_ready_and_those_of_other_digests_are_not(made: Jobs) -> None:
    with made.segment() as segment:
        flags = segment.record(3).flags & ~int(ChunkFlag.DIGEST | ChunkFlag.CRC) | UNLISTED
    with twin(made, 3, {"flags": flags, "crc": 0}, bytes(32)) as other:
        for chunk in (2, 3, 4):
            other.state[chunk] = READY
        assert again(made) == ""
        assert [made.states()[chunk] for chunk in (1, 2, 3, 4)] == [EMPTY, READY, EMPTY, READY]


def test_record_of_another_table_is_gone_before_the_file_can_be_written(made: Jobs) -> None:
    """As a hostile image's daemon, killed before its first checkpoint, would leave it to the next."""
    made.checkpoint()
    record = map_file.record_path(made.spec.map_path)
    raw = record.read_bytes()
    layout = map_file.recorded_layout(made.spec.map_path)
    assert layout
    head, _, bits = raw.partition(b"\n")
    record.write_bytes(head.replace(layout.encode(), b"ab" * 32) + b"\n" + bits)
    again(made)
    assert not record.exists()
    assert set(made.states()) == {VERIFY}


def test_lock_that_somebody_keeps_costs_the_cache_file_and_no_read(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_file, "_LOCK_PATIENCE", 0.05)
    fd = os.open(made.data, os.O_RDWR)
    fcntl.fcntl(fd, 37, struct.Struct("hhqqi4x").pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    try:
        assert "keeps its lock" in again(made)
    finally:
        os.close(fd)
    assert again(made) == ""
