"""Numbers in POSIX shared memory that one process writes and others read: eight bytes each, aligned, so never half-written.

After SIGKILL of the writer the last ones stay, for its readers and for a successor that makes them anew or takes them over.
"""

from __future__ import annotations

import mmap

from nydusd.ipc.shared_block import make_block, map_block


def make_number(name: str) -> memoryview:
    """New numbers, all 0, under this name; writable as `view[0]`, `view[1]`. Raises CacheError when shared memory is full."""
    return memoryview(make_block(name, mmap.PAGESIZE)).cast("Q")


def map_number(name: str, *, to_write: bool = False) -> memoryview:
    """The numbers that another process has made, to be read as `view[0]`. Raises CacheError when there are none."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE if to_write else mmap.PROT_READ
    return memoryview(map_block(name, mmap.PAGESIZE, prot)).cast("Q")
