"""Router: who waits for which chunk, and which jobs fetch them. The supervisor's tables, without any I/O.

A chunk is fetched by one job however many wait for it. A user's chunks become jobs at once; the chunks behind them, up to
`amplify` compressed bytes (more for a reader that goes on sequentially), follow at a lower priority, and a reader that
runs into one of those raises it. All is single-threaded; a claim ends with its job, on every path.

What holds after SIGKILL of the supervisor: state bytes are true, claims are void (`BlobCache.release_claims`), and clients
send their requests again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable

from nydusd.ipc.messages import LOST, SlotRef
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority, Request
from nydusd.storage.state.segment import VERIFY
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.slots import SlotTable

log = logging.getLogger(__name__)

_JOB_BYTES = 512 << 10
"""Plain bytes of a job: small enough that a user's miss behind one waits a few milliseconds."""
_WINDOW_MOST = 8 << 20
"""Compressed bytes that are fetched ahead of a sequential reader at most."""
_NEAR = 16
"""Chunks that a reader may skip and still count as sequential."""
_NO_ROOM_RETRY = 30.0
"""Seconds after which a full cache folder is tried again."""

Reply = Callable[[bytes, int, int, SlotRef | None], None]


class Router:
    """`reply(client, number, errno, slot)` answers a front end; `fetch` and `decompress` are the pools."""

    def __init__(
        self,
        factory: BlobFactory,
        fetch: WorkerPool,
        decompress: WorkerPool,
        slots: SlotTable,
        prefetch: PrefetchWorker,
        reply: Reply,
        amplify: int,
    ) -> None:
        self._factory = factory
        self._fetch = fetch
        self._decompress = decompress
        self._slots = slots
        self._prefetch = prefetch
        self._reply = reply
        self._amplify = amplify
        self._requests: dict[tuple[bytes, int], Request] = {}
        self._no_slot: list[Job] = []
        self.backend = {"reads": 0, "read_errors": 0, "read_bytes": 0}

    # --- what clients ask -------------------------------------------------------------------------------------

    def request(self, client: bytes, number: int, handle: int, first: int, count: int, flags: int) -> None:
        """A front end wants chunks. Asking again under the same number changes nothing."""
        if (client, number) in self._requests:
            return
        cache = self._factory.get(handle)
        if cache is None or count <= 0:
            self._reply(client, number, errno.EIO, None)
            return
        request = Request(client, number, cache, first, count, flags)
        self._requests[client, number] = request
        if cache.state == "ready":
            self._admit(request)
        else:
            self._wait_for_blob(request)

    def cancel(self, client: bytes, number: int) -> None:
        """The reader is gone. Its jobs go on: the chunks are wanted by somebody, or will be."""
        request = self._requests.pop((client, number), None)
        if request is not None:
            request.left.clear()

    def drop_client(self, client: bytes) -> None:
        """A front end has died: nobody waits for its requests, nobody holds its slots."""
        for key in [key for key in self._requests if key[0] == client]:
            self.cancel(*key)
        self._slots.drop_client(client)

    def release(self, lease: int) -> None:
        """A client has copied what it was given in shared memory."""
        self._slots.release(lease)
        self._retry_slots()

    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._requests)

    # --- opening blobs ----------------------------------------------------------------------------------------

    def open_blob(self, cache: BlobCache) -> None:
        """Have the blob prepared, unless that is done, under way, or failed too recently."""
        if not cache.may_open():
            return
        cache.state = "preparing"
        self._fetch.submit(Job("prepare", cache, Priority.USER, {}, self._opened))

    def _wait_for_blob(self, request: Request) -> None:
        cache = request.cache
        if cache.state == "failed" and not cache.may_open():
            self._finish(request, errno.EIO)
            return
        cache.waiting.append(request)
        self.open_blob(cache)

    def _opened(self, job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        waiting, cache.waiting = cache.waiting, []
        if "error" in answer:
            cache.open_failed(answer["error"])
            log.error("blob %s cannot be opened: %s", cache.spec.info.blob_id, answer["error"])
            for request in waiting:
                self._finish(request, errno.EIO)
            return
        cache.opened()
        log.info("blob %s: %d of %d chunks are in the cache", cache.spec.info.blob_id, answer["ready"], answer["count"])
        for request in waiting:
            if self._requests.get((request.client, request.number)) is request:
                self._admit(request)

    def _reopen(self, cache: BlobCache, why: str, requests: Iterable[Request]) -> None:
        """The cache file was replaced under us: open the blob anew, then serve these again."""
        if cache.state == "ready":
            log.warning("blob %s: %s; opening it again", cache.spec.info.blob_id, why)
            cache.reopen()
        for request in requests:
            request.left.clear()
            if request not in cache.waiting:
                cache.waiting.append(request)
        self.open_blob(cache)

    # --- misses -----------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        cache = request.cache
        chunks = range(request.first, request.first + request.count)
        if chunks[-1] >= cache.chunk_map.count:
            self._finish(request, errno.EIO)
            return
        if request.flags & LOST:
            request.flags &= ~LOST
            for chunk in chunks:
                cache.chunk_map.forget(chunk)
        missing = [c for c in chunks if not cache.chunk_map.is_ready(c) and not self._slots.has(cache.handle, c)]
        for chunk in missing:
            failure = cache.failure(chunk)
            if failure:
                self._finish(request, failure)
                return
        if not missing:
            self._finish(request, 0)
            return
        request.left = set(missing)
        for chunk in missing:
            cache.waiters.setdefault(chunk, []).append(request)
            job = cache.jobs.get(chunk)
            if job is not None:
                self._decompress.promote(job)
        self._start(cache, missing, Priority.USER)
        if not cache.uses_slots:
            self._read_ahead(cache, request.first, chunks[-1])

    def _read_ahead(self, cache: BlobCache, first: int, last: int) -> None:
        """Take along what follows; twice as much each time a reader goes on where the last read-ahead ended."""
        if not self._amplify:
            return
        sequential = cache.ahead_start <= first <= cache.ahead_end + _NEAR
        cache.window = max(self._amplify, min(cache.window * 2, _WINDOW_MOST)) if sequential else self._amplify
        ahead = cache.meta.ahead(last, cache.window)
        cache.ahead_start, cache.ahead_end = first, ahead[-1] if ahead else last
        self._start(cache, ahead, Priority.AHEAD)

    def _start(self, cache: BlobCache, chunks: Iterable[int], priority: Priority) -> None:
        """Claim chunks that nobody fetches, and make jobs of them."""
        if cache.uses_slots:
            free = [c for c in chunks if c not in cache.jobs]
        else:
            free = [
                c
                for c in cache.meta.with_units(c for c in chunks if c not in cache.jobs)
                if c not in cache.jobs and not cache.chunk_map.is_ready(c)
            ]
        for part in cache.meta.split(free, _JOB_BYTES):
            self._submit(cache, part, priority)

    def _submit(self, cache: BlobCache, chunks: list[int], priority: Priority) -> Job:
        job = Job("fill", cache, priority, {"verify": [], "slot": None}, self._filled, chunks)
        for chunk in chunks:
            cache.jobs[chunk] = job
        if cache.uses_slots:
            self._give_slot(job)
            return job
        states = cache.chunk_map.states()
        job.payload["verify"] = [c for c in chunks if states[c] == VERIFY]
        cache.chunk_map.check_ready_and_mark_pending(chunks)
        self._decompress.submit(job)
        return job

    def prefetch(self) -> Job | None:
        """A job for a worker that has nothing else to do."""
        while (batch := self._prefetch.take(time.monotonic())) is not None:
            cache, wanted = batch
            chunks = [c for c in cache.meta.with_units(wanted) if c not in cache.jobs]
            chunks = [c for c in chunks if not cache.chunk_map.is_ready(c) and not cache.failure(c)]
            if not chunks:
                continue
            first, *rest = cache.meta.split(chunks, _JOB_BYTES)
            for part in rest:
                self._submit(cache, part, Priority.PREFETCH)
            self._submit(cache, first, Priority.PREFETCH)
            return None  # they are queued now; the pool takes them in order
        return None

    # --- slots ------------------------------------------------------------------------------------------------

    def _give_slot(self, job: Job) -> None:
        cache = job.cache
        assert cache is not None
        length = sum(cache.meta.record(chunk).usize for chunk in job.chunks)
        if length > self._slots.size:
            self._filled(job, {"error": f"{length} bytes do not fit into the arena", "errno": errno.ENOMEM})
            return
        offset = self._slots.reserve(length)
        if offset is None:
            self._no_slot.append(job)
            return
        job.slot = (offset, length)
        job.payload["slot"] = {"arena": self._slots.arena.name, "offset": offset, "length": length}
        self._decompress.submit(job)

    def _retry_slots(self) -> None:
        waiting, self._no_slot = self._no_slot, []
        for job in waiting:
            self._give_slot(job)

    # --- results ----------------------------------------------------------------------------------------------

    def _filled(self, job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        for key in self.backend:
            self.backend[key] += answer.get(key, 0)
        if job.slot is not None:
            self._slots.place(job.slot[0], cache.handle, answer.get("placed", []))
        for chunk in job.chunks:
            cache.jobs.pop(chunk, None)
            cache.chunk_map.clear_pending(chunk)
        if answer.get("type") == "StaleCacheError":
            waiters = {id(r): r for chunk in job.chunks for r in cache.waiters.pop(chunk, [])}
            self._reopen(cache, answer["error"], [r for r in waiters.values() if r.left])
            return
        failed = {chunk: code for chunk, code, _why in answer.get("failed", [])}
        if "error" in answer:
            log.error(
                "blob %s chunks %d…%d: %s", cache.spec.info.blob_id, job.chunks[0], job.chunks[-1], answer["error"]
            )
            failed = {chunk: answer["errno"] for chunk in job.chunks if not cache.chunk_map.is_ready(chunk)}
        unstored = set(answer.get("unstored", []))
        if unstored and job.slot is None:
            self._no_room(cache, answer["why_unstored"])
        again = []
        for chunk in job.chunks:
            if chunk in failed:
                cache.failed(chunk, failed[chunk])
                self._wake(cache, chunk, failed[chunk])
            elif cache.chunk_map.is_ready(chunk) or self._slots.has(cache.handle, chunk):
                cache.succeeded(chunk)
                self._wake(cache, chunk, 0)
            elif chunk in cache.waiters:
                again.append(chunk)
        if again:
            self._start(cache, again, Priority.USER)
        if job.slot is not None:
            self._retry_slots()

    def _no_room(self, cache: BlobCache, why: str) -> None:
        if time.monotonic() >= cache.no_room_until:
            log.warning(
                "cache folder %s: %s; reads of blob %s go on uncached",
                cache.spec.work_dir,
                why,
                cache.spec.info.blob_id,
            )
        cache.no_room_until = time.monotonic() + _NO_ROOM_RETRY

    def _wake(self, cache: BlobCache, chunk: int, code: int) -> None:
        for request in cache.waiters.pop(chunk, []):
            if chunk not in request.left:
                continue
            request.left.discard(chunk)
            if code:
                self._finish(request, code)
            elif not request.left:
                self._finish(request, 0)

    def _finish(self, request: Request, code: int) -> None:
        if self._requests.pop((request.client, request.number), None) is not request:
            return
        request.left.clear()
        cache = request.cache
        slot = None
        if not code and cache.state == "ready":
            chunks = range(request.first, request.first + request.count)
            gone = [c for c in chunks if not cache.chunk_map.is_ready(c)]
            held = [c for c in gone if self._slots.has(cache.handle, c)]
            if gone and len(held) == len(gone):
                slot = self._slots.lease(request.client, cache.handle, held)
            elif gone:
                # Some of its chunks came by slot and were given up for others meanwhile: ask for those again.
                self._requests[request.client, request.number] = request
                self._admit(request)
                return
        self._reply(request.client, request.number, code, slot)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def checkpoint(self) -> int:
        """Have the maps of all blobs stored that have gained chunks; gives how many jobs are queued or under way."""
        running = 0
        for cache in self._factory.blobs():
            if cache.state != "ready" or not cache.caches:
                continue
            if not cache.checkpointing and cache.chunk_map.ready_count() != cache.stored:
                cache.checkpointing = True
                self._fetch.submit(Job("checkpoint", cache, Priority.AHEAD, {}, self._checkpointed))
            running += cache.checkpointing
        return running

    def _checkpointed(self, job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        cache.checkpointing = False
        if "stored" in answer:
            cache.stored = answer["stored"]
        elif answer.get("type") == "StaleCacheError":
            self._reopen(cache, answer["error"], [])
        else:
            cache.stored = cache.chunk_map.ready_count()
            log.warning("%s; it is tried again when more chunks are ready", answer["error"])
