"""What the images that have a blob say of its chunks, taken together: which are there, and by whom others are to be asked for.

Runs in the front end, for `device.Blob`. A chunk is there if it is so for an image that lists it: whoever wrote it then had a
digest to check it by. The kernel does not say for which image it reads, so what an image that does not list a chunk says of it
counts only if no other one lists it. After SIGKILL nothing is lost: segments outlive us.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence

from nydusd.errors import CacheError, FormatError, ScarceError, StaleCacheError
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import READY, RETIRED, Segment

from .table import File
from .view import View

_PAGE = 4096
_ABSENT = bytes(state != READY for state in range(256))
"""To translate state bytes: 1 for a chunk that is not there."""


class Chunks:
    """Of one cache file. `row`: in which the front end counts."""

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

    @property
    def handles(self) -> set[int]:
        """How the supervisor calls it, or has."""
        return {view.handle for view in self._views}

    def _describe(self, files: Sequence[File]) -> None:
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
        self._open, self._only = [], None

    def close(self) -> None:
        for view in self._views:
            view.close()
        self._open, self._only = [], None

    def _segments(self) -> list[Segment]:
        """Those that are mapped, also where it was not looked since the mounts have changed."""
        return [view.segment for view in self._views if view.segment is not None]

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
