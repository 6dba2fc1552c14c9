"""The job `checkpoint`: write the stored chunk map of a blob. Runs in a fetch worker; the order is in `map_file`.

And `forget_deleted`: remove what is left of maps that are gone. It may be done again, or not at all.

It takes the map's own lock and not the segment's: the supervisor claims chunks under that one, and must not wait for a disk.

What holds after SIGKILL: a map with true bits (`map_file`). The kernel says once that it has lost written data: a worker
that is killed where it may have heard that leaves `syncing` set, and the next one, of whichever image has the file, doubts all
that is ready before it stores it. So it does when a front end has heard it (`lost`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from nydusd import points
from nydusd.errors import CacheError
from nydusd.ipc.messages import Json
from nydusd.storage.state import map_file
from nydusd.storage.state.doubts import alone, begin_sync, doubt_all, end_sync, flush, is_any_doubtful
from nydusd.storage.state.segment import READY, RECORD, Segment
from nydusd.storage.state.sharing import ready_in, segments_of
from workers.blobs import OpenBlob, OpenBlobs
from workers.failure import failure


def checkpoint(blobs: OpenBlobs, job: Json) -> Json:
    """Store what is ready now. Answer: how many chunks that is; and by name the `others` of which all that is ready is stored
    with it: their inodes, and how many chunks that is. Of a failure: `synced`, if the data is on its disk all the same, and
    only the map could not be stored.
    """
    blob = blobs.get(job)
    fd = blob.data_fd()
    with alone(fd, f"cache file {blob.spec.data_path}"):
        if is_any_doubtful(blob.segment):  # before the disk is waited for: readers may wait for this
            doubt_all(blob.segment)
        flush(fd)
        return _checkpoint(blob, fd)


def forget_deleted(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: maps, of blobs that were closed. Removes the records of those that somebody has deleted. Answer: `gone`, those."""
    return {"gone": [path for path in job["maps"] if not map_file.forget_deleted(Path(path))]}


def _checkpoint(blob: OpenBlob, fd: int) -> Json:
    """It is our turn. Raises CacheError."""
    segment = blob.segment
    if is_any_doubtful(segment):
        doubt_all(segment)
    begun = begin_sync(segment)
    # The copy is taken before the fdatasync: only what was written by then may be claimed.
    states = bytes(segment.state)
    ready, others = _claimed(segment, states, begun)

    on_disk = False

    def synced() -> None:
        nonlocal on_disk
        on_disk = True
        end_sync(segment, begun)

    points.reach("checkpoint: syncing")
    try:
        map_file.checkpoint(blob.spec.map_path, fd, ready, segment.count, segment.identity, synced)
    except map_file.UnsyncedError:
        with contextlib.suppress(CacheError):  # `syncing` stays set, for the next one
            doubt_all(segment)
        raise
    except CacheError as e:
        if not on_disk:
            raise
        return failure(e) | {"synced": True}
    answer: Json = {"stored": states.count(READY)}
    return answer | {"others": others} if others else answer


def _claimed(segment: Segment, states: bytes, begun: Collection[int]) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """The chunks that are in the data file: for this image, or for another of `begun` that says the same of them.

    Not those of 0 bytes, which the image does not describe: there may be such chunks, for others. And of each segment with the
    same table, by name, its inode and how many chunks are ready for it, all of which are among them.
    """
    found = {chunk for chunk, state in enumerate(states) if state == READY}
    same: dict[str, tuple[int, int]] = {}
    with contextlib.suppress(CacheError):  # what others have is stored by them, or next time
        for other in segments_of(segment.identity.dev, segment.identity.ino):
            if other.name != segment.name and other.inode in begun and not other.lost[0]:
                ready = list(ready_in(other, segment))
                found.update(ready)
                if ready and other.identity == segment.identity and segment.identity.layout:
                    same[other.name] = other.inode, len(ready)
    claimed = [c for c, record in enumerate(RECORD.iter_unpack(segment.records)) if record[3] and c in found]
    return claimed, same
