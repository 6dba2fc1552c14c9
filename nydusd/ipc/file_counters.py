"""What a front end counts of each file of a mount, if the image's configuration asks for that.

It is one growing table in POSIX shared memory for each mount and front end. The supervisor makes them, empty, and removes them
with the image: a front end that is asked still when that is gone must not make another.

Its one writer appends a row at the first access to a file, and adds to it from then on; readers sum the rows of all front ends.
A row is complete before the table's length says so. One field of a row is the reader's: how many reads it has told of. After
SIGKILL of the front end the table stays and its successor goes on with it.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from typing import Any, Final

import posix_ipc

from nydusd.errors import CacheError, cache_error
from nydusd.ipc.mount_counters import OPS, READ, size_class

INO, FIRST, READS, TOLD, FOPS, BYTES = range(6)
SIZES = 6
HITS = SIZES + 8
ERRORS = HITS + OPS
WORDS: Final = 48
"""Fields of a row, 8 bytes each; the first row holds the number of rows that follow."""
_FIRST_ROWS = 170
"""64 KiB."""

Row = list[int]


def make_tables(prefix: str, rows: int) -> None:
    """The tables of one mount for so many front ends, empty where they are not there.

    Raises CacheError, ScarceError when no file descriptor is left.
    """
    for row in range(rows):
        name = f"{prefix}.{row}"
        try:
            posix_ipc.SharedMemory(name, posix_ipc.O_CREAT, 0o600).close_fd()
        except (OSError, posix_ipc.Error) as e:
            raise cache_error(f"shared memory {name}", e) from e


class FileCounters:
    """The table of one front end for one mount."""

    def __init__(self, name: str) -> None:
        """Raises CacheError when there is none, or shared memory is full, ScarceError when it cannot be opened now."""
        try:
            self._shm = posix_ipc.SharedMemory(name)
        except (OSError, posix_ipc.Error) as e:
            raise cache_error(f"shared memory {name}", e) from e
        self._name = name
        self._full = False
        size = os.fstat(self._shm.fd).st_size
        try:
            self._map(max(size // 8 // WORDS, _FIRST_ROWS))
        except CacheError:
            self._shm.close_fd()
            raise
        words = self._words
        self._rows = {words[row * WORDS + INO]: row * WORDS for row in range(1, words[0] + 1)}

    def _map(self, rows: int) -> None:
        try:
            os.posix_fallocate(self._shm.fd, 0, rows * WORDS * 8)
            mapping = mmap.mmap(self._shm.fd, rows * WORDS * 8)
        except OSError as e:
            raise CacheError(f"shared memory {self._name}: {e.strerror}", e.errno) from e
        self._words = memoryview(mapping).cast("Q")
        self._room = rows - 1

    def _row(self, ino: int) -> int | None:
        """Where the row of a file begins; None when there is no room for one more."""
        at = self._rows.get(ino)
        if at is None and not self._full:
            number = len(self._rows) + 1
            if number > self._room:
                try:
                    self._map(self._room * 2)
                except CacheError:
                    self._full = True
                    return None
            at = number * WORDS
            self._words[at + INO] = ino
            self._rows[ino] = at
            self._words[0] = number
        return at

    def count(self, ino: int, operation: int, failed: bool) -> None:
        """An operation on a file is done."""
        at = self._row(ino)
        if at is not None:
            self._words[at + FOPS] += 1
            self._words[at + (ERRORS if failed else HITS) + operation] += 1

    def count_read(self, ino: int, size: int) -> None:
        """A read gave `size` bytes."""
        at = self._row(ino)
        if at is None:
            return
        words = self._words
        if not words[at + READS]:
            words[at + FIRST] = time.time_ns()
        words[at + READS] += 1
        words[at + FOPS] += 1
        words[at + HITS + READ] += 1
        words[at + BYTES] += size
        words[at + SIZES + size_class(size)] += 1

    def close(self) -> None:
        self._words.release()
        self._shm.close_fd()


def files(names: Iterable[str]) -> dict[str, Any]:
    """The API's counts by file, from the tables of all front ends."""
    found: dict[str, Any] = {}
    for ino, row in _sums(names).items():
        found[str(ino)] = {
            "total_fops": row[FOPS],
            "data_read": row[BYTES],
            "block_count_read": row[SIZES:HITS],
            "fop_hits": row[HITS:ERRORS],
            "fop_errors": row[ERRORS : ERRORS + OPS],
        }
    return found


def pattern(names: Iterable[str]) -> list[Any]:
    """The API's list of files that were read, the first one first."""
    read = [row for row in _sums(names).values() if row[READS]]
    return [
        {
            "ino": row[INO],
            "nr_read": row[READS],
            "first_access_time_secs": row[FIRST] // 1_000_000_000,
            "first_access_time_nanos": row[FIRST] % 1_000_000_000,
        }
        for row in sorted(read, key=lambda row: row[FIRST])
    ]


def latest(names: Iterable[str]) -> list[list[int]]:
    """The API's list of inodes that were read since the last call: [inode], or [first, last] of a run."""
    fresh: set[int] = set()
    for name in names:
        words = _open(name)
        if words is None:
            continue
        for at in range(WORDS, min((words[0] + 1) * WORDS, len(words) - WORDS + 1), WORDS):
            reads = words[at + READS]
            if reads != words[at + TOLD]:
                words[at + TOLD] = reads
                fresh.add(words[at + INO])
        words.release()
    runs: list[list[int]] = []
    for ino in sorted(fresh):
        if runs and runs[-1][-1] == ino - 1:
            runs[-1] = [runs[-1][0], ino]
        else:
            runs.append([ino])
    return runs


def _sums(names: Iterable[str]) -> dict[int, Row]:
    sums: dict[int, Row] = {}
    for name in names:
        words = _open(name)
        if words is None:
            continue
        for at in range(WORDS, min((words[0] + 1) * WORDS, len(words) - WORDS + 1), WORDS):
            row = list(words[at : at + WORDS])
            known = sums.get(row[INO])
            if known is None:
                sums[row[INO]] = row
                continue
            times = [t for t in (known[FIRST], row[FIRST]) if t]
            summed = [a + b for a, b in zip(known, row, strict=True)]
            summed[INO], summed[FIRST] = row[INO], min(times, default=0)
            sums[row[INO]] = summed
        words.release()
    return sums


def _open(name: str) -> memoryview | None:
    """The table's words; None when no front end has needed it yet."""
    try:
        shm = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError:
        return None
    try:
        return memoryview(mmap.mmap(shm.fd, 0)).cast("Q")
    except (OSError, ValueError, TypeError):  # it is being made
        return None
    finally:
        shm.close_fd()
