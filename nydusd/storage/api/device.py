"""BlobDevice: all blobs of one image as a front end sees them. A hit is decided and read here, in the front end's process.

For each blob it maps the segment (state bytes, chunk records) and opens the cache file, both when first needed: at
mount time they may not exist yet. It never fetches: what is missing is named, and the front end asks the supervisor.
The state byte is loaded before the file is read, and a worker stores it after its write has returned. Chunks may be taken
away to make room: the epoch is loaded before the state bytes and again after the read (`storage/state/eviction.py`). Where
the disk may not have all that is ready, it is asked after the read whether some of it was lost (`losses.py`).

Segment and file are a pair: the file is the very inode that the segment speaks of, or neither is used. So when others
replace them, a device that still has the old pair reads the old file's bytes, which are right, until it needs more and
opens the new pair. The file is read and never mapped, so one that is cut off costs a short read.

A reader that goes on sequentially would stop where what was fetched ahead of it ends. So when that end is near, the device
gives a hint for the supervisor, which fetches more.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Protocol

from nydusd.errors import CorruptChunkError, EvictedError, StaleCacheError, UnreadableError, cache_error, is_scarce
from nydusd.formats.model import Extent
from nydusd.storage.api.io import BlobIoVec, ChunkRun, runs_of
from nydusd.storage.api.known_chunk import KnownChunk
from nydusd.storage.api.losses import Losses
from nydusd.storage.state.segment import DOUBTS, EMPTY, READY, RECORD, RETIRED, Segment

_LOOK_AHEAD = 16 << 20
"""Plain bytes behind a sequential reader that should be there, or on their way."""
_STEADY = 4 << 20
"""Plain bytes that a reader may skip and still count as sequential: each front end sees only a part of the reads."""
_STEP = 1 << 20
"""Plain bytes after which a sequential reader is looked at again."""

_NOT_CALM = (0, 1)
"""Instead of a segment's `marks`: it is to be asked after each read."""


class Plain(Protocol):
    """Plain bytes of a chunk, addressed as in the whole chunk: all (a memoryview), or those that a read needs."""

    def __getitem__(self, where: slice, /) -> memoryview: ...


Pieces = Mapping[tuple[int, int], Plain]
"""Chunks that are not in the cache file but at hand in memory, by (blob index, chunk)."""


class BlobView:
    """One blob: its segment and its cache file, once they are there."""

    __slots__ = (
        "before",
        "blob_id",
        "calm",
        "clock",
        "count",
        "counters",
        "data_path",
        "early",
        "early_bytes",
        "epoch",
        "fd",
        "handle",
        "looked",
        "losses",
        "marks",
        "place",
        "records",
        "row",
        "segment",
        "segment_name",
        "state",
        "touched",
        "turn",
    )

    def __init__(self, blob_id: str, handle: int, segment_name: str, data_path: str | None, row: int) -> None:
        self.blob_id = blob_id
        self.handle = handle
        self.segment_name = segment_name
        self.data_path = data_path
        self.row = row
        self.fd = -1
        self.segment: Segment | None = None
        self.count = 0
        self.turn = 0
        self.early = self.early_bytes = 0  # misses from before there was a place to count them
        self.place = -_STEADY - 1  # where in the blob the last reader of another chunk was,
        self.looked = 0  # and from where on to look again whether enough is there for it

    def open(self) -> bool:
        """Map the segment if it is there; the cache file must be the one that the segment speaks of.

        There may be none for the time being (the cache folder cannot be written): then nothing is ever ready in it.
        Raises ScarceError when both may be there, and nothing more can be opened now.
        """
        segment = Segment.open(self.segment_name)
        if segment is None:
            return False
        if self.data_path is not None and segment.identity.ino:
            try:
                self.fd = os.open(self.data_path, os.O_RDONLY | os.O_CLOEXEC)
                is_the_same = segment.identity.is_of(self.fd)
            except OSError as e:
                segment.close()
                self.close()
                if is_scarce(e):
                    raise cache_error(f"blob {self.blob_id}: cache file", e) from e
                return False
            if not is_the_same:
                segment.close()
                self.close()
                return False
        self.segment = segment
        self.state, self.records, self.count = segment.state, segment.records, segment.count
        self.touched, self.clock, self.epoch = segment.touched, segment.clock, segment.epoch
        self.losses = Losses(self.blob_id, self.fd, segment)
        self.marks, self.calm = segment.marks if self.losses.is_calm else _NOT_CALM, 0
        self.counters = segment.counters(self.row)
        self.counters[2] += self.early
        self.counters[3] += self.early_bytes
        self.early = self.early_bytes = 0
        return True

    def look(self) -> bool:
        """Note the epoch, and how often all was doubted, before state bytes are looked at. False: there is no segment."""
        if self.segment is None:
            if not self.open():
                return False
        elif self.epoch[0] == RETIRED:
            self.close()
            if not self.open():
                return False
        self.before = self.epoch[0]
        self.calm = self.segment.marks[0] & DOUBTS  # type: ignore[union-attr]  # it was just looked whether there is one
        # One that is retired and has its name still: a worker was killed over the next one, which is made when it is asked for.
        return bool(self.before != RETIRED)

    def lacks(self, at: int) -> bool:
        """A reader is at this offset: whether it goes on sequentially, and what it will come to is not fetched yet."""
        steady = self.place < at <= self.place + _STEADY
        self.place = at
        if not steady:
            self.looked = at + _STEP
        elif at >= self.looked:
            self.looked = at + _STEP
            chunk = bisect_right(range(self.count), at + _LOOK_AHEAD, key=self._offset) - 1
            return bool(self.state[chunk] == EMPTY)
        return False

    def check(self) -> None:
        """Something was read while `marks` were not calm. Raises as `Losses.check` does."""
        self.losses.check(self.calm)
        self.marks = self.segment.marks  # type: ignore[union-attr]

    def _offset(self, chunk: int) -> int:
        return int(RECORD.unpack_from(self.records, chunk * RECORD.size)[1])

    def close(self) -> bool:
        """Unmap and close what is open, to be opened again at the next look. Whether there was anything."""
        was_open = self.segment is not None
        if self.segment is not None:
            self.counters.release()
            self.segment.close()
            self.segment = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        return was_open


class BlobDevice:
    """The blobs of one image, by their index in its blob table."""

    def __init__(self, views: Sequence[BlobView]) -> None:
        self._views = views
        self._turn = 0
        self.hints: list[ChunkRun] = []
        """Where sequential readers are that will miss soon (`blob` is a handle). Who sends them clears the list."""

    @classmethod
    def from_spec(cls, blobs: Sequence[Mapping[str, object]], row: int) -> BlobDevice:
        """From the supervisor's description: for each blob {blob_id, handle, segment, data}; `row`: our counters."""
        return cls(
            [
                BlobView(
                    str(b["blob_id"]),
                    int(str(b["handle"])),
                    str(b["segment"]),
                    None if b["data"] is None else str(b["data"]),
                    row,
                )
                for b in blobs
            ]
        )

    def handle(self, blob: int) -> int:
        """The supervisor's number for a blob of this image."""
        return self._views[blob].handle

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]:
        """What must be fetched before `vec` can be read: [] means read now. Counts hits and misses unless `again`.

        Raises CorruptChunkError where the file's idea of a chunk and the blob's do not agree, ScarceError when a blob cannot
        be opened now: then ask again later.
        """
        runs: list[ChunkRun] = []
        self._turn = turn = self._turn + 1
        previous, is_open = -1, False
        for blob, chunk, uoff, offset, length, chunk_len in vec:
            if blob != previous:
                previous, view = blob, self._views[blob]
                # Once a call, and before the first state byte: what is taken away from here on is noticed.
                is_open = view.look() if view.turn != turn or view.segment is None else view.before != RETIRED
                view.turn = turn
            if is_open:
                if not 0 <= chunk < view.count:
                    raise CorruptChunkError(view.blob_id, chunk, f"the blob has {view.count} chunks")
                _coff, at, _csize, usize, _flags, _ctx, _off, _crc = RECORD.unpack_from(view.records, chunk * 40)
                if at != uoff or offset + length > usize or chunk_len > usize:
                    raise CorruptChunkError(
                        view.blob_id, chunk, f"file has {chunk_len} bytes at {uoff}, blob has {usize} bytes at {at}"
                    )
                ready = view.state[chunk] == READY
                view.touched[chunk] = view.clock[0]
                if not again:
                    at = 0 if ready else 2
                    view.counters[at] += 1
                    view.counters[at + 1] += length
                if ready:
                    if uoff != view.place and not again and view.lacks(uoff):
                        self.hints.append(ChunkRun(view.handle, chunk, 1))
                    continue
            elif not again:
                view.early += 1
                view.early_bytes += length
            last = runs[-1] if runs else None
            if last is not None and last.blob == blob and last.first + last.count == chunk:
                runs[-1] = ChunkRun(blob, last.first, last.count + 1)
            elif last is None or last.blob != blob or last.first + last.count - 1 != chunk:
                runs.append(ChunkRun(blob, chunk, 1))
        return runs

    def known(self, ino: int, extent: Extent) -> KnownChunk | None:
        """The chunk of file `ino` that `extent` covers, for reads to come. `missing` has just said of it that it is there."""
        view = self._views[extent.blob]
        return None if view.segment is None else KnownChunk(view, ino, extent, self.hints)

    def settled(self, vec: list[Extent]) -> list[Extent]:
        """`vec` itself, or better pieces if more is known of these blobs by now."""
        return vec

    def runs(self, vec: list[Extent]) -> list[ChunkRun]:
        """All chunks of `vec`, whether they are there or not."""
        return runs_of(self.settled(vec))

    def evictions(self, vec: BlobIoVec) -> int:
        """A number that has changed when chunks of these blobs were taken away, or their segments replaced, since."""
        views = (self._views[blob] for blob in {extent.blob for extent in vec})
        return sum(view.epoch[0] for view in views if view.segment is not None)

    def describe(self, vec: BlobIoVec) -> str:
        """Blobs and chunks of a read, for the log."""
        runs: dict[int, list[int]] = {}
        for extent in vec:
            run = runs.setdefault(extent.blob, [extent.chunk, extent.chunk])
            run[:] = min(run[0], extent.chunk), max(run[1], extent.chunk)
        return ", ".join(
            f"blob {self._views[blob].blob_id} chunk{f' {first}' if first == last else f's {first} to {last}'}"
            for blob, (first, last) in runs.items()
        )

    def refresh(self, vec: BlobIoVec) -> None:
        """Look at the segments and cache files anew: the supervisor may have replaced them (cache file deleted)."""
        for blob in {extent.blob for extent in vec}:
            view = self._views[blob]
            view.close()
            view.open()

    def read_into(self, vec: BlobIoVec, buf: memoryview, pieces: Pieces | None = None) -> int:
        """Read the bytes of `vec`, all of them ready, into `buf`; gives their number. One pread a run of the file.

        `missing` has said, since the last look at anything else, that all of it is there. Raises EvictedError when some of
        it was taken away meanwhile: `buf` may hold zeros then, and `missing` must be asked again. Raises StaleCacheError when
        the cache file gives less than it must (somebody truncated it): the blob's segment and file are opened anew at the
        next look. Raises UnreadableError when its disk fails, or has failed to take it, ScarceError when there is no memory to
        read it, or it is not known yet whether the disk has it.
        """
        done = 0
        index, end = 0, len(vec)
        while index < end:
            blob, chunk, uoff, offset, length, _ = vec[index]
            index += 1
            if pieces is not None and (blob, chunk) in pieces:
                buf[done : done + length] = pieces[blob, chunk][offset : offset + length]
                done += length
                continue
            start = uoff + offset
            stop = start + length
            while index < end and pieces is None:
                following: Extent = vec[index]
                if following.blob != blob or following.uoff + following.offset != stop:
                    break
                stop += following.length
                index += 1
            view = self._views[blob]
            if view.fd < 0:
                raise StaleCacheError(f"blob {view.blob_id}: no cache file is open")
            try:
                got = os.preadv(view.fd, [buf[done : done + stop - start]], start)
            except OSError as e:
                if is_scarce(e):  # memory: the disk is not to blame
                    raise cache_error(f"blob {view.blob_id}: cache file at {start}", e) from e
                raise UnreadableError(f"blob {view.blob_id}: cache file at {start}: {e.strerror}", e.errno) from e
            if got != stop - start:
                view.close()
                raise StaleCacheError(f"blob {view.blob_id}: cache file gave {got} of {stop - start} bytes at {start}")
            if view.epoch[0] != view.before:
                raise EvictedError(f"blob {view.blob_id}: chunks were taken away while they were read")
            marks = view.marks
            if marks[1] or marks[0] != view.calm:
                view.check()
            done += got
        return done

    def count_errors(self, vec: BlobIoVec) -> None:
        """A read of these extents failed."""
        for blob in {extent.blob for extent in vec}:
            view = self._views[blob]
            if view.segment is not None:
                view.counters[4] += 1

    def close(self) -> bool:
        """Close all blobs. Each is opened again when it is read: so this may be done whenever no read is in the middle of it.

        Whether there was anything open.
        """
        closed = [view.close() for view in self._views]
        return any(closed)
