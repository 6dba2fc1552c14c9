"""The blobs of an image as address ranges of their cache files: what of a range is there, what must be fetched.

Runs in the front end. For each blob it maps the segment. The file itself is read by the kernel alone, after the event was
answered; nothing is ever taken out of it (`BlobCache.pinned`), so a range that is ready stays so.

The kernel reads the file that it was given at the mount. If another takes its place in the cache folder, what the first one
has can be read on, and the rest cannot be had any more: the segment of the other file says nothing of it.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left, bisect_right

from nydusd.errors import CacheError, StaleCacheError
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import EMPTY, READY, RECORD, RETIRED, Segment

from .table import File

_LOOK_AHEAD = 16 << 20
"""Bytes behind a sequential reader that should be there, or on their way."""
_STEADY = 4 << 20
"""Bytes that a reader may skip and still count as sequential."""
_STEP = 1 << 20
"""Bytes after which a sequential reader is looked at again."""
_PAGE = 4096


class Blob:
    """One cache file, of one mount or of several. `row`: in which the front end counts."""

    def __init__(self, file: File, row: int) -> None:
        self.blob_id = file.blob_id
        self.file = (file.device, file.inode)
        """(device, inode) of the cache file that EROFS has."""
        self._row = row
        self._segment: Segment | None = None
        self._place = -_STEADY - 1
        self._looked = 0
        self.describe([file])

    def describe(self, files: list[File]) -> None:
        """It is this of each mount that has it, the latest last."""
        self.handle = files[-1].handle
        self._path = files[-1].data
        self._name = files[-1].segment
        self._cuts = [file.cuts for file in files]
        self._lacks: dict[int, int] = {}
        """By the begin of an interval, a chunk of it that was missing when it was looked at last."""

    def held(self) -> int:
        """Bytes of the cache file. Raises StaleCacheError when it is not in its place."""
        try:
            st = os.stat(self._path)
        except OSError as e:
            raise StaleCacheError(f"blob {self.blob_id}: {self._path}: {e.strerror}", e.errno) from e
        if (st.st_dev, st.st_ino) != self.file:
            raise StaleCacheError(f"blob {self.blob_id}: its cache file was replaced; mount the image again")
        return st.st_size

    def missing(self, offset: int, count: int, held: int) -> ChunkRun | None:
        """The chunks that must be fetched before this range may be read, the first missing to the last; None: read now.

        `held` is the size that the cache file has now. Raises StaleCacheError when it was cut off or the range cannot be had
        any more, CacheError when that is outside the blob.
        """
        if self._segment is None or self._epoch[0] == RETIRED:
            self._current()
        if held < self._size:
            raise StaleCacheError(f"blob {self.blob_id}: its cache file was cut off")
        end = offset + count
        if offset >= self._limit or not count:
            raise CacheError(
                f"blob {self.blob_id}: a read of {count} bytes at {offset} is outside its {self._size} bytes"
            )
        first, last = bisect_right(self._ends, offset), bisect_left(self._starts, end)
        states = self._states[first:last].tobytes()
        counters = self._counters
        if states.count(READY) == last - first:
            counters[0] += 1
            counters[1] += count
            return None
        counters[2] += 1
        counters[3] += count
        absent = [chunk for chunk, state in enumerate(states, first) if state != READY]
        return ChunkRun(self.handle, absent[0], absent[-1] - absent[0] + 1)

    def ready(self, run: ChunkRun) -> bool:
        """Whether all chunks of a run are there. Raises StaleCacheError if not, and the blob has another file now."""
        segment = self._current()
        if bytes(segment.state[run.first : run.first + run.count]).count(READY) == run.count:
            return True
        if segment.is_current():
            return False
        self.close()
        return bytes(self._current().state[run.first : run.first + run.count]).count(READY) == run.count

    def hint(self, offset: int) -> ChunkRun | None:
        """A reader is at `offset`: a run to send with AHEAD if it goes on sequentially and will come to what is not there."""
        place, self._place = self._place, offset
        if not place < offset <= place + _STEADY:
            self._looked = offset + _STEP
        elif offset >= self._looked:
            self._looked = offset + _STEP
            chunk = min(bisect_right(self._ends, offset + _LOOK_AHEAD), len(self._ends) - 1)
            if chunk >= 0 and self._states[chunk] == EMPTY:
                return ChunkRun(self.handle, min(bisect_right(self._ends, offset), chunk), 1)
        return None

    def interval(self, offset: int) -> tuple[int, int]:
        """What a private mount may be for through which a reader came to `offset`: begin and end, of all mounts together."""
        begins, ends = [], []
        for cuts in self._cuts:
            place = bisect_right(cuts, offset)
            begins.append(cuts[place - 1])
            ends.append(cuts[place] if place < len(cuts) else self._limit)
        return min(begins), max(ends)

    def whole(self, begin: int, end: int) -> bool:
        """Whether nothing is missing of an interval. Raises CacheError."""
        states = self._current().state
        known = self._lacks.get(begin)
        if known is not None and states[known] != READY:
            return False
        first, last = bisect_right(self._ends, begin), bisect_left(self._starts, end)
        missing = next((chunk for chunk, state in enumerate(bytes(states[first:last]), first) if state != READY), None)
        if missing is not None:
            self._lacks[begin] = missing
        return missing is None

    def complete(self) -> bool:
        """Whether nothing of the blob is missing."""
        try:
            segment = self._current()
        except CacheError:
            return False
        return bool(bytes(segment.state).count(READY) == segment.count)

    def count_error(self) -> None:
        """A read failed."""
        if self._segment is not None:
            self._counters[4] += 1

    def _current(self) -> Segment:
        """The segment of the kernel's file. Raises StaleCacheError when there is none."""
        segment = self._segment
        if segment is not None and segment.epoch[0] != RETIRED:
            return segment
        fresh = Segment.open(self._name)
        if fresh is None or (fresh.identity.dev, fresh.identity.ino) != self.file:
            if fresh is not None:
                fresh.close()
            raise StaleCacheError(
                f"blob {self.blob_id}: its cache file was replaced or deleted; mount the image again to have the rest of it"
            )
        self.close()
        self._segment = fresh
        self._epoch, self._states = fresh.epoch, fresh.state
        self._counters = fresh.counters(self._row)
        self._size = fresh.identity.size
        self._limit = -(-self._size // _PAGE) * _PAGE
        self._starts, self._ends = array("Q"), array("Q")
        for _, start, _, size, *_ in RECORD.iter_unpack(fresh.records):
            self._starts.append(start)
            self._ends.append(start + size)
        return fresh

    def close(self) -> None:
        if self._segment is not None:
            self._counters.release()
            self._segment.close()
            self._segment = None
