"""Transfers: chunks of a remote blob, fetched by one process and decoded by another, through shared memory.

A transfer is one range request of the backend: neighbouring chunks, with small gaps between them. A fetch worker reads the
stored bytes into a region of shared memory; then they become fill jobs, those that somebody waits for first. When the
last of these is done, chunks that came damaged are fetched once more past proxies and caches, into the same region; then it
is free. Chunks that go to a cache file pass through the stage, an arena of its own, in which nothing stays: when it is full,
transfers wait in line, users' first, and what goes on makes room for them. Chunks that go to their readers in shared
memory have a region for stored and plain bytes (`Room`) before their transfer begins. So no transfer waits for a reader.

A request on which workers die is taken apart, until the one chunk that kills them is alone: its readers get an error, those of
its neighbours do not. What has a region of its own is fetched and decoded in parts there, one after the other.

What holds after SIGKILL of a worker: the pool gives its job to another, and the region belongs to the transfer, not to
the worker. A worker that is killed may have written to the region; the next one writes all of it again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nydusd.errors import CacheError, ScarceError
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.pool import ATTEMPTS, WorkerPool
from nydusd.supervisor.slots import SlotTable

log = logging.getLogger(__name__)

_FILL_BYTES = 512 << 10
"""Plain bytes of a fill job."""
MIN_REQUEST = 128 << 10
"""A request is allowed that many bytes, however few are configured."""
_SHARE = 4
"""A request of several chunks takes at most this part of the stage, so that there is room for others beside it."""

_PATIENCE = 0.25
"""Seconds that a request ahead of a reader may take: so long waits who needs its worker, or the last of its bytes."""

Filled = Callable[[Job, Answer], None]


@dataclass(eq=False, slots=True)
class _Transfer:
    """One region, and what is fetched into it: (offset, length), `at` and `size` in the stored blob.

    `used` is what chunks take of the room behind the stored bytes, `left` counts the fill jobs under way, `again` is the job
    that fetches once more what came damaged. `parts` are jobs for the same region that come one after the other: workers have
    died on all of it together.
    """

    cache: BlobCache
    generation: int
    arena: SlotTable
    staged: bool
    at: int
    size: int
    offset: int = 0
    used: int = 0
    left: int = 0
    again: Job | None = None
    parts: list[Job] | None = None


class Transfers:
    """`filled(job, answer)` is called for each fill job, and with an error for each fetch job that came to nothing.

    `count(job, answer)` is told what the backend was asked for. `deadline` (seconds) bounds the duration of a request with
    all its retries where no reader's deadline does.
    """

    def __init__(
        self,
        fetch: WorkerPool,
        decompress: WorkerPool,
        stage: SlotTable,
        filled: Filled,
        count: Filled,
        deadline: float,
    ) -> None:
        self._fetch = fetch
        self._decompress = decompress
        self._stage = stage
        self._filled = filled
        self._count = count
        self._deadline = deadline
        self._line: dict[Job, _Transfer] = {}
        self._fetching: set[Job] = set()
        self._open: set[_Transfer] = set()
        self._giving = self._again = False
        self._rate = 0.0  # bytes per second that one request gets, of late

    def request_bytes(self, cache: BlobCache, window: int = 0) -> int:
        """Bytes of a request of several chunks, as the image's `amplify` says.

        For a sequential reader his window is cut in as many as there are workers, to use them all. But a slow server gets no
        longer requests than it answers in a moment.
        """
        share = min(window // max(self._fetch.size, 1), int(self._rate * _PATIENCE))
        return self._bounded(max(cache.pace.amplify, share))

    def _bounded(self, wanted: int) -> int:
        return max(min(wanted, self._stage.size // _SHARE), MIN_REQUEST)

    def gap(self, cache: BlobCache) -> int:
        """Bytes that nobody wants and that are fetched rather than paid for with another request."""
        return max(cache.pace.amplify, MIN_REQUEST) >> 7

    def start(self, cache: BlobCache, chunks: Sequence[int], priority: Priority, limit: int = 0) -> None:
        """Fetch chunks (sorted ids, claimed by the caller) into the cache file, in as few requests of `limit` as fit."""
        limit = max(self._bounded(limit), self.request_bytes(cache, cache.ahead.window))
        for part in cache.meta.ranges(chunks, limit, self.gap(cache)):
            # Neighbours that nobody waits for come in his request if they fit, and else behind it.
            behind = priority is Priority.USER and not any(chunk in cache.waiters for chunk in part)
            self._enter(cache, part, Priority.AHEAD if behind else priority)
        self.retry()

    def _enter(self, cache: BlobCache, part: list[int], priority: Priority, attempts: int = 0) -> None:
        at, size = cache.meta.span(part)
        transfer = _Transfer(cache, cache.spec.generation, self._stage, True, at, size)
        job = self._job(transfer, part, priority)
        job.attempts = attempts
        if size > self._stage.size:
            self._refuse(
                job,
                f"{size} bytes of stored chunks need more than {self._stage.size} of shared memory: raise nydusd.arena_size",
            )
            return
        self._line[job] = transfer
        self._fetching.add(job)

    def start_in(
        self, slots: SlotTable, cache: BlobCache, chunks: list[int], region: tuple[int, int], priority: Priority
    ) -> None:
        """Fetch chunks into a region of `slots` that is held for them: the stored bytes first, the plain ones behind."""
        at, size = cache.meta.span(chunks)
        transfer = _Transfer(cache, cache.spec.generation, slots, False, at, size, region[0])
        job = self._job(transfer, chunks, priority)
        job.slot = region
        self._submit(transfer, job)

    def _job(self, transfer: _Transfer, chunks: list[int], priority: Priority, bypass: bool = False) -> Job:
        """A job that fetches the transfer's range, with the claims of its chunks."""

        def done(job: Job, answer: Answer) -> None:
            self._fetched(transfer, job, answer)

        payload: Answer = {"coff": transfer.at, "bypass": bypass}
        job = Job("fetch", transfer.cache, priority, payload, done, chunks)
        transfer.cache.jobs.update(dict.fromkeys(chunks, job))
        return job

    def _refuse(self, job: Job, why: str, more: Answer | None = None) -> None:
        self._filled(job, {"error": why, "errno": errno.ENOMEM, "type": "CacheError"} | (more or {}))

    def _submit(self, transfer: _Transfer, job: Job) -> None:
        """The region is ours: have it filled."""
        self._open.add(transfer)
        job.payload["slot"] = self._place(transfer, transfer.offset, transfer.size)
        job.payload["prefetch"] = job.priority is Priority.PREFETCH
        job.payload["until"] = self._until(job)
        self._fetching.add(job)
        self._fetch.submit(job)

    def _until(self, job: Job) -> float:
        """When nobody who waits for a job now does so any more (monotonic seconds)."""
        assert job.cache is not None
        waiters = (request for chunk in job.chunks for request in job.cache.waiters.get(chunk, ()))
        return max((request.until for request in waiters), default=time.monotonic() + self._deadline)

    @staticmethod
    def _place(transfer: _Transfer, offset: int, length: int) -> Answer:
        return {"arena": transfer.arena.arena.name, "offset": offset, "length": length}

    def promote(self, job: Job) -> None:
        """Somebody waits for this job now."""
        if job not in self._line:
            if self._fetch.promote(job):
                job.payload["prefetch"] = False
        elif job.priority is not Priority.USER:
            job.priority = Priority.USER
            self._line[job] = self._line.pop(job)

    def cancel(self, cache: BlobCache) -> None:
        """The transfers of this blob that stand in line are void; they hold nothing. (The pools end the others.)"""
        for job in [job for job, transfer in self._line.items() if transfer.cache is cache]:
            del self._line[job]
            self._fetching.discard(job)

    def may_prefetch(self) -> bool:
        """Whether more may be prefetched now."""
        return not self._line and self._has_spare_worker()

    def _has_spare_worker(self) -> bool:
        """Whether there is nothing better to fetch, and would still be a worker left over for a user who may come."""
        idle = all(job.priority is Priority.PREFETCH for job in self._fetching)
        return idle and len(self._fetching) - len(self._line) < max(self._fetch.size - 1, 1)

    def waiting(self) -> int:
        """Transfers that stand in line for room."""
        return len(self._line)

    def retry(self) -> None:
        """Give those in line their regions, users' first, as long as there is room."""
        self._again = True
        if self._giving:  # what has come of one of them: whoever gives goes on
            return
        self._giving = True
        try:
            while self._again and self._line:
                self._again = False
                self._give_regions()
        finally:
            self._giving = False

    def _give_regions(self) -> None:
        for priority in Priority:
            for job in [job for job in self._line if job.priority is priority]:
                transfer = self._line.get(job)
                if transfer is None:  # ended by what came of another
                    continue
                if priority is Priority.PREFETCH and not self._has_spare_worker():
                    return
                try:
                    offsets = self._stage.reserve([transfer.size])
                except CacheError as e:
                    del self._line[job]
                    self._fetching.discard(job)
                    if not isinstance(e, ScarceError):
                        self._refuse(job, str(e))
                    elif transfer.size <= MIN_REQUEST or not self._enter_parts(transfer.cache, job, job.attempts):
                        self._refuse(job, str(e), {"type": ScarceError.__name__, "retry_after": 0.0})
                    continue
                if offsets is None:
                    return
                del self._line[job]
                (transfer.offset,) = offsets
                self._submit(transfer, job)

    def _enter_parts(self, cache: BlobCache, job: Job, attempts: int) -> bool:
        """Have parts of a request stand in line instead, what somebody waits for first. False if it cannot be parted."""
        wanted = {chunk for chunk in job.chunks if chunk in cache.waiters}
        parts = self._parted(cache, job.chunks, wanted)
        if len(parts) < 2:
            return False
        for part in parts:
            behind = job.priority is Priority.USER and wanted.isdisjoint(part)
            self._enter(cache, part, Priority.AHEAD if behind else job.priority, attempts)
        self.retry()
        return True

    def _fetched(self, transfer: _Transfer, job: Job, answer: Answer) -> None:
        """A fetch job is done, or void, or has failed."""
        self._fetching.discard(job)
        self._count(job, answer)
        if job.cancelled:
            self._void(transfer, job)
        elif "error" in answer:
            self._failed(transfer, job, answer)
        else:
            for length, milliseconds in answer["timed"]:
                rate = length / max(milliseconds / 1000, 1e-3)
                self._rate = rate if not self._rate else (3 * self._rate + rate) / 4
            self._fill(transfer, job)
        self.retry()

    def _failed(self, transfer: _Transfer, job: Job, answer: Answer) -> None:
        if job.payload["prefetch"] and job.priority is not Priority.PREFETCH:
            # It was tried with little patience, and now somebody waits.
            self._submit(transfer, job)
            return
        if not transfer.staged:
            if not self._take_apart(transfer, job, answer):
                self._filled(job, answer)
            self._next(transfer)
            return
        self._end(transfer)
        died = answer.get("type") == "WorkerDied"
        # The stored blob is too short: what is asked for may be in front of its end, if its neighbours are not.
        # Or one of them kills workers: find out which.
        alone = died or answer.get("type") == "RangeNotSatisfiableError"
        if not (alone and self._enter_parts(transfer.cache, job, ATTEMPTS - 1 if died else 0)):
            self._filled(job, answer)

    def _take_apart(self, transfer: _Transfer, job: Job, answer: Answer) -> bool:
        """Workers have died on a job with a region of its own: have its halves fetched alone. False if it is not so."""
        parts = self._parted(transfer.cache, job.chunks, set()) if answer.get("type") == "WorkerDied" else []
        if len(parts) < 2 or job.slot is None:
            return False
        jobs = [self._job(transfer, part, job.priority) for part in parts]
        for each in jobs:
            each.slot, each.attempts = job.slot, ATTEMPTS - 1
            transfer.arena.hold(job.slot[0])
        transfer.arena.drop(job.slot[0])
        transfer.parts = [*jobs, *(transfer.parts or ())]
        return True

    @staticmethod
    def _parted(cache: BlobCache, chunks: list[int], wanted: set[int]) -> list[list[int]]:
        """Two parts to fetch alone: what somebody waits for and the rest, or halves; one if it cannot be parted."""
        units = cache.meta.split(chunks, 0)
        mine = [unit for unit in units if not wanted.isdisjoint(unit)]
        half = mine if 0 < len(mine) < len(units) else units[: len(units) // 2]
        parts = [[chunk for unit in units if (unit in half) is side for chunk in unit] for side in (True, False)]
        return [part for part in parts if part]

    def _fill(self, transfer: _Transfer, job: Job) -> None:
        """The stored bytes are there: have them decoded."""
        cache = transfer.cache
        if not transfer.staged:
            self._fill_part(transfer, job, job.chunks, job.priority, 0 if transfer.parts is None else ATTEMPTS - 1)
            return
        units = set(cache.meta.with_units(chunk for chunk in job.chunks if chunk in cache.waiters))
        later = Priority.AHEAD if job.priority is Priority.USER else job.priority
        parts = [(p, Priority.USER) for p in cache.meta.split([c for c in job.chunks if c in units], _FILL_BYTES)]
        parts += [(p, later) for p in cache.meta.split([c for c in job.chunks if c not in units], _FILL_BYTES)]
        for part, priority in parts:
            self._fill_part(transfer, job, part, priority)

    def _fill_part(self, transfer: _Transfer, job: Job, part: list[int], priority: Priority, attempts: int = 0) -> None:
        def done(fill: Job, answer: Answer) -> None:
            self._decoded(transfer, job, fill, answer)

        source = job.payload["slot"] | {"coff": job.payload["coff"], "final": job.payload["bypass"]}
        target = None
        if job.slot is not None:
            taken = transfer.size + transfer.used
            target = self._place(transfer, transfer.offset + taken, job.slot[1] - taken)
        payload: Answer = {"verify": [], "slot": target, "source": source}
        fill = Job("fill", transfer.cache, priority, payload, done, part, job.slot, attempts=attempts)
        transfer.cache.jobs.update(dict.fromkeys(part, fill))
        transfer.left += 1
        self._decompress.submit(fill)

    def _decoded(self, transfer: _Transfer, fetched: Job, fill: Job, answer: Answer) -> None:
        """A fill job is done, or void, or has failed."""
        cache = transfer.cache
        parts = cache.meta.split(fill.chunks, 0) if answer.get("type") == "WorkerDied" and transfer.staged else []
        if len(parts) > 1:
            for part in parts:  # one of them kills workers: find out which
                self._fill_part(transfer, fetched, part, fill.priority, ATTEMPTS - 1)
            transfer.left -= 1
            return
        if not transfer.staged and self._take_apart(transfer, fill, answer):
            transfer.left -= 1
            self._next(transfer)
            return
        transfer.used += sum(length for _chunk, _at, length in answer.get("placed", []))
        corrupt = set() if fill.cancelled else set(answer.get("corrupt", []))
        if corrupt:
            if transfer.again is None:
                transfer.again = self._job(transfer, [], fill.priority, bypass=True)
                transfer.again.slot = fill.slot
                if fill.slot is not None:
                    transfer.arena.hold(fill.slot[0])
            again = transfer.again
            again.chunks = sorted([*again.chunks, *corrupt])
            again.priority = min(again.priority, fill.priority)
            cache.jobs.update(dict.fromkeys(corrupt, again))
            fill.chunks = [chunk for chunk in fill.chunks if chunk not in corrupt]
        self._filled(fill, answer)
        transfer.left -= 1
        if not transfer.left:
            self._next(transfer)

    def _next(self, transfer: _Transfer) -> None:
        """All that was fetched is decoded: fetch once more what was damaged, or the next part, or be done."""
        job, transfer.again = transfer.again, None
        if job is None and transfer.parts:
            job = transfer.parts.pop(0)
        if job is None:
            self._end(transfer)
        elif transfer.generation != transfer.cache.spec.generation:
            self._void(transfer, job)
        else:
            at, size = transfer.cache.meta.span(job.chunks)
            job.payload["coff"] = at
            job.payload["slot"] = self._place(transfer, transfer.offset, size)
            job.payload["prefetch"] = False
            job.payload["until"] = self._until(job)
            self._fetching.add(job)
            self._fetch.submit(job)

    def _void(self, transfer: _Transfer, job: Job) -> None:
        """The blob was opened anew: this job and what was to come after it are nobody's."""
        jobs, transfer.parts = [job, *(transfer.parts or ())], None
        self._end(transfer)
        for each in jobs:
            each.cancelled = True
            self._filled(each, {})

    def _end(self, transfer: _Transfer) -> None:
        """Give a region of the stage back. (What is held for readers is given back with its job, by `filled`.)"""
        self._open.discard(transfer)
        if transfer.staged:
            self._stage.drop(transfer.offset)
            self.retry()
