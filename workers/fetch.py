"""The job `fetch`: bring a range of a stored blob into shared memory. Runs in a fetch worker.

Fetch workers alone talk to remote backends, so they alone hold credentials. The bytes are received straight into the region
of the job and not looked at here: a decompress worker checks every chunk. Killed in the middle, a worker leaves a region
of which nobody has been told; the one that repeats the job writes all of it.
"""

from __future__ import annotations

import time

from nydusd import points
from nydusd.errors import BackendError
from nydusd.ipc.messages import Json
from nydusd.storage.backend.base import ReadHow
from workers.blobs import OpenBlobs
from workers.failure import failure


def fetch(blobs: OpenBlobs, job: Json) -> Json:
    """Fill job["slot"] with the stored bytes from job["coff"] on. Answer: what the backend was asked for, and the error."""
    slot = job["slot"]
    # Nobody waits for what is prefetched, so its patience is the backend's own.
    deadline = None if job["prefetch"] else job["until"]
    started = time.monotonic()
    how = ReadHow(prefetch=job["prefetch"], deadline=deadline, bypass=job["bypass"], waits=False)
    with blobs.arena(slot["arena"]).view(slot["offset"], slot["length"]) as view:
        try:
            reader = blobs.get(job).reader()
            waited = reader.waited
            reader.read_into(view, job["coff"], how)
            points.reach("fetch: received")
        except BackendError as e:
            return failure(e) | {"reads": 1, "read_errors": 1, "read_bytes": 0}
    # How fast the bytes came is another matter than how far away the server is.
    took = round((time.monotonic() - started - (reader.waited - waited)) * 1000, 3)
    return {"reads": 1, "read_errors": 0, "read_bytes": slot["length"], "timed": [(slot["length"], took)]}
