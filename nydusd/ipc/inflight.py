"""Reads that wait for data, of all front ends: a board in POSIX shared memory on which each front end writes its own row.

Written when a read is parked and when it ends, never for a hit. The supervisor makes the board at its start. After SIGKILL of
a front end its entries stay until its successor clears the row: the kernel has not had an answer to them, so they are true.
"""

from __future__ import annotations

import mmap
import time
from struct import Struct
from typing import Any, Final

from nydusd.errors import CacheError
from nydusd.ipc.shared_block import make_block, map_block

SLOTS: Final = 128
"""Reads of one front end that are shown at once; more wait unseen."""
_SLOT = Struct("<QQQQ")
"""unique (0: the slot is free), inode, opcode, seconds since 1970."""
ROW: Final = SLOTS * _SLOT.size


class InflightRow:
    """The row of one front end, cleared."""

    def __init__(self, name: str, row: int) -> None:
        """Raises CacheError when there is no such row."""
        self._map = map_block(name)
        self._at = row * ROW
        if self._at + ROW > len(self._map):
            raise CacheError(f"shared memory {name} has no row {row}")
        self._map[self._at : self._at + ROW] = bytes(ROW)
        self._free = list(range(SLOTS))

    def begin(self, unique: int, ino: int, opcode: int) -> int:
        """A request begins to wait; gives its slot, -1 if it is one too many."""
        if not self._free:
            return -1
        slot = self._free.pop()
        _SLOT.pack_into(self._map, self._at + slot * _SLOT.size, unique, ino, opcode, int(time.time()))
        return slot

    def end(self, slot: int) -> None:
        """The request in this slot waits no more."""
        if slot >= 0:
            _SLOT.pack_into(self._map, self._at + slot * _SLOT.size, 0, 0, 0, 0)
            self._free.append(slot)


def make_board(name: str, rows: int) -> mmap.mmap:
    """A new board, empty, mapped. Raises CacheError when shared memory is full."""
    return make_block(name, max(rows, 1) * ROW)


def waiting(board: mmap.mmap) -> list[dict[str, Any]]:
    """The API's list of requests that are not answered yet, the oldest first."""
    slots = [entry for entry in _SLOT.iter_unpack(board[:]) if entry[0]]
    return [
        {"inode": ino, "opcode": opcode, "unique": unique, "timestamp_secs": since}
        for unique, ino, opcode, since in sorted(slots, key=lambda entry: entry[3])
    ]
