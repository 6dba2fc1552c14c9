"""BlobCache: one blob in a cache, as the supervisor knows it. It holds no data; it knows what is there and what is asked for.

A blob is opened by the job `prepare`; until its segment is there, requests wait. When the cache file is replaced, deleted or
truncated by somebody, the blob is opened anew under the next generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nydusd.errors import InternalError, NydusError
from nydusd.storage.cache.ahead import ReadAhead
from nydusd.storage.cache.backend_counts import BackendCounts
from nydusd.storage.cache.meta_info import BlobMetaInfo
from nydusd.storage.cache.pace import DEFAULT_PACE, Pace
from nydusd.storage.cache.requests import Job, Request
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state.chunk_map import ChunkMap
from nydusd.storage.state.names import inode_of, remove
from nydusd.storage.state.segment import Segment

_BACK_OFF, _POISON, _OUTAGE = (0.1, 5.0), (60.0, 3600.0), (0.5, 0.5)
_PREPARE_FIRST, _PREPARE_MOST = 1.0, 30.0
_REACH_FIRST, _REACH_MOST = 0.1, 4.0


@dataclass(slots=True)
class PrefetchCounts:
    """What was fetched of a blob before anybody asked: `bytes` are stored ones, times seconds since 1970 (0: never)."""

    requests: int = 0
    chunks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    began: float = 0.0
    ended: float = 0.0


class BlobCache:
    """A blob as one image's metadata describes it; mounts of that image share it (`users` counts them).

    `kin` are all caches of this daemon that use the same cache file, this one included: other images' with the same blob, and
    those under another configuration.
    """

    def __init__(self, spec: BlobSpec) -> None:
        self.spec = spec
        self.server = spec.server
        self.users = 0
        self.paces: list[Pace] = []  # of the mounts that use it, in the order of their mounting
        self.backend = BackendCounts()
        self.prefetch = PrefetchCounts()
        self.inherits = bool(inode_of(spec.segment))  # a killed daemon left what `prepare` will take over
        self.state = "new"  # new, preparing, ready, failed
        self.lost = False  # its cache file was taken from under it, and nobody has asked for it since
        self.reason: str | None = None
        self.outage = ""  # why readers wait
        self.lacks = False  # not for the backend, but for file descriptors or memory here
        self.unreachable = False  # it failed because its backend could not be reached: readers wait
        self.scarce = False  # or because there were no file descriptors or no memory here
        self.segment: Segment | None = None
        self.waiting: list[Request] = []
        self.jobs: dict[int, Job] = {}
        self.waiters: dict[int, list[Request]] = {}
        self.stored = 0  # ready chunks at the last checkpoint, -1: not known
        self.checkpointing = False  # or chunks are being taken out: never both
        self.syncs: list[Callable[[int], None]] = []  # told (an errno) of the next checkpoint that begins
        self.pinned = False  # the kernel reads the cache file by itself: nothing may be taken out
        self.spared = False  # somebody reads by its segment who outlives us
        self.prefetch_at = self.prefetch_delay = 0.0  # not before: no backend could be reached, or there was no room
        self.no_room_until = 0.0  # 0: the cache folder could be used the last time
        self.no_room_why = ""
        self.kin: list[BlobCache] = [self]
        self.followers: dict[int, list[Job]] = {}  # jobs of kin that wait for a chunk that is fetched for this one
        self.ahead = ReadAhead()
        self._failures: dict[int, tuple[int, float, float]] = {}
        self.retry_at = 0.0  # when a failed blob may be opened again
        self._retry_delay = 0.0

    @property
    def handle(self) -> int:
        return self.spec.handle

    @property
    def pace(self) -> Pace:
        """How fast is fetched ahead: as the image says that was mounted last."""
        return self.paces[-1] if self.paces else DEFAULT_PACE

    def leave(self, pace: Pace) -> None:
        """A mount is gone that had this pace. Where it was the last one it holds on, for what still reads or fetches."""
        if len(self.paces) > 1:
            self.paces.remove(pace)

    @property
    def caches(self) -> bool:
        """Whether data goes to a cache file (not with the dummy cache)."""
        return self.spec.work_dir is not None

    @property
    def remote(self) -> bool:
        """Whether stored bytes come by a fetch worker."""
        return self.spec.remote

    @property
    def uses_slots(self) -> bool:
        """Whether data must travel in shared memory now: dummy cache, or no room in the cache folder."""
        return not self.caches or time.monotonic() < self.no_room_until

    def others(self) -> list[BlobCache]:
        """The kin that is open and has the very same cache file now."""
        if len(self.kin) == 1 or self.state != "ready" or self.segment is None:
            return []
        file = self.segment.identity.file
        found = (c for c in self.kin if c is not self and c.state == "ready" and c.segment is not None)
        return [c for c in found if c.segment is not None and file[1] and c.segment.identity.file == file]

    def opened(self) -> None:
        """The job `prepare` has published the segment. Raises NydusError or OSError when it cannot be mapped."""
        segment = Segment.open(self.spec.segment)
        if segment is None:
            raise InternalError(f"segment {self.spec.segment} was reported and is not there")
        segment.lock()  # opened now: later there may be no file descriptor for it
        if self.segment is not None:
            # Its maker did so before; but one of another release, killed over a segment that this one has replaced since, not.
            if self.segment.inode != segment.inode and self.segment.identity.file == segment.identity.file:
                self.segment.retire()
            self.segment.close()
        segment.clock[0] = int(time.monotonic())  # what is asked for from now on is not old
        self.segment = segment
        self.chunk_map = ChunkMap(segment)
        self.meta = BlobMetaInfo(segment)
        # Some of them may come from the segment of a daemon that was killed before it could store its map.
        self.stored = -1 if self.chunk_map.ready_count() else 0
        self.state, self.reason, self.lost = "ready", None, False
        self._retry_delay = 0.0

    def take_over(self) -> None:
        """Go on with the segment of a daemon that was killed: what it had claimed is free. All its workers are gone.

        One that is missing, retired or cannot be used stays to be prepared, like that of a new blob.
        """
        try:
            self.opened()
        except (NydusError, OSError):
            return
        assert self.segment is not None
        self.segment.lock().reset()  # only supervisors take it, and the former one is dead
        if self.segment.retired:
            self.state = "new"  # a worker was about to replace it
        self.segment.dirty[0] = 1  # a daemon of another release may not have said so
        self.spec = replace(self.spec, generation=self.segment.generation)
        self.chunk_map.end_claims()

    def open_failed(self, reason: str, retry_after: float | None = None) -> None:
        """The job `prepare` failed; readers get EIO until it may be tried again (1 s, doubling to 30 s).

        With `retry_after` the backend could not be reached: readers wait (0.1 s, doubling to 4 s, and so many seconds).
        """
        self.state, self.reason, self.unreachable = "failed", reason, retry_after is not None
        first, most = (_REACH_FIRST, _REACH_MOST) if self.unreachable else (_PREPARE_FIRST, _PREPARE_MOST)
        self._retry_delay = min(max(self._retry_delay * 2, first), most)
        self.retry_at = time.monotonic() + max(self._retry_delay, retry_after or 0.0)

    def may_open(self) -> bool:
        return self.state == "new" or (self.state == "failed" and time.monotonic() >= self.retry_at)

    def reopen(self) -> None:
        """The cache file is not what we opened: the next `prepare` makes a new segment. All claims end here."""
        self.spec = replace(self.spec, generation=self.spec.generation + 1)
        self.state, self.lost = "new", True
        self.ahead.forget()
        self.syncs.clear()  # who waits for these asks again
        self.jobs.clear()
        self.waiters.clear()

    def give(self, cookie: tuple[int, int]) -> None:
        """The kernel's file of the blob is open, see `BlobSpec.cookie`: the next `prepare` looks what is in it."""
        self.spec = replace(self.spec, cookie=cookie)
        self.no_room_until = self.retry_at = 0.0

    def configure(self, backend_config: dict[str, Any]) -> None:
        """Have the backend asked with other settings from the next job on; what has failed with the old ones may go well."""
        self.spec = replace(self.spec, backend_config=backend_config)
        self.server = self.spec.server
        self.retry_at = 0.0
        self._failures.clear()

    def failed(self, chunk: int, errno: int, *, poison: bool = False, outage: bool = False) -> None:
        """Remember a failure: new readers get it at once until the back-off is over (100 ms, doubling to 5 s).

        `poison`: workers died on it, which must not go on (1 min, doubling to 1 h). `outage`: readers have waited for the
        backend long enough; the kernel, which asks once more for what a read-ahead did not get, is not to wait again (500 ms).
        """
        first, most = _POISON if poison else _OUTAGE if outage else _BACK_OFF
        _, _, delay = self._failures.get(chunk, (0, 0.0, 0.0))
        delay = min(max(delay * 2, first), most)
        self._failures[chunk] = (errno, time.monotonic() + delay, delay)

    def succeeded(self, chunk: int) -> None:
        self._failures.pop(chunk, None)

    def failure(self, chunk: int) -> int:
        """errno of a failure that is still fresh, else 0."""
        errno, until, _ = self._failures.get(chunk, (0, 0.0, 0.0))
        return errno if time.monotonic() < until else 0

    def close(self) -> None:
        """Unmap and remove the segment, if it is not spared."""
        if self.segment is not None:
            self.segment.close()
            self.segment = None
        if not self.spared:
            remove(self.spec.segment)
