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
from nydusd.storage.state import map_file
from nydusd.storage.state.segment import EMPTY, READY, RECORD, Segment
from nydusd.storage.state.sharing import segments_of


def check(fd: int, segment: Segment, at: int, end: int) -> None:
    """The data file had its size, then these bytes of it were written. Raises StaleCacheError if it was cut off meanwhile.

    Raises CacheError when that cannot be told. Costs one fstat(2), but for the last chunk of a file.
    """
    points.reach("fill: before the second look for a cut")
    size = segment.identity.size
    if end < size and os.fstat(fd).st_size >= size:
        return
    lost = _lost(fd, segment)
    with contextlib.suppress(CacheError):  # then of this image alone it is known what is ready
        for other in segments_of(segment.identity.dev, segment.identity.ino):
            if other.inode != segment.inode and other.identity.file == segment.identity.file:
                lost |= _lost(fd, other)
    begin = at if end < size else size
    for place in sorted(lost, reverse=True):
        if not at <= place < end:  # what is there by now is ours, also where it was ready for others
            if not lost[place]:
                break
            begin = min(begin, place)
    if begin == size:
        return
    with contextlib.suppress(OSError):  # then its disk fails as well
        if os.fstat(fd).st_size > begin:
            os.ftruncate(fd, begin)
    raise StaleCacheError("the cache file was cut off while it was written to")


def _lost(fd: int, segment: Segment) -> dict[int, bool]:
    """By the places of chunks that are ready, whether there is a hole in their ranges. Raises CacheError.

    Not of those that were taken out meanwhile (`storage/state/eviction.py`): then the epoch was raised before.
    """
    places = [(record[1], record[3]) for record in RECORD.iter_unpack(segment.records)]
    while True:
        epoch = segment.epoch[0]
        ready = bytearray(READY if state == READY else EMPTY for state in bytes(segment.state))
        there = bytearray(ready)
        map_file.drop_holes(fd, there, places, segment.identity.size)
        if segment.epoch[0] == epoch:
            rows = zip(places, ready, there, strict=True)
            return {place: now == EMPTY for (place, length), was, now in rows if was == READY and length}
