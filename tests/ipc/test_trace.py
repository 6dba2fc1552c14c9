"""The trace of first reads: what is noted, by how many, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nydusd.formats.model import Extent
from nydusd.ipc import trace
from nydusd.ipc.trace import MISSED, RECORD, Trace, read_trace


def vec(*chunks: int, blob: int = 0) -> list[Extent]:
    return [Extent(blob, chunk, 0, 0, 10, 10) for chunk in chunks]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty trace, as a supervisor makes it."""
    path = tmp_path / "t"
    path.touch()
    return path


def noted(path: Path) -> list[Sequence[int]]:
    """(inode, blob, chunk, chunks, flags) of each record."""
    return [read[1:] for read in read_trace(str(path))]


def test_each_file_and_each_chunk_is_noted_once(path: Path) -> None:
    front_end = Trace(str(path))
    front_end.note(7, vec(3), True)
    front_end.note(7, vec(3), False)
    front_end.note(8, vec(3), False)
    front_end.note(7, vec(3, 4, 5), False)
    front_end.note(7, vec(4, 5), False)
    front_end.note(7, [], False)
    assert noted(path) == [(7, 0, 3, 1, MISSED), (8, 0, 3, 1, 0), (7, 0, 3, 3, 0)]


def test_runs_of_chunks_are_one_record_each(path: Path) -> None:
    Trace(str(path)).note(7, [*vec(1, 2, 2, 9), *vec(10, blob=1)], False)
    assert noted(path) == [(7, 0, 1, 2, 0), (7, 0, 9, 1, 0), (7, 1, 10, 1, 0)]


def test_order_of_several_front_ends_is_that_of_time(path: Path) -> None:
    one, two = Trace(str(path)), Trace(str(path))
    for ino in range(2, 40, 2):
        one.note(ino, vec(ino), False)
        two.note(ino + 1, vec(ino), False)
    assert [read[0] for read in noted(path)] == list(range(2, 40))
    times = [read.when for read in read_trace(str(path))]
    assert times == sorted(times)


def test_trace_ends_at_its_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_BYTES", 10 * RECORD.size)
    front_end = Trace(str(path))
    for ino in range(100):
        front_end.note(ino, vec(ino), False)
    assert len(noted(path)) == 10
    assert not front_end._seen, "memory is kept for what is never noted"
    Trace(str(path)).note(1, vec(1), False)  # a successor notes one, sees that it is full, and stops, too
    assert len(noted(path)) == 11


def test_memory_of_a_front_end_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_MAX_SEEN", 50)
    front_end = Trace(str(path))
    for ino in range(100):
        front_end.note(ino, vec(ino), False)
        assert len(front_end._seen) < 50
    assert len(noted(path)) == 50


def test_place_that_cannot_be_written_costs_the_trace_and_nothing_else(tmp_path: Path) -> None:
    front_end = Trace(str(tmp_path / "gone" / "t"))
    front_end.note(1, vec(1), False)
    front_end.note(2, vec(2), False)
    assert not (tmp_path / "gone").exists()


def test_trace_of_an_image_that_was_unmounted_is_not_made_again(path: Path) -> None:
    front_end = Trace(str(path))
    front_end.note(1, vec(1), False)
    path.unlink()
    front_end.note(2, vec(2), False)
    assert not path.exists()


def test_cut_off_end_is_left_out(path: Path) -> None:
    Trace(str(path)).note(7, [*vec(1), *vec(5)], False)
    path.write_bytes(path.read_bytes()[:-5])
    assert noted(path) == [(7, 0, 1, 1, 0)]
