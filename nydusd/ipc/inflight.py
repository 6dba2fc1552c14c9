"""Reads that wait for data, of all front ends: a board in POSIX shared memory on which each front end writes its own row.

Written when a read is parked and when it ends, never for a hit. The supervisor makes the board at its start; over fscache it is
the front end. After SIGKILL of a front end its entries stay until its successor clears the row: nobody has had an answer to
them, so they are true. What the successor parks again has waited since its predecessor parked it.
"""

from __future__ import annotations

import logging
import mmap
import time
from struct import Struct
from typing import Any, Final

from nydusd.errors import CacheError
from nydusd.ipc.shared_block import make_block, map_block

log = logging.getLogger(__name__)

SLOTS: Final = 128
"""Reads of one front end that are shown at once; more wait unseen."""
_SLOT = Struct("<QQQQ")
"""unique, inode, opcode, seconds since 1970 (0: the slot is free)."""
ROW: Final = SLOTS * _SLOT.size
_READ: Final = 15
"""The opcode of a read in the kernel's FUSE protocol. Nothing else waits."""
_TAKEN_UP: Final = 30.0
"""Seconds in which a front end parks again what its predecessor had parked."""


class InflightRow:
    """The row of one front end, cleared."""

    def __init__(self, name: str, row: int) -> None:
        """Raises CacheError when there is no such row."""
        self._map = map_block(name)
        self._at = row * ROW
        if self._at + ROW > len(self._map):
            self._map.close()
            raise CacheError(f"shared memory {name} has no row {row}")
        entries = _SLOT.iter_unpack(self._map[self._at : self._at + ROW])
        self._former = {(unique, ino): since for unique, ino, _, since in entries if since}
        self._until = time.monotonic() + _TAKEN_UP
        self._map[self._at : self._at + ROW] = bytes(ROW)
        self._free = list(range(SLOTS))

    def begin(self, unique: int, ino: int) -> int:
        """A read begins to wait; gives its slot, -1 if it is one too many. `unique` names it among those of this row."""
        if not self._free:
            return -1
        slot = self._free.pop()
        since = int(time.time())
        if self._former:
            if time.monotonic() > self._until:  # a read of the same name is another one by now
                self._former.clear()
            since = self._former.pop((unique, ino), since)
        _SLOT.pack_into(self._map, self._at + slot * _SLOT.size, unique, ino, _READ, since)
        return slot

    def end(self, slot: int) -> None:
        """The read in this slot waits no more."""
        if slot >= 0:
            _SLOT.pack_into(self._map, self._at + slot * _SLOT.size, 0, 0, 0, 0)
            self._free.append(slot)

    def close(self) -> None:
        """Let go of the board; what is shown stays."""
        self._map.close()


def open_row(name: str | None, row: int) -> InflightRow | None:
    """The row of one front end, cleared; without one its reads are served all the same, unseen."""
    if name is None:
        return None
    try:
        return InflightRow(name, row)
    except CacheError as e:
        log.error("reads that wait are not shown: %s", e)
        return None


def make_board(name: str, rows: int) -> mmap.mmap:
    """A new board, empty, mapped. Raises CacheError when shared memory is full."""
    return make_block(name, max(rows, 1) * ROW)


def waiting(board: mmap.mmap) -> list[dict[str, Any]]:
    """The API's list of requests that are not answered yet, the oldest first."""
    slots = [entry for entry in _SLOT.iter_unpack(board[:]) if entry[3]]
    return [
        {"inode": ino, "opcode": opcode, "unique": unique, "timestamp_secs": since}
        for unique, ino, opcode, since in sorted(slots, key=lambda entry: entry[3])
    ]
