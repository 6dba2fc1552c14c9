"""One number in POSIX shared memory that one process writes and others read: eight bytes, aligned, so never half-written.

After SIGKILL of the writer the last number stays, for its readers and for a successor that makes it anew.
"""

from __future__ import annotations

import mmap

from nydusd.ipc.shared_block import make_block, map_block


def make_number(name: str) -> memoryview:
    """A new number, 0, under this name; writable as `view[0]`. Raises CacheError when shared memory is full."""
    return memoryview(make_block(name, mmap.PAGESIZE)).cast("Q")


def map_number(name: str) -> memoryview:
    """The number that another process has made, to be read as `view[0]`. Raises CacheError when there is none."""
    return memoryview(map_block(name, mmap.PAGESIZE, mmap.PROT_READ)).cast("Q")
