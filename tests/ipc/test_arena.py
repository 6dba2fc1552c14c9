"""The slot arena: its allocator against a model, its object in shared memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nydusd.errors import CacheError, ScarceError
from nydusd.ipc.arena import PAGE, Arena
from tests.support.segments import segment_name

PAGES = 20


class _Allocator(RuleBasedStateMachine):
    """A set of used pages is the model."""

    def __init__(self) -> None:
        super().__init__()
        self._name = segment_name()
        self.arena = Arena.create(self._name.__enter__(), PAGES * PAGE)
        self.held: list[tuple[int, int]] = []

    def teardown(self) -> None:
        self.arena.close()
        self._name.__exit__(None, None, None)

    def _used(self) -> set[int]:
        return {p for at, n in self.held for p in range(at // PAGE, at // PAGE + max(-(-n // PAGE), 1))}

    @rule(length=st.integers(0, 8 * PAGE))
    def allocate(self, length: int) -> None:
        used = self._used()
        need = max(-(-length // PAGE), 1)
        fits = any(used.isdisjoint(range(p, p + need)) for p in range(PAGES - need + 1))
        offset = self.arena.allocate(length)
        assert (offset is not None) == fits
        if offset is not None:
            assert offset % PAGE == 0 and offset + length <= self.arena.size
            assert used.isdisjoint(range(offset // PAGE, offset // PAGE + need)), "given out twice"
            self.held.append((offset, length))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.arena.free(*self.held.pop(index))

    @invariant()
    def free_bytes_are_counted(self) -> None:
        assert self.arena.free_bytes() == (PAGES - len(self._used())) * PAGE


def test_allocator_agrees_with_a_model() -> None:
    run_state_machine_as_test(_Allocator, settings=settings(max_examples=60, stateful_step_count=40))


@pytest.fixture
def name() -> Iterator[str]:
    with segment_name() as chosen:
        yield chosen


def test_what_one_process_writes_the_other_sees(name: str) -> None:
    ours = Arena.create(name, 3 * PAGE)
    theirs = Arena.open(name)
    assert theirs.size == ours.size == 3 * PAGE
    theirs.view(PAGE, 5)[:] = b"hello"
    assert bytes(ours.view(PAGE, 5)) == b"hello"
    ours.close()
    theirs.close()


def test_what_is_given_out_is_backed_by_memory_which_is_given_back_when_all_is_free(name: str) -> None:
    arena = Arena.create(name, 50 * PAGE + 1)

    def backed() -> int:
        return os.stat(f"/dev/shm{name}").st_blocks * 512

    assert arena.size == os.stat(f"/dev/shm{name}").st_size == 51 * PAGE
    assert backed() == 0
    offsets = [arena.allocate(length) for length in (10 * PAGE, 1)]
    assert backed() == 11 * PAGE
    arena.view(0, 3)[:] = b"old"
    arena.free(0, 10 * PAGE)
    arena.trim()
    assert backed() == 11 * PAGE, "a piece is still in use"
    arena.free(offsets[1] or 0, 1)
    arena.trim()
    assert backed() == 0
    assert arena.allocate(PAGE) == 0
    assert bytes(arena.view(0, 3)) == bytes(3)
    arena.close()


def test_memory_behind_free_pieces_goes_to_who_needs_some_when_there_is_no_more(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, real, limit = Arena.create(name, 10 * PAGE), os.posix_fallocate, 4 * PAGE

    def backed() -> int:
        return os.stat(f"/dev/shm{name}").st_blocks * 512

    def bounded(fd: int, offset: int, size: int) -> None:
        if backed() + size > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", bounded)
    offsets = [arena.allocate(PAGE) for _ in range(4)]
    assert offsets == [0, PAGE, 2 * PAGE, 3 * PAGE]
    arena.view(PAGE, 4)[:] = b"kept"
    arena.free(0, PAGE)
    arena.free(2 * PAGE, PAGE)
    assert arena.allocate(2 * PAGE) == 4 * PAGE, "two pieces have memory and are not in use"
    assert backed() == limit
    assert bytes(arena.view(PAGE, 4)) == b"kept"
    with pytest.raises(ScarceError, match="No space left"):
        arena.allocate(PAGE)
    assert arena.free_bytes() == 6 * PAGE
    arena.close()


def test_arena_of_a_former_daemon_stays_whole_for_who_maps_it(name: str) -> None:
    old = Arena.create(name, 4 * PAGE)
    old.view(0, 3)[:] = b"old"
    new = Arena.create(name, PAGE)
    assert bytes(old.view(0, 3)) == b"old"
    assert bytes(old.view(3 * PAGE, 3)) == bytes(3), "this would be a SIGBUS if the object had been made smaller"
    assert bytes(new.view(0, 3)) == bytes(3)
    old.close()
    new.close()


def test_full_shared_memory_is_a_want_that_may_end_and_takes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arena = Arena.create(name, PAGE)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ScarceError, match="No space left"):
        arena.allocate(PAGE)
    assert arena.free_bytes() == PAGE
    arena.close()


def test_absent_arena_is_an_error(name: str) -> None:
    with pytest.raises(CacheError, match=name):
        Arena.open(name)


def test_opening_for_each_job_leaks_nothing(name: str) -> None:
    Arena.create(name, PAGE).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        arena = Arena.open(name)
        arena.view(0, 10)[:] = bytes(10)
        arena.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if name[1:] in line]
