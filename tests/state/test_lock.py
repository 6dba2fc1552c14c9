"""The lock of a segment: who waits, who dies with it, who takes over. Order is by events, never by time."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from nydusd.errors import CacheError, ScarceError
from nydusd.storage.state import lock as lock_module
from nydusd.storage.state.lock import BlobLock, is_there, start_time
from nydusd.storage.state.segment import LOCK_OFFSET, Segment
from tests.support.scarce import no_fd_left
from tests.support.segments import die_at, in_child, join, make_segment, segment_name

_RECORD = struct.Struct("<QQ")


@pytest.fixture
def segment() -> Iterator[Segment]:
    with segment_name() as name:
        made = make_segment(name, 4)
        yield made
        made.close()


def _semaphore(segment: Segment) -> posix_ipc.Semaphore:
    inode = os.stat(f"/dev/shm{segment.name}").st_ino
    return posix_ipc.Semaphore(f"{segment.name}.{inode}", posix_ipc.O_CREAT, 0o600, 1)


def _record(segment: Segment) -> memoryview:
    return segment._view[LOCK_OFFSET : LOCK_OFFSET + 16]


def _count_to(name: str, rounds: int) -> None:
    """Add to a number in shared memory in a way that loses counts if two do it at once."""
    own = Segment.open(name)
    assert own is not None
    number = own.counters(0)
    for _ in range(rounds):
        with own.lock():
            seen = number[0]
            os.sched_yield()
            number[0] = seen + 1
    number.release()
    own.close()


def _value(segment: Segment) -> int:
    semaphore = _semaphore(segment)
    try:
        return semaphore.value
    finally:
        semaphore.close()


def test_only_one_process_is_inside(segment: Segment) -> None:
    children = [in_child(lambda: _count_to(segment.name, 300)) for _ in range(4)]
    assert [join(pid) for pid in children] == [0] * 4
    assert segment.totals()[0] == 1200
    assert _value(segment) == 1


def _hold_for_ever(name: str, ready: int) -> None:
    own = Segment.open(name)
    assert own is not None
    with own.lock():
        os.write(ready, b"x")
        signal.pause()


def _killed_holder(segment: Segment) -> int:
    out, into = os.pipe()
    holder = in_child(lambda: _hold_for_ever(segment.name, into))
    os.close(into)
    assert os.read(out, 1) == b"x"
    os.close(out)
    os.kill(holder, signal.SIGKILL)
    return holder


def test_lock_of_a_killed_holder_is_taken_over_even_while_it_is_a_zombie(segment: Segment) -> None:
    holder = _killed_holder(segment)
    with segment.lock():
        assert _value(segment) == 0
    assert _value(segment) == 1
    assert join(holder) == -signal.SIGKILL


def test_one_of_many_waiters_takes_over_and_the_others_wait_for_it(segment: Segment) -> None:
    join(_killed_holder(segment))
    children = [in_child(lambda: _count_to(segment.name, 50)) for _ in range(4)]
    assert [join(pid) for pid in children] == [0] * 4
    assert segment.totals()[0] == 200
    assert _value(segment) == 1


def test_dead_owner_is_succeeded_once(segment: Segment) -> None:
    join(_killed_holder(segment))
    owner = _RECORD.unpack(_record(segment))
    lock = segment.lock()
    assert lock._take_over(owner)
    assert not lock._take_over(owner), "its successor lives: it must not be robbed by whoever also saw the dead owner"
    lock.__exit__(None, None, None)
    assert not lock._take_over(owner), "its successor is done: the lock is free and must be acquired"
    assert _value(segment) == 1


def test_pid_of_a_younger_process_does_not_keep_a_lock(segment: Segment) -> None:
    semaphore = _semaphore(segment)
    semaphore.acquire()
    me = os.getpid()
    _RECORD.pack_into(_record(segment), 0, me, start_time(me) - 1)
    with segment.lock():
        assert _RECORD.unpack(_record(segment)) == (me, start_time(me))
    assert semaphore.value == 1
    semaphore.close()


def test_live_holder_is_waited_for(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_out, looked = os.pipe()
    monkeypatch.setattr(lock_module, "PATIENCE", 0.001)
    is_dead = BlobLock._is_dead

    def counting(owner: tuple[int, int], waited: float) -> bool:
        os.write(looked, b"x")
        return is_dead(owner, waited)

    def wait_in_line() -> None:
        own = Segment.open(segment.name)
        assert own is not None
        with own.lock():
            assert own.counters(0)[0] == 1, "got in before the holder was done"

    monkeypatch.setattr(BlobLock, "_is_dead", staticmethod(counting))
    with segment.lock():
        waiter = in_child(wait_in_line)
        for _ in range(20):  # it has looked at us 20 times
            assert os.read(looked_out, 1) == b"x"
        segment.counters(0)[0] = 1
    assert join(waiter) == 0
    os.close(looked)
    os.close(looked_out)


def test_holder_killed_before_it_left_its_record_is_succeeded(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "GRACE", 0.1)
    semaphore = _semaphore(segment)
    semaphore.acquire()
    with segment.lock():
        assert semaphore.value == 0
    assert semaphore.value == 1
    semaphore.close()


@pytest.mark.parametrize("point", ["lock: taken", "lock: held", "lock: record cleared", ""])
def test_lock_that_nobody_else_has_is_free_at_once_wherever_its_holder_was_killed(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def die_there() -> None:
        die_at(point)
        own = Segment.open(segment.name)
        assert own is not None
        with own.lock():
            pass

    def waited(*_: object) -> bool:
        raise AssertionError("it is waited for somebody")

    assert join(in_child(die_there)) == (-signal.SIGKILL if point else 0)
    monkeypatch.setattr(BlobLock, "_is_dead", staticmethod(waited))
    segment.lock().reset()
    for _ in range(2):
        with segment.lock():
            assert _value(segment) == 0
        assert _value(segment) == 1
    assert _RECORD.unpack(_record(segment)) == (0, 0)


def test_process_that_was_taken_for_dead_does_not_let_two_in_for_ever(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "GRACE", 0.1)
    semaphore = _semaphore(segment)
    semaphore.acquire()  # and is stopped before it leaves its record
    with segment.lock():
        pass
    stopped = segment.lock()
    _RECORD.pack_into(_record(segment), 0, *stopped._me)  # goes on
    stopped.__exit__(None, None, None)
    assert semaphore.value == 1
    semaphore.close()


def test_lock_whose_name_was_removed_is_taken_over_too(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "GRACE", 0.1)
    semaphore = _semaphore(segment)
    semaphore.acquire()
    lock = segment.lock()
    posix_ipc.unlink_semaphore(lock._name)
    with lock:
        assert semaphore.value == 0
    assert semaphore.value == 1
    semaphore.close()


def test_next_generation_has_a_lock_of_its_own(segment: Segment) -> None:
    old = segment.lock()
    with old, (newer := make_segment(segment.name, 4, generation=2)).lock():
        pass
    assert _value(newer) == 1
    newer.close()
    with old:
        pass


def test_start_time_of_nobody_is_zero() -> None:
    child = in_child(lambda: None)
    join(child)
    assert start_time(child) == 0
    assert start_time(os.getpid()) > 0


def test_process_is_not_taken_for_gone_where_that_cannot_be_told() -> None:
    me = os.getpid(), start_time(os.getpid())
    assert is_there(*me)
    assert not is_there(me[0], me[1] - 1)
    with no_fd_left(me[0]), pytest.raises(ScarceError):
        is_there(*me)
    child = in_child(lambda: None)
    join(child)
    assert not is_there(child, -1)


def test_process_that_was_noted_without_its_start_time_is_ours_by_its_title() -> None:
    pid, untold = os.getpid(), -1
    assert not is_there(pid, untold)
    former = Path("/proc/self/comm").read_text()
    Path("/proc/self/comm").write_text("nydusd: guard")
    try:
        with pytest.raises(CacheError, match=f"kill -9 {pid}"):
            is_there(pid, untold)
    finally:
        Path("/proc/self/comm").write_text(former)


def test_lock_is_not_taken_by_who_cannot_leave_a_record(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "open", none_left, raising=False)
        with pytest.raises(ScarceError), segment.lock():
            pass
    with segment.lock():
        assert _value(segment) == 0
    assert _value(segment) == 1


@pytest.mark.parametrize("lack", [lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MemoryError])
def test_lock_for_which_shared_memory_has_no_room_can_be_had_later(
    lack: Callable[[], Exception], segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers wait for that, as they do where there is none for the segment, instead of getting an error."""

    def full(*_: object) -> None:
        raise lack()

    with monkeypatch.context() as patch:
        patch.setattr(posix_ipc, "Semaphore", full)
        with pytest.raises(ScarceError):
            segment.lock()
    with segment.lock():
        pass
