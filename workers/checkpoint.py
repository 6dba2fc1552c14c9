"""The job `checkpoint`: write the stored chunk map of a blob. Runs in a fetch worker; the order is in `map_file`."""

from __future__ import annotations

from nydusd.ipc.messages import Json
from nydusd.storage.state import map_file
from nydusd.storage.state.segment import READY
from workers.blobs import OpenBlobs


def checkpoint(blobs: OpenBlobs, job: Json) -> Json:
    """Store what is ready now. Answer: how many chunks that is."""
    blob = blobs.get(job)
    fd = blob.data_fd()
    segment = blob.segment
    # The copy is taken before the fdatasync: only what was written by then may be claimed.
    ready = [chunk for chunk, state in enumerate(bytes(segment.state)) if state == READY]
    with segment.lock():
        map_file.checkpoint(blob.spec.map_path, fd, ready, segment.count, segment.identity)
    return {"stored": len(ready)}
