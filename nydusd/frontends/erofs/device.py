"""The blobs of an image as address ranges of their cache files: what of a range is there, what must be fetched.

Runs in the front end. For each blob it maps the segments, one for each image that has it (`view.py`). The file itself is
read by the kernel alone, after the event was answered; nothing is ever taken out of it (`BlobCache.pinned`), so a range that is
ready stays so.

A chunk is there if it is so for an image that lists it: whoever wrote it then had a digest to check it by. The kernel does not
say for which image it reads, so what an image that does not list a chunk says of it counts only if no other one lists it.

The kernel reads the file that it was given at the mount. If another takes its place in the cache folder, what the first one
has can be read on, and the rest cannot be had any more: the segment of the other file says nothing of it.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple

from nydusd.errors import CacheError, FormatError, LostWritesError, ScarceError, StaleCacheError, cache_error
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import EMPTY, READY, RETIRED, Segment

from .losses import Losses
from .table import File
from .view import View

_LOOK_AHEAD = 16 << 20
"""Bytes behind a sequential reader that should be there, or on their way."""
_STEADY = 4 << 20
"""Bytes that a reader may skip and still count as sequential."""
_STEP = 1 << 20
"""Bytes after which a sequential reader is looked at again."""
_PAGE = 4096
_ABSENT = bytes(state != READY for state in range(256))
"""To translate state bytes: 1 for a chunk that is not there."""


class Ready(NamedTuple):
    """What was there at a time: a byte for each chunk, 0 if it was, or no file refers to it; by which segments, and how often
    each had been doubted before. `run`: by which the file may be synced, a chunk that was there.
    """

    run: ChunkRun
    absent: bytes
    doubts: dict[Segment, int]


class OutsideError(CacheError):
    """A read of what the blob does not have."""


class Blob:
    """One cache file, of one mount or of several. `row`: in which the front end counts."""

    def __init__(self, files: Sequence[File], row: int) -> None:
        self.blob_id = files[-1].blob_id
        self.file = (files[-1].device, files[-1].inode)
        """(device, inode) of the cache file that EROFS has."""
        self._birth = files[-1].birth
        self._row = row
        self._views: list[View] = []
        """One for each image: those that have digests checked of what is found on disk first, then the latest first."""
        self._open: list[View] = []
        """Those of them of which something is known; empty before it was looked which."""
        self._only: View | None = None
        """It is all that there is."""
        self._limit = 1 << 63
        self._placed: list[Segment] = []
        """By which it is known where chunks are."""
        self._stored: Ready | None = None
        self._losses = Losses()
        self._place = -_STEADY - 1
        self._looked = 0
        self.describe(files)

    def is_still(self, files: Sequence[File]) -> bool:
        """Whether mounts that have these are of this very file, for all that is known: its number may be another's now."""
        births = {file.birth for file in files} | {self._birth}
        return len(births - {None}) <= 1 and any(file.handle in self.handles for file in files)

    def describe(self, files: Sequence[File]) -> None:
        """It is this of each mount that has it, the latest last."""
        former = {view.handle: view for view in self._views}
        self._birth = next((file.birth for file in reversed(files) if file.birth is not None), self._birth)
        self._views = []
        for file in reversed(files):
            if all(view.handle != file.handle for view in self._views):
                known = file.handle in former
                self._views.append(former.pop(file.handle) if known else View(file, self._row))
                self._views[-1].describe(file)
        self._views.sort(key=lambda view: not view.verifies)
        for view in former.values():
            view.close()
        self._path = files[-1].data
        self._cuts = [file.cuts for file in files]
        self._lacks: dict[int, int] = {}
        """By the begin of an interval, a chunk of it that was missing when it was looked at last."""
        self._open, self._only = [], None

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
        if not self._losses.listen_already:
            with contextlib.suppress(StaleCacheError):  # what there is of it can be read on
                self._losses.listen(self._open_file, self._segments())
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

    @property
    def handles(self) -> set[int]:
        """How the supervisor calls it, or has."""
        return {view.handle for view in self._views}

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
        there; CacheError when that cannot be found out.
        """
        self._look()
        segments = self._segments()
        self._losses.listen(self._open_file, segments)
        self._losses.ask(segments)
        if self.is_suspect():
            raise LostWritesError(f"blob {self.blob_id}: its disk did not take all that was written")

    def _segments(self) -> list[Segment]:
        """Those that are mapped, also where it was not looked since the mounts have changed."""
        return [view.segment for view in self._views if view.segment is not None]

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
        """Whether some of what is said to be there is lost, and it is not known yet what."""
        return self._losses.matter(self._segments())

    def count_error(self) -> None:
        """A read failed."""
        if self._open:
            self._counters[4] += 1

    def close(self) -> None:
        for view in self._views:
            view.close()
        self._losses.close()
        self._open, self._only = [], None

    # --- all views together -----------------------------------------------------------------------------------

    def _chunks(self, begin: int, end: int) -> tuple[int, int]:
        """The chunks of a range: the first, and the one behind the last.

        A chunk of no bytes may be one that only a view describes of which nothing is known: of the range then, if it may reach
        into it.
        """
        first, last = bisect_right(self._ends, begin), bisect_left(self._starts, end)
        if len(self._open) < len(self._views) and begin < (
            self._starts[first] if first < len(self._starts) else self._size
        ):
            while first and self._starts[first - 1] == self._ends[first - 1]:
                first -= 1
        return first, last

    def _are_there(self, first: int, last: int, *, referred: bool = False) -> bool:
        """Whether all of these chunks are there; `last` is behind them. `referred`: all that a file refers to."""
        number = last - first
        for view in self._open:
            if view.states[first:last].tobytes().count(READY) == number and (
                view is self._only or (view.verifies == self._verifies and view.listed.count(1, first, last) == number)
            ):
                return True
        return (referred or self._only is None) and 1 not in self._absent(first, last, referred=referred)

    def _absent(self, first: int, last: int, *, referred: bool = False) -> bytes:
        """A byte for each of these chunks: 1 if it is not there.

        Of images that list a chunk those count that have digests checked of what is found on disk, if there are any. One that
        none lists is there if it is so for any, and there is none of which nothing is known; with `referred` also if it is
        known that no file refers to it.
        """
        if self._only is not None and not referred:
            return self._only.states[first:last].tobytes().translate(_ABSENT)
        number = last - first
        everything = int.from_bytes(b"\1" * number, "little")
        decided = absent = 0
        unsaid = everything
        for verifies in (True, False):
            listed, lacking = 0, everything
            for view in self._open:
                states = int.from_bytes(view.states[first:last].tobytes().translate(_ABSENT), "little")
                unsaid &= states
                if view.verifies == verifies:
                    lists = int.from_bytes(view.listed[first:last], "little")
                    listed |= lists
                    lacking &= states | (everything ^ lists)
            absent |= lacking & listed & ~decided
            decided |= listed
        if len(self._open) < len(self._views):
            unsaid = everything
        elif referred and all(view.closed for view in self._open):
            unsaid = 0
        return (absent | (unsaid & ~decided)).to_bytes(number, "little")

    def _asked(self, chunk: int, refused: Collection[int] = ()) -> View | None:
        """By which view a chunk is to be asked for; None if it may be another's, of which nothing is known."""
        found = [view for view in self._open if view.listed[chunk]]
        found = [view for view in found if view.verifies == found[0].verifies]
        if not found and len(self._open) == len(self._views):
            found = self._open
        return next((view for view in found if view.handle not in refused), found[0] if found else None)

    def _runs(self, first: int, last: int, refused: Collection[int]) -> list[ChunkRun]:
        """What is to be asked for to have these chunks. Raises StaleCacheError when one of them cannot be had.

        A run has no chunk that its image does not list, unless no other one lists it.
        """
        runs: list[ChunkRun] = []
        latest: dict[int, int] = {}
        for chunk, absent in enumerate(self._absent(first, last), first):
            if not absent:
                continue
            view = self._asked(chunk, refused)
            if view is None:
                raise self._stale()
            place = latest.get(view.handle, -1)
            if place >= 0:
                begin = runs[place].first
                reached = begin + runs[place].count
                if view is self._only or view.listed.count(1, reached, chunk) == chunk - reached:
                    runs[place] = ChunkRun(view.handle, begin, chunk + 1 - begin)
                    continue
            latest[view.handle] = len(runs)
            runs.append(ChunkRun(view.handle, chunk, 1))
        return runs

    def _look(self) -> None:
        """Know the views as they are now. Raises StaleCacheError when there is none, ScarceError when that cannot be told."""
        if self._open:
            for epoch in self._epochs:
                if epoch[0] == RETIRED:
                    break
            else:
                return
        self._survey()

    def _survey(self) -> None:
        self._open, self._only = [], None
        found: list[View] = []
        why: CacheError | None = None
        for view in self._views:
            try:
                if view.open((*self.file, self._birth)):
                    found.append(view)
            except ScarceError:
                raise
            except (CacheError, FormatError) as e:
                why = CacheError(str(e))
        if not found:
            raise why or self._stale()
        segments = [view.segment for view in found if view.segment is not None]
        if any((each.count, each.identity.size) != (segments[0].count, segments[0].identity.size) for each in segments):
            raise StaleCacheError(f"blob {self.blob_id}: images that have its cache file differ")
        self._open, self._epochs = found, [view.epoch for view in found]
        self._only = found[0] if len(self._views) == 1 else None
        self._verifies = found[0].verifies
        self._counters = found[0].counters
        self._size = segments[0].identity.size
        self._limit = -(-self._size // _PAGE) * _PAGE
        if segments != self._placed:
            self._starts, self._ends = _places(found)
            self._placed = segments

    def _stale(self) -> StaleCacheError:
        return StaleCacheError(
            f"blob {self.blob_id}: its cache file was replaced or deleted; mount the image again to have the rest of it"
        )


def _places(views: Sequence[View]) -> tuple[array[int], array[int]]:
    """Where chunks begin and end. Of one that it does not list an image may know nothing, and say that it has no bytes."""
    first = views[0]
    if all(view.starts == first.starts and view.ends == first.ends for view in views):
        for view in views:
            view.starts, view.ends = first.starts, first.ends  # once in memory
        return first.starts, first.ends
    starts, ends, reached = array("Q"), array("Q"), 0
    for places in zip(*(zip(view.starts, view.ends, strict=True) for view in views), strict=True):
        start, end = next((place for place in places if place[0] < place[1]), (reached, reached))
        starts.append(start)
        ends.append(end)
        reached = end
    return starts, ends
