"""What a front end counts of a mount: operations and reads, and each file's if that is asked for. Runs in a front-end process.

Counting is a part of every hit, so it is additions to a list; `flush` copies them to where others read them.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Mapping
from typing import Any

from nydusd.errors import CacheError, ScarceError
from nydusd.ipc.file_counters import FileCounters
from nydusd.ipc.mount_counters import (
    BYTES,
    ERRORS,
    HITS,
    LATENCIES,
    LATENCY_LIMITS,
    MICROSECONDS,
    OPERATIONS,
    READ,
    SIZES,
    MountCounters,
    latency_class,
    size_class,
)

from . import protocol as p

log = logging.getLogger(__name__)

_OPCODES = {
    p.GETATTR: "getattr",
    p.READLINK: "readlink",
    p.OPEN: "open",
    p.READ: "read",
    p.STATFS: "statfs",
    p.GETXATTR: "getxattr",
    p.LISTXATTR: "listxattr",
    p.OPENDIR: "opendir",
    p.LOOKUP: "lookup",
    p.READDIR: "readdir",
    p.READDIRPLUS: "readdirplus",
    p.ACCESS: "access",
}
_FLUSH_NS = 50_000_000
_READS = HITS + READ
_LARGE = 1 << 20
_SIZE_OF = [SIZES + size_class(1 << bits >> 1) for bits in range(_LARGE.bit_length())]
"""By the bits of a read's size: its place in the lists."""
_LARGEST = SIZES + size_class(_LARGE)
_FAST = LATENCY_LIMITS[0]
OPERATION = [OPERATIONS.index(_OPCODES[code]) if code in _OPCODES else -1 for code in range(p.OPCODES)]
"""By opcode: its place in the lists, -1 if it is not counted."""


class Stats:
    """The counts of one mount by this front end; `files` those of its files, or None."""

    def __init__(self, counters: MountCounters, files: FileCounters | None) -> None:
        self._counters = counters
        self._values = counters.values
        self.flush = counters.flush
        self.files = files

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], row: int) -> Stats | None:
        """From the spec of a mount: `counters` (name of the block, or absent), `files` (name of the tables, or None).

        Raises ScarceError when they cannot be mapped now.
        """
        if spec.get("counters") is None:
            return None
        files = spec.get("files")
        try:
            counters = MountCounters(str(spec["counters"]), row)
            return cls(counters, None if files is None else FileCounters(f"{files}.{row}"))
        except ScarceError:
            raise
        except CacheError as e:
            log.error("mount %s: nothing is counted: %s", spec.get("id"), e)
            return None

    def count(self, operation: int, ino: int, failed: bool) -> None:
        """An operation other than READ is done."""
        self._values[(ERRORS if failed else HITS) + operation] += 1
        if self.files is not None:
            self.files.count(ino, operation, failed)

    def count_read(self, ino: int, size: int, microseconds: int) -> None:
        """A read gave `size` bytes."""
        values = self._values
        values[_READS] += 1
        values[BYTES] += size
        values[_SIZE_OF[size.bit_length()] if size < _LARGE else _LARGEST] += 1
        values[LATENCIES if microseconds <= _FAST else LATENCIES + latency_class(microseconds)] += 1
        values[MICROSECONDS] += microseconds
        if self.files is not None:
            self.files.count_read(ino, size)

    def close(self) -> None:
        self.flush()
        self._counters.close()
        if self.files is not None:
            self.files.close()


class Tally:
    """Counts for whichever mount is asked, and makes them known: before a sleep, before another mount's, after 50 ms."""

    def __init__(self) -> None:
        self._counted: Stats | None = None
        self._flush_at = 0

    def count(self, stats: Stats, operation: int, ino: int, failed: bool) -> None:
        """An operation that is not a read is done, or a read has failed."""
        stats.count(operation, ino, failed)
        self._note(stats, time.monotonic_ns())

    def count_read(self, stats: Stats, ino: int, size: int, started: int) -> None:
        """A read that began at `started` (monotonic ns) gave `size` bytes."""
        now = time.monotonic_ns()
        stats.count_read(ino, size, (now - started) // 1000)
        if stats is not self._counted or now > self._flush_at:
            self._note(stats, now)

    def _note(self, stats: Stats, now: int) -> None:
        if stats is not self._counted or now > self._flush_at:
            self.flush()
            self._counted = stats
            self._flush_at = now + _FLUSH_NS

    def flush(self) -> None:
        """Make known what was counted since the last time."""
        if self._counted is not None:
            self._counted.flush()
            self._counted = None


def is_failure(result: object) -> bool:
    """Whether a handler's result is an error. ENOSYS only tells the kernel that it need not ask."""
    return type(result) is int and result != errno.ENOSYS
