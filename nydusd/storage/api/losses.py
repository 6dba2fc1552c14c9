"""Losses: whether what was just read of a cache file is what was written to it. Asked only where that is not certain.

Runs in front ends that read cache files themselves. When a disk does not take what the page cache has, the kernel drops it at
some time, and the next reader gets zeros or what was there before; the chunk is *ready* until a worker has the file synced and
doubts it. So who has read a chunk of which it is not certain that the disk has it (`Segment.dirty`) asks the kernel afterwards
(`storage/state/lost.py`). The kernel notes the failure before it may drop the page: an answer of no is true of what was read.

The kernel tells a failure to a file that is opened after it only if nobody was told yet. Who was told has said so: a front end
by `lost`, in all segments of the file, a worker by `syncing`, which was set before it asked. So one who opens the file while
`lost` is set believes nothing before all was doubted, and while `syncing` is set he waits for the end of that, or gets
the chunk past the file.

What holds after SIGKILL between the kernel's answer and `lost`: a worker hears of it that has the file open from before.
"""

from __future__ import annotations

import time

from nydusd.errors import EvictedError, SyncingError, UnreadableError
from nydusd.storage.state.doubts import after, is_over, tell_lost
from nydusd.storage.state.lost import has_lost_writes
from nydusd.storage.state.segment import DOUBTS, Segment

_PATIENCE = 10.0
"""Seconds to wait for the end of a sync that had begun when the file was opened."""


class Losses:
    """What one open cache file, `fd`, has been told of. It was opened before this is made."""

    def __init__(self, blob_id: str, fd: int, segment: Segment) -> None:
        self._blob_id = blob_id
        self._fd = fd
        self._segment = segment
        self._until = 0
        """How often all must have been doubted before anything of it is believed again."""
        self._since = 0.0
        """Since when we wait for the end of a sync; 0: we do not."""
        self._sync = segment.syncs[0]
        """Which one that is."""
        self._look()
        if segment.syncing[0]:
            self._since = time.monotonic()

    @property
    def is_calm(self) -> bool:
        """Whether `check` is to be called only when the segment's marks say so."""
        return not self._since

    def check(self, calm: int) -> None:
        """To be called after a read of what was ready. `calm`: `doubts` as in `Segment.marks`, from before it was looked at.

        Raises UnreadableError if what was read may be lost, EvictedError if it was doubted meanwhile, SyncingError if that
        will be known in a moment: then it is to be read again.
        """
        segment = self._segment
        if has_lost_writes(self._fd):
            tell_lost(self._segment)
        self._look()
        if self._is_suspect():
            raise UnreadableError(f"blob {self._blob_id}: its disk did not take all that was written")
        if self._since:
            if not segment.syncing[0] or segment.syncs[0] != self._sync:  # of the next one we are told
                self._since = 0.0
            elif time.monotonic() > self._since + _PATIENCE:
                raise UnreadableError(f"blob {self._blob_id}: what is in its cache file is not on the disk yet")
            else:
                raise SyncingError(f"blob {self._blob_id}: its cache file is being synced")
        if segment.marks[0] & DOUBTS != calm:  # last of all
            raise EvictedError(f"blob {self._blob_id}: chunks were doubted while they were read")

    def _look(self) -> None:
        doubts = self._segment.doubts[0]  # before `lost`: who doubts takes that away first
        if self._segment.lost[0]:
            self._until = after(doubts)

    def _is_suspect(self) -> bool:
        if self._until and is_over(self._segment.doubts[0], self._until):
            self._until = 0
        return bool(self._until)
