"""What the fetch workers of a daemon know in common: a small table in a memfd, under locks that end with their process.

The memfd is inherited from the supervisor and is never on disk. A worker that is killed leaves its locks to the others;
a table that it half wrote is noticed by length and checksum and is then empty: tokens are asked for again, nothing else.
Times are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Final, TypeVar
from zlib import crc32

import msgspec

Entry = dict[str, str | int | float | None]
T = TypeVar("T")

_HEADER: Final = struct.Struct("<II")
"""Length and CRC-32 of the table that follows."""
_FLOCK: Final = struct.Struct("hhqqi4x")
_MAX_ENTRIES: Final = 1024
_MAX_BYTES: Final = 1 << 20
_KEY_LOCKS: Final = (1 << 40, 1 << 24)
"""Where the locks of keys are (first byte, number of bytes): far behind the table; two keys may share one by chance."""
KEEP: Final = -1.0
"""As the lifetime of an entry that is changed: it ends when it would have ended."""
_BUSY_LIMIT: Final = 2.0
"""Seconds to wait for the lock of the table. It is held for microseconds; a holder that is stopped must not stop all."""


class _Slot(msgspec.Struct, array_like=True):
    expires: float | None
    value: Entry


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, _Slot]).decode


class SharedStore:
    """A table of small entries by key. `fd` is the memfd that all share, -1 makes one for this process alone.

    Entries whose time is over are not given. The table is bounded: the entries that end first go first, those without an
    end last. Such keys must come from the configuration, not from what a server says.
    """

    def __init__(self, fd: int = -1) -> None:
        made = os.memfd_create("nydusd-backend", os.MFD_CLOEXEC) if fd < 0 else -1
        # Locks belong to the open file: an inherited descriptor is the same one in all processes, so open it anew.
        self._fd = os.open(f"/proc/self/fd/{made if fd < 0 else fd}", os.O_RDWR | os.O_CLOEXEC)
        if made >= 0:
            os.close(made)
        # A backend whose configuration is wrong is never finished, and nobody closes its store.
        self._finish = weakref.finalize(self, os.close, self._fd)
        self._seen = b""
        self._table: dict[str, _Slot] = {}

    def fileno(self) -> int:
        """The descriptor of the table, for another store of the same one."""
        return self._fd

    def close(self) -> None:
        """Give the descriptors back. The store is of no use afterwards."""
        self._finish()

    def get(self, key: str) -> Entry | None:
        """The entry of a key, None if there is none or its time is over."""
        with self._locked():
            return self._value(self._load(), key)

    def put(self, key: str, value: Entry, lifetime: float | None = None) -> None:
        """Set an entry, for `lifetime` seconds."""
        self.update(key, lambda _: (value, lifetime, None))

    def drop(self, key: str) -> None:
        """Remove an entry."""
        self.update(key, lambda _: (None, None, None))

    def update(self, key: str, change: Callable[[Entry | None], tuple[Entry | None, float | None, T]]) -> T:
        """Change an entry in one step that no other process sees half of.

        `change` is given the entry and gives the new one (None removes it), its life in seconds (None: no end, `KEEP`)
        and what this call is to return. It must be quick and do no I/O.
        """
        with self._locked():
            table = self._load()
            value, lifetime, result = change(self._value(table, key))
            if value is not None:
                old = table.get(key)
                if lifetime == KEEP:
                    expires = old.expires if old is not None else None
                else:
                    expires = None if lifetime is None else time.monotonic() + lifetime
                if old is not None and old.expires == expires and old.value == value:
                    return result
                table[key] = _Slot(expires, value)
            elif table.pop(key, None) is None:
                return result
            self._save(table)
            return result

    @contextlib.contextmanager
    def lock(self, key: str, deadline: float) -> Iterator[bool]:
        """Hold the lock of a key, so that one process does what all need. False if `deadline` came first.

        Locks are not nested: a process may hold one at a time.
        """
        first, count = _KEY_LOCKS
        start = first + crc32(key.encode()) % count
        got = self._take(start, 1, deadline, 0.01)
        try:
            yield got
        finally:
            if got:
                self._lock(fcntl.F_UNLCK, start, 1)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Without the lock (its holder is stopped) an update may be lost, and the checksum notices a torn table.
        got = self._take(0, _KEY_LOCKS[0], time.monotonic() + _BUSY_LIMIT, 0.0005)
        try:
            yield
        finally:
            if got:
                self._lock(fcntl.F_UNLCK, 0, _KEY_LOCKS[0])

    def _take(self, start: int, length: int, deadline: float, pause: float) -> bool:
        while not self._lock(fcntl.F_WRLCK, start, length):
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
        return True

    def _lock(self, kind: int, start: int, length: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                return False
            raise
        return True

    @staticmethod
    def _value(table: dict[str, _Slot], key: str) -> Entry | None:
        slot = table.get(key)
        if slot is None or (slot.expires is not None and slot.expires <= time.monotonic()):
            return None
        return dict(slot.value)

    def _load(self) -> dict[str, _Slot]:
        header = os.pread(self._fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            return {}
        length, checksum = _HEADER.unpack(header)
        if length > _MAX_BYTES:
            return {}
        data = os.pread(self._fd, length, _HEADER.size)
        if len(data) != length or crc32(data) != checksum:
            return {}
        if data != self._seen:
            try:
                self._table = _decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return {}
            self._seen = data
        return dict(self._table)

    def _save(self, table: dict[str, _Slot]) -> None:
        now = time.monotonic()
        table = {key: slot for key, slot in table.items() if slot.expires is None or slot.expires > now}
        data = _encode(table)
        if len(table) > _MAX_ENTRIES or len(data) > _MAX_BYTES:
            by_end = sorted(table.items(), key=lambda item: item[1].expires or float("inf"), reverse=True)
            table = dict(by_end[: min(len(table), _MAX_ENTRIES) // 2])
            data = _encode(table)
        if len(data) > _MAX_BYTES:
            table, data = {}, _encode({})
        os.pwrite(self._fd, _HEADER.pack(len(data), crc32(data)) + data, 0)
        self._seen, self._table = data, table
