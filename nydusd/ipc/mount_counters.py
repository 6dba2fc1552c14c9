"""What front ends count of each mount: one block of POSIX shared memory a mount, in it one row a front end.

A front end alone writes its row, so no count needs a lock; it counts in its own memory and copies the row when it is about
to sleep, at the latest every 50 ms. The supervisor makes a block with the mount and removes it with the umount; whoever
tells of counts reads all rows. After SIGKILL of a front end its row stays, less the last 50 ms, and its successor goes on
counting.
"""

from __future__ import annotations

import mmap
from struct import Struct
from typing import Final, NamedTuple

from nydusd.errors import CacheError
from nydusd.ipc.shared_block import make_block, map_block

OPERATIONS: Final = (
    "getattr",
    "readlink",
    "open",
    "release",
    "read",
    "statfs",
    "getxattr",
    "listxattr",
    "opendir",
    "lookup",
    "readdir",
    "readdirplus",
    "access",
    "forget",
    "batchforget",
)
"""The operations that are told apart, in the order of the API's lists."""
OPS: Final = len(OPERATIONS)
READ: Final = OPERATIONS.index("read")
HITS, ERRORS = 0, OPS
SIZES = ERRORS + OPS
LATENCIES = SIZES + 8
BYTES = LATENCIES + 8
MICROSECONDS = BYTES + 1
FIELDS: Final = MICROSECONDS + 1
ROW: Final = 512
"""Bytes from row to row."""
_ROW = Struct(f"<{FIELDS}Q")
assert _ROW.size <= ROW

_CLASS_OF_SIZE: Final = (0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7)
LATENCY_LIMITS: Final = (200, 1_000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000)
"""Microseconds of the classes of a read's latency; the last class is above them all."""


def size_class(size: int) -> int:
    """Of 8: below 1 KiB, and from 1, 4, 16, 64, 128, 512 KiB and 1 MiB on."""
    bits = (size >> 10).bit_length()
    return _CLASS_OF_SIZE[bits] if bits < 12 else 7


def latency_class(microseconds: int) -> int:
    """Of 8, by `LATENCY_LIMITS`."""
    if microseconds <= 200:
        return 0
    return next((i for i, limit in enumerate(LATENCY_LIMITS) if microseconds <= limit), 7)


class Totals(NamedTuple):
    """The counts of a mount, all front ends together."""

    hits: list[int]
    errors: list[int]
    sizes: list[int]
    latencies: list[int]
    read_bytes: int
    read_microseconds: int


class MountCounters:
    """The row of one front end: `values` is to be added to, `flush` makes it known."""

    def __init__(self, name: str, row: int) -> None:
        """Raises CacheError when the block is not there, or has no such row."""
        self._map = map_block(name)
        self._at = row * ROW
        if self._at + ROW > len(self._map):
            raise CacheError(f"shared memory {name} has no row {row}")
        self.values = list(_ROW.unpack_from(self._map, self._at))

    def flush(self) -> None:
        _ROW.pack_into(self._map, self._at, *self.values)

    def close(self) -> None:
        self._map.close()


def make_counters(name: str, rows: int) -> mmap.mmap:
    """A new block, all zero, mapped. Raises CacheError when shared memory is full."""
    return make_block(name, rows * ROW)


def totals(block: mmap.mmap) -> Totals:
    """The sums over all rows."""
    rows = [_ROW.unpack_from(block, at) for at in range(0, len(block) - ROW + 1, ROW)]
    sums = [sum(column) for column in zip(*rows, strict=True)]
    return Totals(
        sums[HITS:ERRORS],
        sums[ERRORS:SIZES],
        sums[SIZES:LATENCIES],
        sums[LATENCIES:BYTES],
        sums[BYTES],
        sums[MICROSECONDS],
    )
