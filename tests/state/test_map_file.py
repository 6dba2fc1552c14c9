"""The stored chunk map: its bytes, and what of it is believed after each disaster."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nydusd.errors import CacheError
from nydusd.storage.state.map_file import checkpoint, drop_holes, forget_deleted, load
from nydusd.storage.state.segment import EMPTY, READY, VERIFY, Identity
from tests.state.stored_map import CHUNK, COUNT, SIZE, Cache

# --- the format -----------------------------------------------------------------------------------------------


def test_complete_map_has_the_bytes_of_the_reference(cache: Cache) -> None:
    cache.checkpoint(list(range(COUNT)))
    raw = cache.path.read_bytes()
    assert raw[:16] == bytes.fromhex("50414d42 01000000 50414d43 50414d4d")
    assert raw[16:4096] == bytes(4080)
    assert raw[4096:] == b"\xff" * 46 + b"\xf8"


def test_first_chunk_is_the_highest_bit(cache: Cache) -> None:
    cache.checkpoint([3, 8])
    raw = cache.path.read_bytes()
    assert raw[:16] == bytes.fromhex("50414d42 01000000 50414d43 00000000")
    assert raw[4096:] == b"\x10\x80" + bytes(45)
    assert cache.believed() == [3, 8]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096])
def test_size_is_exact_for_any_count(tmp_path: Path, count: int) -> None:
    data, path = tmp_path / "d", tmp_path / "m"
    data.write_bytes(b"x")
    fd = os.open(data, os.O_RDWR)
    identity = Identity.of(fd, 1)
    checkpoint(path, fd, [count - 1], count, identity)
    os.close(fd)
    assert path.stat().st_size == 4096 + -(-count // 8)
    assert list(load(path, count, identity)) == [EMPTY] * (count - 1) + [READY]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sets(st.integers(0, COUNT - 1)), second=st.sets(st.integers(0, COUNT - 1)))
def test_what_is_stored_is_what_is_loaded(cache: Cache, first: set[int], second: set[int]) -> None:
    for left in (cache.path, cache.record):
        left.unlink(missing_ok=True)
    cache.checkpoint(sorted(first))
    assert cache.believed() == sorted(first)
    cache.checkpoint(sorted(first | second))
    assert cache.believed() == sorted(first | second)
    assert cache.doubted() == []


def test_marker_of_the_reference_stands_for_all_bits(cache: Cache) -> None:
    cache.checkpoint([5])
    cache.foreign([5], marker=0x4D4D4150)
    assert cache.believed() == [5]
    assert cache.doubted() == [i for i in range(COUNT) if i != 5]


def test_bits_of_another_daemon_are_kept_and_only_believed_after_a_check(cache: Cache) -> None:
    cache.checkpoint([1, 2])
    cache.foreign([1, 2, 50, 372])
    assert cache.believed() == [1, 2]
    assert cache.doubted() == [50, 372]
    cache.checkpoint([1, 2, 7])
    assert cache.believed() == [1, 2, 7]
    assert cache.doubted() == [50, 372]


def test_marker_is_never_set_on_the_word_of_another(cache: Cache) -> None:
    cache.foreign(list(range(1, COUNT)))
    cache.checkpoint([0])
    assert cache.path.read_bytes()[12:16] == bytes(4)
    assert cache.bits() == b"\xff" * 46 + b"\xf8"


def test_map_of_version_0_is_taken_as_foreign(cache: Cache) -> None:
    cache.foreign([9])
    raw = bytearray(cache.path.read_bytes())
    raw[4:12] = bytes(8)
    cache.path.write_bytes(raw)
    assert cache.doubted() == [9]


# --- disasters ------------------------------------------------------------------------------------------------


def _cut(raw: bytearray) -> None:
    del raw[-1:]


def _longer(raw: bytearray) -> None:
    raw += b"\0"


def _magic(raw: bytearray) -> None:
    raw[0] ^= 1


def _magic2(raw: bytearray) -> None:
    raw[8] ^= 1


def _version(raw: bytearray) -> None:
    raw[4] = 2


def _padding(raw: bytearray) -> None:
    raw[-1] |= 1


def _header_lost(raw: bytearray) -> None:
    raw[:4096] = bytes(4096)


@pytest.mark.parametrize("damage", [_cut, _longer, _magic, _magic2, _version, _padding, _header_lost])
def test_damaged_map_is_set_aside_and_a_new_one_begun(cache: Cache, damage: Callable[[bytearray], None]) -> None:
    cache.checkpoint([3, 300])
    raw = bytearray(cache.path.read_bytes())
    damage(raw)
    cache.path.write_bytes(raw)
    assert bytes(cache.load()) == bytes(COUNT)
    assert not cache.path.exists()
    assert cache.path.with_name(cache.path.name + ".bad").read_bytes() == raw
    cache.checkpoint([4])
    assert cache.believed() == [4]
    assert cache.doubted() == []


@pytest.mark.parametrize("damage", [_cut, _longer, _magic, _padding])
def test_map_damaged_while_we_run_is_replaced_not_shortened(cache: Cache, damage: Callable[[bytearray], None]) -> None:
    cache.foreign([1])
    raw = bytearray(cache.path.read_bytes())
    damage(raw)
    cache.path.write_bytes(raw)
    mapped = os.open(cache.path, os.O_RDONLY)  # a reference daemon may have it mapped: it must not shrink
    cache.checkpoint([4])
    assert os.fstat(mapped).st_size == len(raw)
    os.close(mapped)
    assert cache.believed() == [4]
    assert cache.doubted() == []


@pytest.mark.parametrize("size", [0, SIZE])
def test_map_that_was_about_to_be_made_is_empty(cache: Cache, size: int) -> None:
    cache.path.write_bytes(bytes(size))
    assert bytes(cache.load()) == bytes(COUNT)
    cache.checkpoint([4])
    assert cache.believed() == [4]


def test_map_of_another_data_file_is_not_ours(cache: Cache) -> None:
    cache.checkpoint([1, 2, 3])
    cache.data.unlink()
    cache.data.write_bytes(bytes(CHUNK * COUNT))  # often the same inode number
    assert cache.believed() == []
    assert cache.doubted() == [1, 2, 3]


def test_map_of_another_layout_is_not_ours(cache: Cache) -> None:
    cache.checkpoint([1])
    identity = cache.identity()
    for other in (
        Identity(identity.dev, identity.ino, identity.size, identity.birth, b"M" * 32),
        Identity(identity.dev, identity.ino, identity.size + 1, identity.birth, identity.layout),
        Identity(identity.dev, identity.ino, identity.size, identity.birth + 1, identity.layout),
        Identity(identity.dev, identity.ino + 1, identity.size, identity.birth, identity.layout),
    ):
        assert load(cache.path, COUNT, other)[1] == VERIFY
    after_boot = Identity(identity.dev + 1, identity.ino, identity.size, identity.birth, identity.layout)
    assert load(cache.path, COUNT, after_boot)[1] == READY, "device numbers may change with each boot"


def test_record_without_map_claims_nothing(cache: Cache) -> None:
    cache.checkpoint([1, 2])
    cache.path.unlink()
    assert bytes(cache.load()) == bytes(COUNT)


def test_record_goes_when_its_map_was_deleted_and_not_before(cache: Cache) -> None:
    cache.checkpoint([1, 2])
    assert forget_deleted(cache.path)
    assert cache.believed() == [1, 2]
    cache.path.unlink()
    assert not forget_deleted(cache.path)
    assert not cache.record.exists()
    assert not forget_deleted(cache.path)


def test_what_was_set_aside_goes_with_what_it_was_of(cache: Cache) -> None:
    """It may be as large as a layer, and whoever collects garbage does not know these names."""
    cache.checkpoint([1, 2])
    data = cache.path.with_suffix("")
    kept = [path.with_name(f"{path.name}.bad") for path in (cache.path, data)]
    for path in kept:
        path.touch()
    assert forget_deleted(cache.path)
    assert [path.exists() for path in kept] == [True, True]
    cache.path.unlink()
    assert not forget_deleted(cache.path)
    assert [path.exists() for path in kept] == [False, True], "somebody may have the data file still"
    data.unlink()
    assert not forget_deleted(cache.path)
    assert [path.exists() for path in kept] == [False, False]


def test_what_cannot_be_looked_at_is_looked_at_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def fails(path: Path) -> bool:
        if path == cache.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return exists(path)

    cache.checkpoint([1, 2])
    cache.path.unlink()
    monkeypatch.setattr(Path, "exists", fails)
    assert forget_deleted(cache.path)
    monkeypatch.undo()
    assert cache.record.exists()


def test_record_torn_or_flipped_anywhere_is_no_record(cache: Cache) -> None:
    cache.checkpoint([3])
    cache.foreign(list(range(COUNT)))
    good = cache.record.read_bytes()
    assert cache.believed() == [3]
    for at in range(len(good)):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :]):
            cache.record.write_bytes(bad)
            assert set(cache.believed()) <= {3}, f"byte {at}"
    for bad in (b"", b"\n", b"[" * 3000, b"[]\n", b"9" * 4000 + b"\n", good + b"\0", b"\xff\n" + bytes(47)):
        cache.record.write_bytes(bad)
        assert cache.believed() == []


def test_what_is_no_file_is_not_read(cache: Cache) -> None:
    for make in (os.mkdir, os.mkfifo):
        for path in (cache.path, cache.record):
            path.unlink(missing_ok=True)
            cache.foreign([1])
            path.unlink(missing_ok=True)
            make(path)
            assert cache.believed() == []
            if path == cache.path:
                with pytest.raises(CacheError):
                    cache.checkpoint([1])
            os.rmdir(path) if path.is_dir() else path.unlink()


def test_hole_in_a_chunk_means_it_is_not_there(cache: Cache) -> None:
    sparse = cache.data.with_name("sparse")
    with open(sparse, "wb") as file:
        file.truncate(10 * CHUNK)
        file.seek(2 * CHUNK)
        file.write(b"x" * 3 * CHUNK)
        file.seek(9 * CHUNK)
        file.write(b"x" * CHUNK)
    fd = os.open(sparse, os.O_RDONLY)
    places = [(i * CHUNK, CHUNK) for i in range(10)]
    state = bytearray([READY, VERIFY] * 5)
    assert drop_holes(fd, state, places, 10 * CHUNK) == 6
    assert [i for i in range(10) if state[i]] == [2, 3, 4, 9]
    across = [
        (0, 0),
        (CHUNK + 1, CHUNK),
        (3 * CHUNK, 2 * CHUNK),
        (5 * CHUNK - 1, 2),
        (9 * CHUNK, CHUNK),
        (10 * CHUNK, 0),
    ]
    state = bytearray([READY] * len(across))
    assert drop_holes(fd, state, across, 10 * CHUNK) == 2
    assert list(state) == [READY, EMPTY, READY, EMPTY, READY, READY], "a chunk of no bytes is in no hole"
    state = bytearray([READY] * 3)
    assert drop_holes(fd, state, [(9 * CHUNK, CHUNK + 1), (10 * CHUNK, 1), (11 * CHUNK, 5)], 10 * CHUNK) == 3
    os.close(fd)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=st.sets(st.integers(0, 30)),
    places=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 9000)), max_size=12),
    on_tmpfs=st.booleans(),
)
def test_holes_against_a_model(
    tmp_path: Path, written: set[int], places: list[tuple[int, int]], on_tmpfs: bool
) -> None:
    size = 31 * CHUNK
    flags = os.O_RDWR | os.O_TMPFILE
    fd = os.open("/dev/shm" if on_tmpfs else tmp_path, flags, 0o600)
    try:
        os.ftruncate(fd, size)
        for block in written:
            os.pwrite(fd, b"x", block * CHUNK)
        ranges = []
        end = 0
        for gap, length in places:
            ranges.append((end + gap, length))
            end += gap + length
        ranges = [r for r in ranges if sum(r) <= size]
        state = bytearray([READY]) * len(ranges)
        drop_holes(fd, state, ranges, size)
        for i, (at, length) in enumerate(ranges):
            assert (state[i] == READY) == (set(range(at // CHUNK, (at + length - 1) // CHUNK + 1)) <= written)
    finally:
        os.close(fd)


def test_record_is_one_line_of_json_and_the_bits(cache: Cache) -> None:
    cache.checkpoint([0])
    head, _, bits = cache.record.read_bytes().partition(b"\n")
    assert json.loads(head).keys() == {"version", "mode", "size", "inode", "birth", "layout", "crc"}
    assert bits == b"\x80" + bytes(46)
