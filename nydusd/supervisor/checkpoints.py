"""Checkpoints: when which blob's chunk map is stored on disk. Tables of the supervisor; the work is a job of a fetch worker.

What holds after SIGKILL: state bytes in shared memory are true, and the next daemon's `prepare` takes them over.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.uncached import note_room

log = logging.getLogger(__name__)

_REST = 0.1
"""Seconds at least between two syncs that do not wait for a round."""


class Checkpoints:
    """`reopen(cache, why)` is called when a cache file turns out to be another one."""

    def __init__(self, factory: BlobFactory, fetch: WorkerPool, reopen: Callable[[BlobCache, str], None]) -> None:
        self._factory = factory
        self._fetch = fetch
        self._reopen = reopen
        self._early: dict[BlobCache, None] = {}
        """Blobs of which somebody waits for a sync, in the order in which they asked."""
        self._begun: tuple[BlobCache, float] | None = None
        """The one of them that is synced now, and since when."""
        self._rest_until = 0.0

    def start(self) -> int:
        """Have the maps of all blobs stored that have gained chunks; gives how many jobs that matter for it are not done."""
        running = 0
        for cache in self._factory.blobs():
            # What a killed daemon left is known only when the blob is open: a stop must not be faster.
            running += cache.state == "preparing" and cache.inherits
            running += self.store(cache)
        return running

    def store(self, cache: BlobCache, priority: Priority = Priority.AHEAD) -> bool:
        """Have the map of a blob stored if it has gained chunks; whether that is under way."""
        if cache.state != "ready" or cache.spec.data_path is None:
            return False
        if not cache.checkpointing and (cache.syncs or cache.chunk_map.ready_count() != cache.stored):
            if not cache.syncs and _is_under_way(cache):
                return True
            cache.checkpointing = True
            told, cache.syncs = cache.syncs, []
            self._fetch.submit(Job("checkpoint", cache, priority, {}, partial(self._done, told)))
        return cache.checkpointing

    def sync(self, cache: BlobCache, told: Callable[[int], None], *, at_once: bool) -> None:
        """Call `told` with 0 once all that is ready now is on its disk, with an errno if that is not known; or never.

        Unless it must be `at_once`, what is new waits for its turn (`tick`): a disk is not to be synced for each range that
        becomes complete.
        """
        if cache.state != "ready" or cache.spec.data_path is None:
            told(errno.EIO)
            return
        cache.syncs.append(told)
        if at_once or cache.stored in (-1, cache.chunk_map.ready_count()):
            self.store(cache, Priority.USER if at_once else Priority.AHEAD)  # readers may wait for it
        if cache.syncs:  # also if another is under way, which has begun before this
            self._early[cache] = None

    def resume(self) -> None:
        """After a takeover: have done what a worker of the former daemon was killed in. Until then readers may wait for it."""
        for cache in self._factory.blobs():
            if cache.state == "ready" and cache.segment is not None and cache.segment.syncing[0]:
                self.sync(cache, lambda _code: None, at_once=True)

    def tick(self, now: float) -> None:
        """Begin with what somebody waits for: one blob at a time, and with as long a rest after it as it took.

        So whatever is read, disks have half of the time for others, and one worker at most has nothing else to do.
        """
        if self._begun is not None or now < self._rest_until:
            return
        for cache in list(self._early):
            if cache.checkpointing and cache.syncs:
                continue
            del self._early[cache]
            if cache.syncs and self.store(cache):
                self._begun = cache, now
                return

    def wait(self, now: float) -> float | None:
        """Seconds until `tick` has something to do, None if that is not known."""
        if self._begun is not None or not any(not cache.checkpointing for cache in self._early):
            return None
        return max(0.0, self._rest_until - now)

    def _done(self, told: Iterable[Callable[[int], None]], job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        cache.checkpointing = False
        if self._begun is not None and self._begun[0] is cache:
            now = time.monotonic()
            self._rest_until = now + max(now - self._begun[1], _REST)
            self._begun = None
        on_disk = ("stored" in answer or answer.get("synced", False)) and not job.cancelled
        for tell in told:
            tell(0 if on_disk else errno.EIO)
        if job.cancelled:
            return
        if "stored" in answer:
            cache.stored = answer["stored"]
            # One map is of all images with this blob: there may be hundreds. (Of a release before ours: of this one alone.)
            others = answer.get("others", {})
            for other in cache.kin if others else ():
                inode, stored = others.get(other.spec.segment, (0, 0))
                if other.state == "ready" and other.segment is not None and other.segment.inode == inode:
                    other.stored = stored
        elif answer.get("type") == "StaleCacheError":
            self._reopen(cache, answer["error"])
        else:
            if answer.get("type") == "UnsyncedError":
                note_room(cache, answer["error"])
            # One that another process was in the way of, or that has left something doubtful, is made again in the next round.
            again = answer.get("errno") == errno.EAGAIN or (cache.segment is not None and cache.segment.is_doubtful)
            cache.stored = -1 if again else cache.chunk_map.ready_count()
            log.warning("%s; it is tried again when more chunks are ready", answer["error"])


def _is_under_way(cache: BlobCache) -> bool:
    """Whether the same map is being stored for another image with the same table, and perhaps all there is to be stored."""
    segment = cache.segment
    return segment is not None and any(
        other.checkpointing and other.segment is not None and other.segment.identity == segment.identity
        for other in cache.kin
    )
