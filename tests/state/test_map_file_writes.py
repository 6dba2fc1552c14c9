"""Writing the stored chunk map: in what order, by several at once, on a full disk, and that a kill at any step tells no lie."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nydusd.errors import CacheError
from nydusd.storage.state import map_file
from nydusd.storage.state.map_file import UnsyncedError
from tests.state.stored_map import COUNT, SIZE, Cache
from tests.support.segments import in_child, join

# --- writing --------------------------------------------------------------------------------------------------


def test_data_that_does_not_reach_its_disk_is_not_claimed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.checkpoint([1])
    before = cache.path.read_bytes(), cache.record.read_bytes()

    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(UnsyncedError) as caught:
        cache.checkpoint([1, 2])
    assert caught.value.cause_errno == errno.EIO
    assert (cache.path.read_bytes(), cache.record.read_bytes()) == before


def test_full_disk_leaves_no_half_made_map(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, _offset: int, size: int) -> None:
        os.ftruncate(fd, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match="No space left"):
        cache.checkpoint([1])
    assert not cache.path.exists()
    assert not cache.record.exists()


def test_lock_that_is_never_given_back_is_an_error(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_file, "_LOCK_PATIENCE", 0.05)
    cache.foreign([1])
    other = os.open(cache.path, os.O_RDWR)
    fcntl.fcntl(other, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    with pytest.raises(CacheError, match="checkpoint"):
        cache.checkpoint([2])
    assert cache.doubted() == [1]
    os.close(other)
    cache.checkpoint([2])
    assert cache.believed() == [2]


def test_checkpoints_of_several_processes_take_turns(cache: Cache) -> None:
    def write(first: int) -> None:
        for n in range(1, 21):
            cache.checkpoint(list(range(first, first + n)))

    children = [in_child(lambda first=first: write(first)) for first in (0, 50, 100)]  # type: ignore[misc]
    assert [join(pid) for pid in children] == [0] * 3
    states = cache.load()
    wanted = {i for first in (0, 50, 100) for i in range(first, first + 20)}
    assert {i for i, state in enumerate(states) if state} == wanted
    assert set(cache.believed()) in [set(range(first, first + 20)) for first in (0, 50, 100)], "the record of the last"


_CALLS = ("open", "pread", "pwrite", "posix_fallocate", "fdatasync", "replace", "close")


def _trace(cache: Cache, ready: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a checkpoint does, in order: names of calls, with the file they are about."""
    seen = []
    for call in ("pwrite", "fdatasync", "replace"):

        def recorded(target: object, *rest: object, call: str = call, real: Callable[..., object]) -> object:
            name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            where = rest[1] if call == "pwrite" else ""
            seen.append(f"{call} {name.removeprefix(str(cache.data))}{f' {where}' if where != '' else ''}")
            return real(target, *rest)

        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, _r=real, _f=recorded: _f(*a, real=_r))
    cache.checkpoint(ready)
    monkeypatch.undo()
    return seen


def test_order_is_data_then_bits_then_map_then_record(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _trace(cache, [1], monkeypatch) == [
        "fdatasync ",
        "pwrite .chunk_map 0",
        "pwrite .chunk_map 4096",
        "fdatasync .chunk_map",
        "fdatasync .chunk_map.nydusd.tmp",
        "replace .chunk_map.nydusd.tmp",
    ]
    assert _trace(cache, list(range(COUNT)), monkeypatch) == [
        "fdatasync ",
        "pwrite .chunk_map 4096",
        "fdatasync .chunk_map",
        "pwrite .chunk_map 0",
        "fdatasync .chunk_map",
        "fdatasync .chunk_map.nydusd.tmp",
        "replace .chunk_map.nydusd.tmp",
    ]


def _killed_at(cache: Cache, ready: list[int], step: int, torn: bool) -> bool:
    """Checkpoint in a child that dies at its `step`-th system call, half done if `torn`. False if it has fewer."""

    def work() -> None:
        left = [step]
        for call in _CALLS:

            def counted(*args: object, call: str = call, real: Callable[..., object]) -> object:
                left[0] -= 1
                if not left[0]:
                    if torn and call == "pwrite":
                        fd, data, at = args
                        assert isinstance(data, memoryview)
                        real(fd, data[: len(data) // 2], at)
                    os._exit(9)
                return real(*args)

            real = getattr(os, call)
            setattr(os, call, lambda *a, _r=real, _f=counted, **k: _f(*a, real=lambda *b: _r(*b, **k)))
        cache.checkpoint(ready)

    status = join(in_child(work))
    assert status in (0, 9)
    return status == 9


def _nothing(_cache: Cache) -> None:
    pass


def _older(cache: Cache) -> None:
    cache.checkpoint([1, 2, 200])


def _foreign(cache: Cache) -> None:
    cache.foreign([2, 77])


def _garbage(cache: Cache) -> None:
    cache.path.write_bytes(b"\xff" * SIZE)


def _zeros(cache: Cache) -> None:
    cache.path.write_bytes(bytes(SIZE))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("before", [_nothing, _older, _foreign, _garbage, _zeros])
def test_checkpoint_killed_at_any_step_claims_only_what_is_true(
    tmp_path: Path, before: Callable[[Cache], None], torn: bool
) -> None:
    truth = {1, 2, 3, 100, 200, 372}
    step = 0
    killed = True
    while killed:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        cache = Cache(folder)
        before(cache)
        killed = _killed_at(cache, sorted(truth), step, torn)
        claimed = cache.bits() if cache.path.exists() else b""
        foreign = {77} if before is _foreign else set()
        if before is not _garbage or claimed[:1] != b"\xff":  # not replaced yet: the reference refuses it, so do we
            set_bits = {i for i in range(8 * len(claimed)) if claimed[i // 8] & 0x80 >> i % 8}
            assert set_bits <= truth | foreign
        assert set(cache.believed()) <= truth
        assert set(cache.doubted()) <= truth | foreign
        if before is _older:
            assert {1, 2, 200} <= set(cache.believed()), "what was stored before is not lost"
        cache.checkpoint(sorted(truth))
        assert set(cache.believed()) == truth
        # The record's temporary file of a killed checkpoint is used again by the next.
        assert {p.name.removeprefix("b.blob.data") for p in folder.iterdir()} <= {
            "",
            ".chunk_map",
            ".chunk_map.nydusd",
            ".chunk_map.bad",
        }
    assert step > 8, "there are more steps than that: nothing was tested"
