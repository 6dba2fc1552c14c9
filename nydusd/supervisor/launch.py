"""Launch: makes jobs of chunks that nobody fetches yet, with what is to be taken along. Used by the router alone.

A local blob's chunks are read by the worker that decodes them; a remote one's are fetched first (`Transfers`), unless the
cache file may hold them already. A claim is made with its job and ends with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence

from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.state.segment import VERIFY
from nydusd.supervisor.kin import FOLLOW, Kin
from nydusd.supervisor.pool import ATTEMPTS, WorkerPool
from nydusd.supervisor.slots import SlotTable
from nydusd.supervisor.transfers import Transfers

_JOB_BYTES = 512 << 10
"""Plain bytes of a job: small enough that a user's miss behind one waits a few milliseconds."""
_WINDOW_MOST = 8 << 20
"""Compressed bytes that are fetched ahead of a sequential reader at most (or `Pace.amplify`, if that is more)."""
_WINDOW_REMOTE = 16 << 20
"""The same over a network, by several requests at once, so that round trips overlap."""
_GROWTH_REMOTE = 4
"""What a window there is multiplied with each time: a reader waits for round trips as long as it is small."""

Done = Callable[[Job, Answer], None]


class Launch:
    """`filled(job, answer)` is called when chunks of a job have come, or have not. For the rest see `Router`."""

    def __init__(
        self,
        fetch: WorkerPool,
        decompress: WorkerPool,
        slots: SlotTable,
        stage: SlotTable,
        prefetch: PrefetchWorker,
        filled: Done,
        count: Done,
        deadline: float,
        kin: Kin,
    ) -> None:
        self._kin = kin
        self._fetch = fetch
        self._decompress = decompress
        self._slots = slots
        self._prefetch = prefetch
        self._filled = filled
        self.transfers = Transfers(fetch, decompress, stage, filled, count, deadline)

    def miss(self, cache: BlobCache, missing: list[int]) -> None:
        """A user waits for these chunks, some of which may be on their way.

        Over a network a request costs a round trip, so neighbours come in the same one. From a file they come behind it.
        """
        joined: list[int] = []
        if cache.remote:
            joined, _ = cache.meta.ahead(missing[-1], cache.pace.amplify - cache.meta.span(missing)[1])
        self._start(cache, [*missing, *_hopeful(cache, joined)], Priority.USER, missing if cache.pinned else ())

    def read_ahead(self, cache: BlobCache, first: int, last: int) -> None:
        """A reader is at these chunks: take along what follows, more and more for one that goes on and on."""
        if amplify := cache.pace.amplify:
            most, growth = (_WINDOW_REMOTE, _GROWTH_REMOTE) if cache.remote else (_WINDOW_MOST, 2)
            ahead = cache.ahead.plan(cache.meta, first, last, amplify, most, growth)
            self._start(cache, _hopeful(cache, ahead), Priority.AHEAD)

    def prefetch(self) -> Iterable[BlobCache]:
        """Submit jobs for an idle worker, if there is anything to prefetch; else the blobs that must be open for that."""
        while (batch := self._prefetch.take(time.monotonic(), self._may_prefetch)) is not None:
            cache, wanted = batch
            before = self._decompress.queued()
            self._start(cache, _hopeful(cache, wanted), Priority.PREFETCH)
            if self._decompress.queued() > before and not cache.remote:
                return ()
        return list(self._prefetch.aside())

    def _may_prefetch(self, cache: BlobCache) -> bool:
        return not cache.remote or self.transfers.may_prefetch()

    def promote(self, job: Job) -> None:
        """A reader waits for this job now."""
        if job.kind == FOLLOW:
            job.priority = Priority.USER
            if (leader := self._kin.leader(job)) is not None:
                self.promote(leader)
        elif job.kind == "fetch":
            self.transfers.promote(job)
        elif job.kind == "evict":
            self._fetch.promote(job)
        else:
            self._decompress.promote(job)

    def cancel(self, cache: BlobCache) -> None:
        """What is not yet given to a pool is void."""
        self.transfers.cancel(cache)

    def retry(self) -> None:
        """Shared memory may have become free."""
        self.transfers.retry()

    def _start(self, cache: BlobCache, chunks: Iterable[int], priority: Priority, needed: Collection[int] = ()) -> None:
        """Make jobs of those chunks that nobody fetches, and of what is decoded with them.

        Chunks that no file of the image refers to are left out, but for those that are `needed`: they cannot be checked, and
        others may have them in the file.
        """
        free = cache.meta.with_units(chunk for chunk in chunks if chunk not in cache.jobs)
        free = [chunk for chunk in free if chunk in needed or cache.meta.is_listed(chunk)]
        self._kin.take(cache, free)
        self._kin.follow(cache, free, priority)
        free = [chunk for chunk in free if chunk not in cache.jobs and not cache.chunk_map.is_ready(chunk)]
        if not cache.remote:
            for part in cache.meta.split(free, _JOB_BYTES):
                self.fill(cache, part, priority)
            return
        states = cache.chunk_map.states()
        found = [chunk for chunk in free if states[chunk] == VERIFY]
        for part in cache.meta.split(found, _JOB_BYTES):
            self.fill(cache, part, priority, done=self._verified)
        absent = [chunk for chunk in free if chunk not in cache.jobs]
        cache.chunk_map.check_ready_and_mark_pending(absent)
        limit = cache.pace.batch_size * 2 if priority is Priority.PREFETCH else 0  # a batch is one request
        self.transfers.start(cache, absent, priority, limit)

    def fill(
        self, cache: BlobCache, chunks: list[int], priority: Priority, attempts: int = 0, done: Done | None = None
    ) -> None:
        """Claim chunks and have them stored in the cache file; those of a remote blob only if they are there already."""
        states = cache.chunk_map.states()
        payload: Answer = {"verify": [c for c in chunks if states[c] == VERIFY], "slot": None, "source": None}
        cache.chunk_map.check_ready_and_mark_pending(chunks)
        self._submit(Job("fill", cache, priority, payload, done or self._filled, chunks, attempts=attempts))

    def _verified(self, job: Job, answer: Answer) -> None:
        """What was found in the cache file was looked at: fetch what was not good."""
        cache = job.cache
        assert cache is not None
        if job.cancelled or answer.get("type") == "StaleCacheError" or "retry_after" in answer:
            self._filled(job, answer)
            return
        bad = [chunk for chunk in job.chunks if not cache.chunk_map.is_ready(chunk)]
        job.chunks = [chunk for chunk in job.chunks if cache.chunk_map.is_ready(chunk)]
        self.transfers.start(cache, bad, job.priority)
        self._filled(job, {})

    def cut(self, cache: BlobCache, chunks: Sequence[int]) -> list[tuple[list[int], int]]:
        """Chunks that are to go into shared memory, cut into jobs, with the room that each needs.

        That is for the plain bytes, and in front of them for the stored ones of a remote blob.
        """
        meta = cache.meta
        if cache.remote:
            parts = meta.ranges(chunks, self.transfers.request_bytes(cache), self.transfers.gap(cache))
            return [(part, meta.plain_bytes(part) + meta.span(part)[1]) for part in parts]
        return [(part, meta.plain_bytes(part)) for part in meta.split(chunks, _JOB_BYTES)]

    def start_in(self, cache: BlobCache, chunks: list[int], region: tuple[int, int]) -> None:
        """Start the job for a part that `cut` gave, in its region (offset, length)."""
        if cache.remote:
            self.transfers.start_in(self._slots, cache, chunks, region, Priority.USER)
            return
        slot = {"arena": self._slots.arena.name, "offset": region[0], "length": region[1]}
        payload: Answer = {"verify": [], "slot": slot, "source": None}
        self._submit(Job("fill", cache, Priority.USER, payload, self._filled, chunks, region))

    def part(self, job: Job, answer: Answer) -> bool:
        """Workers died on a job of `start_in`: have its chunks filled one by one, to find out on which. False if not so."""
        cache = job.cache
        assert cache is not None
        if answer.get("type") != "WorkerDied" or job.slot is None or cache.remote or job.cancelled:
            return False
        parts = cache.meta.split(job.chunks, 0)
        if len(parts) < 2:
            return False
        at = job.slot[0]
        for part in parts:
            self._slots.hold(job.slot[0])
            length = cache.meta.plain_bytes(part)
            payload = job.payload | {"slot": job.payload["slot"] | {"offset": at, "length": length}}
            self._submit(Job("fill", cache, job.priority, payload, self._filled, part, job.slot, attempts=ATTEMPTS - 1))
            at += length
        self._slots.drop(job.slot[0])
        return True

    def _submit(self, job: Job) -> None:
        assert job.cache is not None
        job.cache.jobs.update(dict.fromkeys(job.chunks, job))
        self._decompress.submit(job)


def _hopeful(cache: BlobCache, chunks: Iterable[int]) -> list[int]:
    """Those that have not failed a moment ago."""
    return [chunk for chunk in chunks if not cache.failure(chunk)]
