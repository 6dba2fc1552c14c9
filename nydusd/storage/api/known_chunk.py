"""KnownChunk: a chunk of a file that was read before, so that to read it again takes no look at metadata and chunk records.

Runs in a front-end process. What was checked of the chunk holds as long as the blob's segment is the same object; whether
its bytes are there is asked at each read, as `BlobDevice.missing` and `read_into` do. Whatever is out of the ordinary is left
to these: the read is then as if nothing were known.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nydusd.errors import CacheError
from nydusd.formats.model import Extent
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import READY, RETIRED

if TYPE_CHECKING:
    from nydusd.storage.api.device import BlobView


class KnownChunk:
    """All bytes of one chunk of a file, in the same order in the blob's cache file."""

    __slots__ = (
        "_chunk",
        "_counters",
        "_epoch",
        "_hints",
        "_segment",
        "_state",
        "_touched",
        "_uoff",
        "_view",
        "ino",
        "length",
    )

    def __init__(self, view: BlobView, ino: int, extent: Extent, hints: list[ChunkRun]) -> None:
        """`view` is open, and its record of the chunk was compared with `extent`, which covers the chunk.

        `ino` is the file. A hint for the supervisor is appended to `hints`.
        """
        self.ino = ino
        self._hints = hints
        self._view = view
        self._segment = view.segment
        self._state = view.state
        self._touched = view.touched
        self._epoch = view.epoch
        self._counters = view.counters
        self._chunk = extent.chunk
        self._uoff = extent.uoff
        self.length = extent.length

    def read(self, offset: int, size: int, target: Sequence[memoryview]) -> bool:
        """Read `size` bytes at `offset` of the chunk into `target`, which has just that room. False: nothing was done."""
        view, chunk, uoff = self._view, self._chunk, self._uoff
        if view.segment is not self._segment:
            return False
        before = self._epoch[0]
        if before == RETIRED or self._state[chunk] != READY:
            return False
        try:
            got = os.preadv(view.fd, target, uoff + offset)
        except OSError:
            return False
        if got != size or self._epoch[0] != before:
            return False
        marks = view.marks  # `view.calm` is from an earlier look: from before the state byte was loaded
        if marks[1] or marks[0] != view.calm:
            try:
                view.check()
            except CacheError:
                return False
        self._touched[chunk] = view.clock[0]
        counters = self._counters
        counters[0] += 1
        counters[1] += size
        if uoff != view.place and view.lacks(uoff):
            self._hints.append(ChunkRun(view.handle, chunk, 1))
        return True
