"""The blobs of an image as address ranges of their cache files: what of a range is there, what must be fetched.

Runs in the front end. For each blob it maps the segments, one for each image that has it (`chunks.py`). The file itself is
read by the kernel alone, after the event was answered; nothing is ever taken out of it (`BlobCache.pinned`), so a range that is
ready stays so.

The kernel reads the file that it was given at the mount. If another takes its place in the cache folder, what the first one
has can be read on, and the rest cannot be had any more: the segment of the other file says nothing of it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple

from nydusd.errors import CacheError, LostWritesError, ScarceError, StaleCacheError, SyncingError, cache_error
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.on_disk import is_on_disk
from nydusd.storage.state.segment import EMPTY, READY, Segment

from .chunks import Chunks
from .losses import Losses
from .table import File

_LOOK_AHEAD = 16 << 20
"""Bytes behind a sequential reader that should be there, or on their way."""
_STEADY = 4 << 20
"""Bytes that a reader may skip and still count as sequential."""
_STEP = 1 << 20
"""Bytes after which a sequential reader is looked at again."""


class Ready(NamedTuple):
    """What was there at a time: a byte for each chunk, 0 if it was, or no file refers to it; by which segments, and how often
    each had been doubted before. `run`: by which the file may be synced, a chunk that was there.
    """

    run: ChunkRun
    absent: bytes
    doubts: dict[Segment, int]


class OutsideError(CacheError):
    """A read of what the blob does not have."""


class Blob(Chunks):
    """One cache file, of one mount or of several. `row`: in which the front end counts."""

    def __init__(self, files: Sequence[File], row: int) -> None:
        super().__init__(files, row)
        self._stored: Ready | None = None
        self._losses = Losses()
        self._proven: set[int] = set()
        """Chunks that were seen on the disk."""
        self._place = -_STEADY - 1
        self._looked = 0
        self.describe(files)

    def is_still(self, files: Sequence[File]) -> bool:
        """Whether mounts that have these are of this very file, for all that is known: its number may be another's now."""
        births = {file.birth for file in files} | {self._birth}
        return len(births - {None}) <= 1 and any(file.handle in self.handles for file in files)

    def describe(self, files: Sequence[File]) -> None:
        """It is this of each mount that has it, the latest last."""
        self._describe(files)
        self._path = files[-1].data
        self._cuts = [file.cuts for file in files]
        self._lacks: dict[int, int] = {}
        """By the begin of an interval, a chunk of it that was missing when it was looked at last."""

    def held(self) -> int:
        """Bytes of the cache file. Raises StaleCacheError when it is not in its place."""
        try:
            st = os.stat(self._path)
        except OSError as e:
            raise StaleCacheError(f"blob {self.blob_id}: {self._path}: {e.strerror}", e.errno) from e
        self._check_inode(st)
        return st.st_size

    def missing(self, offset: int, count: int, held: int, refused: Collection[int] = ()) -> list[ChunkRun]:
        """The chunks that must be fetched before this range may be read, and those between them; none: read now.

        `held` is the size that the cache file has now. `refused`: handles that are asked only if there is no other. Raises
        StaleCacheError when the file was cut off or the range cannot be had any more, OutsideError when the blob has none such.
        """
        self._look()
        if not self.listens:
            self.listen()
        if len(self._open) < len(self._views):
            self._survey()
        if held < self._size:
            raise StaleCacheError(f"blob {self.blob_id}: its cache file was cut off")
        end = offset + count
        if offset >= self._limit or not count:
            raise OutsideError(
                f"blob {self.blob_id}: a read of {count} bytes at {offset} is outside its {self._size} bytes"
            )
        first, last = self._chunks(offset, end)
        counters = self._counters
        if self._are_there(first, last):
            counters[0] += 1
            counters[1] += count
            return []
        counters[2] += 1
        counters[3] += count
        return self._runs(first, last, refused)

    @property
    def listens(self) -> bool:
        """Whether it hears of writes that are lost."""
        return self._losses.listen_already

    def listen(self, fd: int = -1) -> None:
        """Hear of writes that are lost from now on, by the file in its place; by `fd`, the cache file, where that is gone.

        For what there is of one that is gone can be read on. Raises ScarceError when no file can be opened now.
        """
        self._look()
        try:
            self._losses.listen(self._open_file, self._segments())
        except ScarceError:
            raise
        except CacheError:
            if fd >= 0:
                self._losses.listen(lambda: os.dup(fd), self._segments())

    def has(self, offset: int, count: int) -> bool:
        """Whether all of a range is there that `missing` was asked about, without counting it."""
        self._look()
        return offset >= self._limit or self._are_there(*self._chunks(offset, offset + count))

    def ready(self, run: ChunkRun) -> bool:
        """Whether all chunks of a run are there. Raises StaleCacheError if not, and the blob has another file now."""
        self._look()
        first, last = run.first, run.first + run.count
        if self._are_there(first, last):
            return True
        view = next((view for view in self._open if view.handle == run.blob), None)
        if view is None or view.segment is None or view.segment.is_current():
            return False
        view.close()
        self._survey()
        if view not in self._open:
            raise self._stale()
        return self._are_there(first, last)

    def hint(self, offset: int) -> ChunkRun | None:
        """A reader is at `offset`: a run to send with AHEAD if it goes on sequentially and will come to what is not there."""
        place, self._place = self._place, offset
        if not place < offset <= place + _STEADY:
            self._looked = offset + _STEP
        elif offset >= self._looked and self._open:
            self._looked = offset + _STEP
            chunk = min(bisect_right(self._ends, offset + _LOOK_AHEAD), len(self._ends) - 1)
            if chunk >= 0 and not self._are_there(chunk, chunk + 1):
                view = self._asked(chunk)
                if view is not None and view.listed[chunk] and view.states[chunk] == EMPTY:
                    return ChunkRun(view.handle, min(bisect_right(self._ends, offset), chunk), 1)
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
        """Whether nothing is missing of an interval that a file refers to. Raises CacheError."""
        self._look()
        known = self._lacks.get(begin)
        if known is not None and not self._are_there(known, known + 1, referred=True):
            return False
        first, last = self._chunks(begin, end)
        if self._are_there(first, last, referred=True):
            return True
        self._lacks[begin] = first + self._absent(first, last, referred=True).index(1)
        return False

    def complete(self) -> bool:
        """Whether nothing of the blob is missing that a file refers to."""
        try:
            self._look()
        except CacheError:
            return False
        return self._are_there(0, len(self._ends), referred=True)

    def look(self, refused: Collection[int] = ()) -> Ready:
        """What is there now. `refused`: handles that it is synced by only if there is no other. Raises CacheError.

        It is synced by one that doubts first, if there is such a one: that is done for all of them.
        """
        self._look()
        doubts = {segment: segment.doubts[0] for segment in self._segments()}
        views = [view for view in self._open if view.handle not in refused] or self._open
        view = next((view for view in views if view.doubts), views[0])
        run = ChunkRun(view.handle, max(view.states.tobytes().find(READY), 0), 1)
        return Ready(run, self._absent(0, len(self._ends), referred=True), doubts)

    def synced(self, ready: Ready) -> bool:
        """The file was synced after this look, and nothing of it was lost. Whether that says something of this file.

        Not if it was replaced, or `is_being_synced`.
        """
        if self.is_being_synced() or not all(segment.is_current() for segment in ready.doubts):
            return False
        self._stored = ready
        return True

    def is_being_synced(self) -> bool:
        """Whether somebody syncs it, or was killed at that: he may have been told of a loss, and nobody is told again."""
        return any(segment.syncing[0] for segment in self._segments())

    def is_stored(self, begin: int = 0, end: int = 1 << 63) -> bool:
        """Whether all of an interval is there, was so before the file was synced, and nothing was doubted since."""
        try:
            self._look()
        except CacheError:
            return False
        stored, segments = self._stored, self._segments()
        if stored is None or not stored.doubts.keys() <= set(segments):
            return False
        first, last = self._chunks(begin, end)
        if stored.absent.find(1, first, last) >= 0 or not self._are_there(first, last, referred=True):
            return False
        # In this order: before a worker takes `lost` away it sets `syncing`, and that stays until it has doubted what is there.
        if any(segment.lost[0] for segment in segments) or self.is_being_synced():
            return False
        return all(segment.doubts[0] == doubts for segment, doubts in stored.doubts.items())  # last of all

    def check(self) -> None:
        """To be called before a reader passes to what may be in the page cache alone.

        Raises LostWritesError when the disk did not take all that was written to it, until workers have doubted what is
        there; SyncingError while that is not known yet, CacheError when it cannot be found out.
        """
        self._look()
        segments = self._segments()
        self._losses.listen(self._open_file, segments)
        self._losses.ask(segments)
        if self._losses.matter(segments):
            raise LostWritesError(f"blob {self.blob_id}: its disk did not take all that was written")
        if self._losses.is_unsure(segments):
            raise SyncingError(f"blob {self.blob_id}: its cache file is being synced")

    def is_on_disk(self, offset: int, count: int) -> bool:
        """Whether all of a range is, whatever is said of it: it is read there, and checked. This waits for the disk.

        False as well where it cannot be told: of chunks without digest and checksum, and those that no image lists.
        For a front end that is alone: nobody ends a sync, or doubts what is there, where a worker was killed at that.
        """
        try:
            self._look()
            first, last = self._chunks(offset, offset + count)
            if offset >= self._limit:
                return False
            if self._proven.issuperset(range(first, last)):
                return True
            fd = self._open_file()
        except CacheError:
            return False
        try:
            for chunk in range(first, last):
                if chunk in self._proven:
                    continue
                view = next((view for view in self._open if view.listed[chunk] and view.states[chunk] != EMPTY), None)
                if view is None or view.segment is None or not is_on_disk(fd, view.segment, chunk):
                    return False
                self._proven.add(chunk)
        except (OSError, ImportError):  # a library for digests is not on the disk any more
            return False
        finally:
            os.close(fd)
        return True

    def _open_file(self) -> int:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise cache_error(f"blob {self.blob_id}: {self._path}", e) from e
        try:
            self._check_inode(os.fstat(fd))
        except StaleCacheError:
            os.close(fd)
            raise
        return fd

    def _check_inode(self, st: os.stat_result) -> None:
        if (st.st_dev, st.st_ino) != self.file:
            raise StaleCacheError(f"blob {self.blob_id}: its cache file was replaced; mount the image again")

    def is_suspect(self) -> bool:
        """Whether some of what is said to be there is lost, or may be, and it is not known yet what."""
        segments = self._segments()
        return self._losses.matter(segments) or self._losses.is_unsure(segments)

    def count_error(self) -> None:
        """A read failed."""
        if self._open:
            self._counters[4] += 1

    def close(self) -> None:
        super().close()
        self._losses.close()
