"""A named block of POSIX shared memory: made by one process, mapped by others. What is in it is its users' business.

After SIGKILL of the maker the block stays under its name, for its readers, until it is made anew or removed.
"""

from __future__ import annotations

import contextlib
import mmap
import os

import posix_ipc

from nydusd.errors import cache_error


def make_block(name: str, size: int) -> mmap.mmap:
    """A new block of `size` bytes, all zero, in place of an older one; mapped.

    Raises CacheError when there is no room, ScarceError when no file descriptor or memory is left.
    """
    try:
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(name)
        shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, 0o600)
        try:
            os.posix_fallocate(shm.fd, 0, size)
            return mmap.mmap(shm.fd, size)
        finally:
            shm.close_fd()
    except (OSError, posix_ipc.Error) as e:
        raise cache_error(f"shared memory {name}", e) from e


def map_block(name: str, size: int = 0, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """What another process has made: `size` bytes of it, 0 for all.

    Raises CacheError when there is no such block, ScarceError when it cannot be mapped now.
    """
    try:
        shm = posix_ipc.SharedMemory(name)
        try:
            return mmap.mmap(shm.fd, size, prot=prot)
        finally:
            shm.close_fd()
    except (OSError, ValueError, posix_ipc.Error) as e:
        raise cache_error(f"shared memory {name}", e) from e
