"""The trace of first reads: which files and chunks of an image were read, in the order in which that happened first.

One file an image in the run-time folder (tmpfs), `trace.<number>`. Front ends append to it (`Trace`), each
record or group of records with one write to an O_APPEND descriptor, so the order is the same for all of them without a
lock; `nydusctl trace` reads it. What is read again costs a front end one or two look-ups in a set, and no system call.

Bounded: file and set stop growing at a limit; no more is noted or kept. What holds after SIGKILL of a front end: its
records stay, its successor notes some reads once more, and the reader of the trace takes the first of each.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from nydusd.formats.model import Extent

RECORD: Final = struct.Struct("<QQIIIB3x")  # wall clock (ns), inode, blob index, first chunk, count, flags
MISSED: Final = 1
"""Flag: not all of these chunks were there when they were asked for."""
MAX_BYTES: Final = 2 << 20
"""Longest trace file: 65,536 records."""
_MAX_SEEN: Final = 65_536
"""Pairs of file and chunk that a front end remembers; some 5 MB, and more than most images have."""


class FirstRead(NamedTuple):
    """One record: at `when` (ns since 1970), `chunks` chunks of a blob from `chunk` on, for the file `ino`."""

    when: int
    ino: int
    blob: int
    chunk: int
    chunks: int
    flags: int


class Trace:
    """A front end's side of one image's trace."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: set[int] = set()
        self._full = False

    def note(self, ino: int, vec: Sequence[Extent], missed: bool) -> None:
        """A read of `vec` in file `ino`. Only the ends are looked up: a read is one run of the file."""
        if not vec:
            return
        file, first, last = ino << 32, vec[0][1], vec[-1][1]
        if file | first not in self._seen or (last != first and file | last not in self._seen):
            self._record(ino, vec, missed)

    def _record(self, ino: int, vec: Sequence[Extent], missed: bool) -> None:
        if self._full:
            return
        runs: list[list[int]] = []
        for blob, chunk, *_ in vec:
            self._seen.add(ino << 32 | chunk)
            if runs and runs[-1][0] == blob and runs[-1][1] + runs[-1][2] == chunk:
                runs[-1][2] += 1
            elif not runs or runs[-1][0] != blob or runs[-1][1] + runs[-1][2] - 1 != chunk:
                runs.append([blob, chunk, 1])
        now, flags = time.time_ns(), MISSED if missed else 0
        data = b"".join(RECORD.pack(now, ino & (1 << 64) - 1, *run, flags) for run in runs)
        try:
            # Opened anew each time: an image has few first reads, and a daemon may have hundreds of images.
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.write(fd, data)
                end = os.lseek(fd, 0, os.SEEK_CUR)
            finally:
                os.close(fd)
        except OSError:  # a full /run costs the trace, not the read; and there is none any more of what was unmounted
            end = MAX_BYTES
        if end >= MAX_BYTES or len(self._seen) >= _MAX_SEEN:
            self._full = True
            self._seen.clear()  # nothing is noted any more


def read_trace(path: str) -> list[FirstRead]:
    """What a trace file holds, oldest first, a cut-off end left out. Raises OSError."""
    with open(path, "rb") as f:
        data = f.read(2 * MAX_BYTES)
    return [FirstRead._make(fields) for fields in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size])]
