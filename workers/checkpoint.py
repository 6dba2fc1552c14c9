"""The job `checkpoint`: write the stored chunk map of a blob. Runs in a fetch worker; the order is in `map_file`.

It takes the map's own lock and not the segment's: the supervisor claims chunks under that one, and must not wait for a disk.
"""

from __future__ import annotations

from nydusd.formats.model import ChunkFlag
from nydusd.ipc.messages import Json
from nydusd.storage.state import map_file
from nydusd.storage.state.segment import EMPTY, READY, VERIFY, Segment
from workers.blobs import OpenBlobs


def checkpoint(blobs: OpenBlobs, job: Json) -> Json:
    """Store what is ready now. Answer: how many chunks that is."""
    blob = blobs.get(job)
    fd = blob.data_fd()
    segment = blob.segment
    # The copy is taken before the fdatasync: only what was written by then may be claimed.
    ready = [chunk for chunk, state in enumerate(bytes(segment.state)) if state == READY]
    try:
        map_file.checkpoint(blob.spec.map_path, fd, ready, segment.count, segment.identity)
    except map_file.UnsyncedError:
        _doubt(segment, ready)
        raise
    return {"stored": len(ready)}


def _doubt(segment: Segment, chunks: list[int]) -> None:
    """The kernel may have dropped written pages, and will not say so again: nothing is ready before its digest was checked."""
    for chunk in chunks:
        checkable = segment.record(chunk).flags & (ChunkFlag.DIGEST | ChunkFlag.CRC)
        segment.state[chunk] = VERIFY if checkable else EMPTY
