"""The lock of a blob segment: a POSIX semaphore with an owner record, so that a holder that is killed blocks nobody.

Used by the processes that claim chunks or checkpoint a map; setting *ready* needs no lock. The owner writes its pid and
start time into the segment's header after it took the semaphore and clears them before it gives it back. Whoever
waits longer than `PATIENCE` looks at the record: if that process is gone (or its pid belongs to a younger process), the
waiter takes the lock over without touching the semaphore's count, which the dead owner had taken and now passes on.
Waiters that find the same dead owner settle who takes over by flock(2) on the semaphore's file, which the kernel ends.

What holds after SIGKILL: between `acquire` and the record the record is empty, so waiters treat an empty record that
does not change for `GRACE` as a dead owner's. The protected sections only flip state bytes, which can be repeated, so a
process that was stopped (not killed) for so long in that one window does no harm when it goes on. A supervisor that takes a
segment over knows that nobody has the lock, and waits for none of this (`reset`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from pathlib import Path
from types import TracebackType

import posix_ipc

from nydusd import points
from nydusd.errors import CacheError, ScarceError, is_scarce, shared_memory_error

PATIENCE = 0.05
"""Seconds to wait for the semaphore before its owner is looked at."""

GRACE = 1.0
"""Seconds after which an owner that left no record is taken for dead."""

_RECORD = struct.Struct("<QQ")
_SHM = Path("/dev/shm")  # where glibc keeps named semaphores


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); 0 if there is no such process.

    -1 if that cannot be told, for want of a file descriptor.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            stat = f.read()
    except OSError as e:
        return -1 if is_scarce(e) else 0
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return 0
    return int(fields[19])


def is_there(pid: int, start: int) -> bool:
    """Whether the process that was noted with this start time is there still.

    Raises ScarceError if that cannot be told now, and CacheError if it never can: a process of ours has that pid, and which one
    was not noted. Either is not to be taken for the end of a process that holds something.
    """
    now = start_time(pid)
    if now < 0:
        raise ScarceError(f"whether pid {pid} has ended cannot be told now: no file descriptor is left")
    if start >= 0 or not now:
        return start > 0 and now == start
    try:
        with open(f"/proc/{pid}/comm", "rb") as f:
            ours = f.read().startswith(b"nydusd: ")
    except OSError as e:
        if is_scarce(e):
            raise ScarceError(f"who pid {pid} is cannot be told now: no file descriptor is left") from e
        return False
    if ours:
        raise CacheError(
            f"pid {pid} was noted without its start time, and a process of a nydusd has that pid: if `ps -fp {pid}` shows"
            f" that it is of this daemon, end it with `kill -9 {pid}`, and start again"
        )
    return False


class BlobLock:
    """Mutual exclusion between processes over one segment; `record` is 16 writable bytes in its header."""

    def __init__(self, name: str, record: memoryview, create: bool = False) -> None:
        self._record = record
        self._name = name
        self._me = (os.getpid(), start_time(os.getpid()))
        if self._me[1] < 0:
            raise ScarceError(f"semaphore {name}: the start time of this process cannot be read now")
        flags = posix_ipc.O_CREAT if create else 0
        try:
            self._sem = posix_ipc.Semaphore(name, flags, 0o600, 1) if create else posix_ipc.Semaphore(name)
        except (OSError, MemoryError, posix_ipc.Error) as e:
            raise shared_memory_error(f"semaphore {name}", e) from e

    def __enter__(self) -> BlobLock:
        last, since = None, 0.0
        while True:
            try:
                self._sem.acquire(PATIENCE)
            except posix_ipc.SignalError:
                continue
            except posix_ipc.BusyError:
                owner = _RECORD.unpack(self._record)
                now = time.monotonic()
                if owner != last:  # also a record that was read while it was being written
                    last, since = owner, now
                elif self._is_dead(owner, now - since) and self._take_over(owner):
                    return self
            else:
                points.reach("lock: taken")
                _RECORD.pack_into(self._record, 0, *self._me)
                points.reach("lock: held")
                return self

    @staticmethod
    def _is_dead(owner: tuple[int, int], waited: float) -> bool:
        pid, start = owner
        return start_time(pid) not in (start, -1) if pid else waited > GRACE

    def _take_over(self, owner: tuple[int, int]) -> bool:
        """Become the owner in place of a dead one. False if another waiter was faster."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):  # its name was removed: nobody new comes to it
                guard = os.open(_SHM / f"sem.{self._name[1:]}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, guard)
                fcntl.flock(guard, fcntl.LOCK_EX)
            if _RECORD.unpack(self._record) != owner or self._sem.value:
                return False
            _RECORD.pack_into(self._record, 0, *self._me)
            points.reach("lock: taken over")
            return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _RECORD.unpack(self._record) == self._me:
            _RECORD.pack_into(self._record, 0, 0, 0)
            points.reach("lock: record cleared")
            # Not 0 only if we were taken for dead and our successor is done: a second release would let two in for ever.
            if not self._sem.value:
                self._sem.release()

    def reset(self) -> None:
        """Nobody else has the lock, or wants it: whatever he has left who had it when he was killed, it is free.

        Killed in the middle of it, the record is empty and the next one does it again.
        """
        _RECORD.pack_into(self._record, 0, 0, 0)
        if not self._sem.value:
            self._sem.release()

    def close(self) -> None:
        self._record.release()
        self._sem.close()
