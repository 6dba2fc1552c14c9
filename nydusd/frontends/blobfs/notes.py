"""Read-around, the front end's part: where a small read comes to a blob whose surroundings are all cached, that is noted.

EROFS reads the files of blobfs through their page cache. What is in there costs none of our processes a thing, and what is not
costs a READ, of 4 KiB where a program reads at random. Who answers such a READ notes its window, the aligned piece of the blob
around it, in a pipe, and `nydusd: around` has the kernel read it (`around.py`); all windows of a region as soon as two of them
were wanted. Only what is all there is noted: nothing is fetched from a backend for this. A pipe that is full, or that nobody
reads, takes no note; nobody waits.

What holds after SIGKILL: nothing is lost but speed. A successor opens the pipe by its name.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence

from nydusd.errors import CacheError
from nydusd.storage.api.device import Pieces
from nydusd.storage.api.io import BlobIoVec, ChunkRun
from nydusd.storage.state.range_map import RangeMap
from nydusd.storage.state.segment import READY

from .around import NOTE, WINDOW
from .device import RangeDevice

REGION = 1 << 20
"""Bytes that are read where reads come to several windows."""
_NEAR = 4.0
"""Seconds in which these come."""
_SMALL = 32 << 10
"""Bytes of a read at most that is taken for none of a sequential reader's, for whom the kernel reads ahead."""
_AT_ONCE = 2 << 20
"""Bytes that may be noted and not read yet: some 2 ms of a front end."""
_LEAK = 64 << 20
"""Bytes a second."""
_PAUSE, _PAUSE_MOST = 0.25, 16.0
"""Seconds for which a window is not noted again."""
_FORGIVEN = 4
"""A window that was left alone for so many pauses begins with the first one again."""
_WINDOWS = 16384
"""Windows of which it is known when they were noted: 2 GiB."""
_NEVER = -math.inf, 0.0
_NEXT_TRY = 0.5
"""Seconds until it is looked again whether anybody reads the pipe, or there is room in it."""


class Notes:
    """The pipe at `path`, for those who note."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._next_try = 0.0

    def are_taken(self, now: float) -> bool:
        """Whether somebody reads the pipe, as far as is known; it is looked again after a while (`now`: seconds)."""
        if now < self._next_try:
            return False
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:  # nobody reads it, or no file descriptor is left
                self._next_try = now + _NEXT_TRY
        return self._fd >= 0

    def write(self, blob: int, offset: int, size: int, now: float) -> bool:
        """Note what is to be read. False: nobody takes it."""
        if not self.are_taken(now):
            return False
        try:
            os.write(self._fd, NOTE.pack(blob, offset, size, int(now * 1e9)))
        except OSError as e:
            self._next_try = now + _NEXT_TRY
            if not isinstance(e, BlockingIOError):  # else it is full
                self.close()
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Pauses:
    """When which windows were noted. One that is wanted again and again is one that the kernel has no memory to keep.

    Its pause doubles each time, so that little is read in vain.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[float, float]] = {}

    def is_over(self, blob: int, offset: int, now: float) -> bool:
        """Whether a window may be noted now (in seconds)."""
        noted, pause = self._known.get((blob, offset), _NEVER)
        return now - noted >= pause

    def seconds(self, blob: int, offset: int, now: float) -> float:
        """Since a window was noted."""
        return now - self._known.get((blob, offset), _NEVER)[0]

    def begin(self, blob: int, offset: int, now: float) -> None:
        """It is noted now."""
        noted, pause = self._known.get((blob, offset), _NEVER)
        if len(self._known) >= _WINDOWS:
            self._known.clear()
        again = now - noted < pause * _FORGIVEN
        self._known[blob, offset] = now, min(pause * 2, _PAUSE_MOST) if again else _PAUSE


class Budget:
    """How much may be noted and not read yet: the kernel hands out READs in their order, and readers are not to wait for long.

    A large READ is taken for one that was noted. What never comes, or to another front end, is forgotten at `_LEAK`.
    """

    def __init__(self) -> None:
        self._noted = 0.0
        self._since = 0.0

    def allows(self, now: float) -> bool:
        """Whether more may be noted now (in seconds)."""
        self._noted = max(0.0, self._noted - (now - self._since) * _LEAK)
        self._since = now
        return self._noted < _AT_ONCE

    def add(self, size: int) -> None:
        """So many bytes are noted."""
        self._noted += size

    def read(self, size: int) -> None:
        """So many were read."""
        self._noted -= size


class NotingDevice(RangeDevice):
    """A `RangeDevice` that notes where small reads are."""

    notes: Notes
    _pauses: Pauses
    _budget: Budget

    @classmethod
    def noting(cls, blobs: Sequence[Mapping[str, object]], row: int, notes: Notes) -> NotingDevice:
        """As `from_spec`."""
        device = cls.from_spec(blobs, row)
        assert isinstance(device, NotingDevice)
        device.notes, device._pauses, device._budget = notes, Pauses(), Budget()
        return device

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]:
        """As of any device. What is read around others is not taken for a sequential reader, for whom more is fetched."""
        length = sum(extent.length for extent in vec)  # 0 behind the end of the blob
        if length <= _SMALL or (vec[0].uoff + vec[0].offset) % WINDOW + length > WINDOW:
            return super().missing(vec, again)
        view = self._views[vec[0].blob]
        known = view.place, view.looked
        hints = len(self.hints)
        try:
            return super().missing(vec, again)
        finally:
            view.place, view.looked = known
            del self.hints[hints:]

    def read_into(self, vec: BlobIoVec, buf: memoryview, pieces: Pieces | None = None) -> int:
        got = super().read_into(vec, buf, pieces)
        if got > _SMALL:
            self._budget.read(got)
        elif got and pieces is None:
            blob, start = vec[0].blob, vec[0].uoff + vec[0].offset
            now = time.monotonic()
            if (
                self._pauses.is_over(blob, start - start % WINDOW, now)
                and self._budget.allows(now)
                and self.notes.are_taken(now)
            ):
                self._note(blob, start, now)
        return got

    def _note(self, blob: int, start: int, now: float) -> None:
        """Note the window of a small read, or its region."""
        window, region = start - start % WINDOW, start - start % REGION
        windows = range(region, region + REGION, WINDOW)
        pauses = self._pauses
        near = any(pauses.seconds(blob, other, now) < _NEAR for other in windows if other != window)
        if near and self._is_ready(blob, region, REGION):
            if self.notes.write(blob, region, REGION, now):
                self._budget.add(REGION)
                for each in windows:
                    if pauses.is_over(blob, each, now):
                        pauses.begin(blob, each, now)
        elif self._is_ready(blob, window, WINDOW) and self.notes.write(blob, window, WINDOW, now):
            self._budget.add(WINDOW)
            pauses.begin(blob, window, now)

    def _is_ready(self, blob: int, offset: int, size: int) -> bool:
        """Whether all of a range can be read now, as far as the blob reaches."""
        segment = self._views[blob].segment
        if segment is None:
            return False
        with contextlib.suppress(CacheError):
            first, count = RangeMap(segment).chunks_of(offset, min(size, segment.identity.size - offset))
            return bytes(segment.state[first : first + count]).count(READY) == count
        return False
