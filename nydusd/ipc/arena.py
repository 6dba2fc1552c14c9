"""The slot arena: a bounded piece of POSIX shared memory through which chunk data travels between processes.

The supervisor alone allocates (first fit, in pages) and keeps the leases; others get (offset, length) by message. A full
arena is back-pressure: jobs wait until a slot is free. A piece is backed by memory before it is given out, so it can't SIGBUS
later; what nobody uses any more is given back to the system by `trim`, and piece by piece where memory is short (/dev/shm may
be smaller than the arena: 64 MB in a container).
What holds after SIGKILL: a lease ends with the process that holds it, because only the supervisor's table counts.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os

import posix_ipc

from nydusd.errors import CacheError, ScarceError, cache_error

PAGE = 4096

_FULL = (errno.ENOSPC, errno.ENOMEM)
_OTHERS = 8 << 20
"""Bytes of /dev/shm (or an eighth of a small one) that are left to what else has to be there: the state of blobs to come."""


class Arena:
    """A mapped arena: `view` for everybody, `allocate` and `free` for the supervisor."""

    def __init__(self, name: str, mapping: mmap.mmap, fd: int = -1) -> None:
        self.name = name
        self._fd = fd
        self._backed = False  # whether there may be memory behind what is free
        self._map = mapping
        self._view = memoryview(mapping)
        self.size = len(mapping)
        self._free: list[tuple[int, int]] = [(0, self.size)]

    @classmethod
    def create(cls, name: str, size: int) -> Arena:
        """Raises CacheError when shared memory is full, ScarceError when no file descriptor is left.

        An object of this name is replaced, and stays with who has it.
        """
        size = -(-size // PAGE) * PAGE
        try:
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(name)
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, 0o600)
        except (OSError, posix_ipc.Error) as e:
            raise cache_error(f"shared memory {name}", e) from e
        try:
            os.ftruncate(shm.fd, size)
            return cls(name, mmap.mmap(shm.fd, size), shm.fd)
        except OSError as e:
            shm.close_fd()
            posix_ipc.unlink_shared_memory(name)
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise cache_error(f"shared memory {name}", e) from e
            raise CacheError(f"shared memory {name}: {size} bytes: {e.strerror}", e.errno) from e

    @classmethod
    def open(cls, name: str) -> Arena:
        """Map an arena that the supervisor has made. Raises CacheError, ScarceError."""
        try:
            shm = posix_ipc.SharedMemory(name)
        except (OSError, posix_ipc.Error) as e:
            raise cache_error(f"shared memory {name}", e) from e
        try:
            return cls(name, mmap.mmap(shm.fd, os.fstat(shm.fd).st_size))
        except OSError as e:
            raise cache_error(f"shared memory {name}", e) from e
        finally:
            shm.close_fd()

    def view(self, offset: int, length: int) -> memoryview:
        return self._view[offset : offset + length]

    def allocate(self, length: int, *, all_of_it: bool = True) -> int | None:
        """Offset of a free piece of `length` bytes, None if there is none now.

        It takes the last of the memory only if it may take `all_of_it`: who can wait leaves some for others.
        Raises ScarceError when there is no memory for it, though none is taken by what is free here; CacheError for all else.
        """
        need = -(-max(length, 1) // PAGE) * PAGE
        for i, (offset, size) in enumerate(self._free):
            if size >= need:
                self._back(offset, need, all_of_it)
                if size == need:
                    del self._free[i]
                else:
                    self._free[i] = (offset + need, size - need)
                return offset
        return None

    def _is_scant(self, length: int) -> bool:
        """Whether so much more memory would take of what is left to others."""
        system = os.fstatvfs(self._fd)
        left = min(_OTHERS, system.f_blocks * system.f_frsize // 8)  # 0 where there is no bound
        return left > 0 and system.f_bavail * system.f_frsize < length + left

    def _back(self, offset: int, length: int, all_of_it: bool) -> None:
        """Have memory behind a piece that is free; what other free pieces have is given back for it, if need be."""
        while True:
            try:
                if not all_of_it and self._is_scant(length):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.posix_fallocate(self._fd, offset, length)
                return
            except OSError as e:
                if e.errno in _FULL and self.give_back():
                    continue
                kind = ScarceError if e.errno in _FULL else CacheError
                raise kind(f"shared memory {self.name}: {length} bytes: {e.strerror}", e.errno) from e

    def free(self, offset: int, length: int) -> None:
        """Give back what `allocate` gave, with the same length."""
        self._backed = True
        size = -(-max(length, 1) // PAGE) * PAGE
        pieces = sorted([*self._free, (offset, size)])
        merged = pieces[:1]
        for start, length in pieces[1:]:
            last, last_size = merged[-1]
            if last + last_size == start:
                merged[-1] = (last, last_size + length)
            else:
                merged.append((start, length))
        self._free = merged

    def trim(self) -> None:
        """Give all memory back to the system if no piece is given out."""
        if self.free_bytes() == self.size:
            self.give_back()

    def give_back(self) -> bool:
        """Give the memory behind what is free back to the system. False if there is none."""
        backed, self._backed = self._backed, False
        for offset, size in self._free if backed else ():
            self._map.madvise(mmap.MADV_REMOVE, offset, size)
        return backed

    def free_bytes(self) -> int:
        return sum(size for _, size in self._free)

    def close(self) -> None:
        self._view.release()
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
