"""Taking chunks out of the stored map: what is claimed afterwards, to us and to a reference daemon, and when killed midway."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from nydusd.storage.state import map_file
from nydusd.storage.state.map_file import HEADER_SIZE, clear, record_path
from nydusd.storage.state.segment import READY, Identity

COUNT = 37
CHUNK = 4096


class Cache:
    """A data file of whole chunks, with a map that claims some."""

    def __init__(self, folder: Path, ready: list[int]) -> None:
        self.path = folder / "b.blob.data.chunk_map"
        data = folder / "b.blob.data"
        data.write_bytes(b"x" * CHUNK * COUNT)
        fd = os.open(data, os.O_RDWR)
        self.identity = Identity.of(fd, CHUNK * COUNT, b"L" * 32)
        if ready:
            map_file.checkpoint(self.path, fd, ready, COUNT, self.identity)
        os.close(fd)

    def clear(self, chunks: list[int]) -> int:
        return clear(self.path, chunks, COUNT, self.identity)

    def ready(self) -> list[int]:
        return [i for i, state in enumerate(map_file.load(self.path, COUNT, self.identity)) if state == READY]

    def bits(self) -> list[int]:
        """As any reader of the format sees them."""
        raw = self.path.read_bytes()
        marker = struct.unpack_from("<IIII", raw)[3]
        assert len(raw) == HEADER_SIZE + (COUNT + 7) // 8
        return [i for i in range(COUNT) if marker or raw[HEADER_SIZE + i // 8] >> (7 - i % 8) & 1]


def test_what_is_taken_out_is_claimed_no_more_and_the_rest_is(tmp_path: Path) -> None:
    cache = Cache(tmp_path, [0, 1, 7, 8, 20, 36])
    assert cache.clear([1, 8, 36, 30]) == 3
    assert cache.ready() == cache.bits() == [0, 7, 20]
    assert cache.clear([0, 7, 20]) == 0
    assert cache.ready() == cache.bits() == []


def test_complete_map_loses_its_marker(tmp_path: Path) -> None:
    cache = Cache(tmp_path, list(range(COUNT)))
    assert struct.unpack_from("<IIII", cache.path.read_bytes())[3] != 0
    assert cache.clear([5]) == COUNT - 1
    assert cache.bits() == cache.ready() == [i for i in range(COUNT) if i != 5]


def test_map_that_a_reference_daemon_marked_complete(tmp_path: Path) -> None:
    """It believes the marker without the bits, so these may be anything."""
    cache = Cache(tmp_path, [3])
    raw = bytearray(cache.path.read_bytes())
    struct.pack_into("<I", raw, 12, 0x4D4D4150)
    cache.path.write_bytes(raw)
    cache.clear([5])
    assert cache.bits() == [i for i in range(COUNT) if i != 5]


def test_no_map_stays_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path, [])
    assert cache.clear([1]) == 0
    assert not cache.path.exists()
    assert not record_path(cache.path).exists()


def test_what_is_taken_out_is_not_believed_unchecked_where_another_daemon_makes_the_map_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path, [1, 2])
    foreign = cache.path.read_bytes()
    cache.path.unlink()
    assert cache.clear([1]) == 0
    cache.path.write_bytes(foreign)  # it has fetched both, it says
    assert cache.bits() == [1, 2]
    assert cache.ready() == []


def test_later_checkpoint_claims_what_was_brought_back_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path, [1, 2, 3])
    cache.clear([2, 3])
    fd = os.open(tmp_path / "b.blob.data", os.O_RDWR)
    map_file.checkpoint(cache.path, fd, [1, 3], COUNT, cache.identity)
    os.close(fd)
    assert cache.ready() == cache.bits() == [1, 3]


@pytest.mark.parametrize("step", range(5))
def test_stopped_at_any_write_the_map_claims_no_more_than_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    cache = Cache(tmp_path, list(range(COUNT)))
    left = step

    class Stopped(BaseException):
        pass

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fdatasync", "replace"):
        counted(name)
    try:
        cache.clear([5, 6])
    except Stopped:
        pass
    else:
        pytest.fail(f"there is no step {step}")
    finally:
        monkeypatch.undo()
    assert set(cache.bits()) >= set(range(COUNT)) - {5, 6}
    assert set(cache.ready()) <= set(cache.bits())
    assert set(range(COUNT)) - set(cache.ready()) <= {5, 6}
