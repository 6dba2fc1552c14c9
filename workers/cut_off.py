"""A cache file that somebody cuts off at the moment in which a chunk is written to it. Runs in decompress workers.

A write behind the end of such a file makes it longer again, over a hole that passes for the chunks that were there, and no
system call writes without doing that. So the size is looked at before (`workers/fill.py`), and again after each write, before
its chunk is ready. A chunk at the end of the file gives it its old size: then it is looked whether all that is ready from some
chunk on has holes, which comes of nothing else. The file is cut off there once more: it stays short from then on, whoever
reads behind that sees it, and the blob is opened anew. What is ready before that stays: the kernel's EROFS may read it on.

What is left of that moment: who reads a lost chunk between the write and the second cut gets zeros. Killed in between, the file
stays as it is until the job is done again, or until the next opening, either of which finds the same. Not noticed when the
last chunk of a file is written are a cut that took no whole block of a chunk that is ready, and one of a file system that
reports no holes; nor is one in the very moment in which a second worker writes that chunk.
"""

from __future__ import annotations

import contextlib
import os

from nydusd import points
from nydusd.errors import CacheError, StaleCacheError
from nydusd.formats.model import ChunkRecord
from nydusd.storage.state import map_file
from nydusd.storage.state.on_disk import is_on_disk
from nydusd.storage.state.segment import READY, Segment
from nydusd.storage.state.sharing import segments_of


def check(fd: int, segment: Segment, at: int, end: int) -> None:
    """The data file had its size, then these bytes of it were written. Raises StaleCacheError if it was cut off meanwhile.

    Raises CacheError when that cannot be told. Costs one fstat(2), but for the last chunk of a file.
    """
    points.reach("fill: before the second look for a cut")
    size = segment.identity.size
    if end < size and os.fstat(fd).st_size >= size:
        return
    lost = _lost(fd, segment, range(at, end))
    with contextlib.suppress(CacheError):  # then of this image alone it is known what is ready
        for other in segments_of(segment.identity.dev, segment.identity.ino):
            if other.inode != segment.inode and other.identity.file == segment.identity.file:
                lost |= _lost(fd, other, range(at, end))
    begin = at if end < size else size
    for place in sorted(lost, reverse=True):
        if not lost[place]:
            break
        begin = min(begin, place)
    if begin == size:
        return
    with contextlib.suppress(OSError):  # then its disk fails as well
        if os.fstat(fd).st_size > begin:
            os.ftruncate(fd, begin)
    raise StaleCacheError("the cache file was cut off while it was written to")


def _lost(fd: int, segment: Segment, written: range) -> dict[int, bool]:
    """By the places of chunks that are ready, the last one first and down to one that is whole, whether they have holes.

    Not of those that were taken out meanwhile (`storage/state/eviction.py`): then the epoch was raised before. Nor of what was
    `written`: that is ours, also where it was ready for others. Raises CacheError.
    """
    found: dict[int, bool] = {}
    while not segment.retired:  # another one knows by now what is ready
        epoch, states = segment.epoch[0], bytes(segment.state)
        found.clear()
        chunk = states.rfind(READY)
        while chunk >= 0:
            record = segment.record(chunk)
            if record.usize and record.uoff not in written:
                # One that is lost is enough to know of a cut: of those below that only the holes are looked for.
                lost = _has_hole(fd, segment, record) and (bool(found) or not _is_whole(fd, segment, chunk))
                found[record.uoff] = lost
                if not lost:
                    break
            chunk = states.rfind(READY, 0, chunk)
        if segment.epoch[0] == epoch:
            return found
    return {}


def _has_hole(fd: int, segment: Segment, record: ChunkRecord) -> bool:
    """Raises CacheError."""
    return map_file.drop_holes(fd, bytearray([READY]), [(record.uoff, record.usize)], segment.identity.size) > 0


def _is_whole(fd: int, segment: Segment, chunk: int) -> bool:
    """Whether a chunk with a hole is what it must be all the same: of zeros, which some file systems do not store."""
    try:
        return is_on_disk(fd, segment, chunk)
    except OSError:
        return False
