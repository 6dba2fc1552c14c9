"""One number in POSIX shared memory that one process writes and others read: eight bytes, aligned, so never half-written.

After SIGKILL of the writer the last number stays, for its readers and for a successor that makes it anew.
"""

from __future__ import annotations

import contextlib
import mmap
import os

import posix_ipc

from nydusd.errors import CacheError


def make_number(name: str) -> memoryview:
    """A new number, 0, under this name; writable as `view[0]`. Raises CacheError when shared memory is full."""
    try:
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, 0o600)
        try:
            os.posix_fallocate(shm.fd, 0, mmap.PAGESIZE)
            return memoryview(mmap.mmap(shm.fd, mmap.PAGESIZE)).cast("Q")
        finally:
            shm.close_fd()
    except (OSError, posix_ipc.Error) as e:
        raise CacheError(f"shared memory {name}: {e}") from e


def map_number(name: str) -> memoryview:
    """The number that another process has made, to be read as `view[0]`. Raises CacheError when there is none."""
    try:
        shm = posix_ipc.SharedMemory(name)
        try:
            return memoryview(mmap.mmap(shm.fd, mmap.PAGESIZE, prot=mmap.PROT_READ)).cast("Q")
        finally:
            shm.close_fd()
    except (OSError, ValueError, posix_ipc.Error) as e:
        raise CacheError(f"shared memory {name}: {e}") from e
