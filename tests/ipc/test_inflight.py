"""The board of reads that wait: what a front end shows, and what it takes up of its predecessor."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator

import pytest

from nydusd.errors import CacheError
from nydusd.ipc.inflight import SLOTS, InflightRow, make_board, open_row, waiting
from tests.support.segments import segment_name


@pytest.fixture
def board() -> Iterator[tuple[str, mmap.mmap]]:
    with segment_name() as name, make_board(name, 2) as made:
        yield name, made


def test_each_row_shows_what_waits_in_it_the_oldest_first(
    board: tuple[str, mmap.mmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shown = board
    rows = InflightRow(name, 0), InflightRow(name, 1)
    monkeypatch.setattr(time, "time", lambda: 2000.5)
    late = rows[0].begin(0, 11)
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    early = rows[1].begin(7, 12)
    assert waiting(shown) == [
        {"inode": 12, "opcode": 15, "unique": 7, "timestamp_secs": 1000},
        {"inode": 11, "opcode": 15, "unique": 0, "timestamp_secs": 2000},
    ]
    rows[1].end(early)
    rows[0].end(late)
    assert waiting(shown) == []


def test_one_read_too_many_waits_unseen(board: tuple[str, mmap.mmap]) -> None:
    name, shown = board
    row = InflightRow(name, 1)
    slots = [row.begin(unique, 1) for unique in range(SLOTS + 1)]
    assert slots[-1] == -1
    row.end(-1)
    assert len(waiting(shown)) == SLOTS
    row.end(slots[0])
    assert row.begin(SLOTS, 1) >= 0


def test_what_a_successor_begins_again_has_waited_since_its_predecessor_began(
    board: tuple[str, mmap.mmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shown = board
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    former = InflightRow(name, 0)
    for unique in (1, 2):
        former.begin(unique, 11)
    monkeypatch.setattr(time, "time", lambda: 2000.5)
    successor = InflightRow(name, 0)
    assert waiting(shown) == []
    successor.begin(1, 11)
    successor.begin(1, 11)
    successor.begin(1, 12)
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    successor.begin(2, 11)
    assert [row["timestamp_secs"] for row in waiting(shown)] == [1000, 2000, 2000, 2000]


def test_without_a_row_a_front_end_goes_on(board: tuple[str, mmap.mmap], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CacheError, match="has no row 2"):
        InflightRow(board[0], 2)
    assert open_row(board[0], 2) is None
    assert "reads that wait are not shown" in caplog.text
    assert open_row(None, 0) is None
