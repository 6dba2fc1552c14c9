"""Router: who waits for which chunk, and which jobs fetch them. The supervisor's tables, without any I/O.

A chunk is fetched by one job however many wait for it. A user's chunks become jobs at once; the chunks behind them, up to
`Pace.amplify` compressed bytes (more for a reader that goes on sequentially), follow at a lower priority, and a reader that
runs into one of those raises it. Chunks of a local blob are read by the worker that decodes them, those of a remote one
are fetched first (`Transfers`). All is single-threaded; a claim ends with its job, on every path.

What holds after SIGKILL of the supervisor: state bytes are true, claims died with the segment that held them (`prepare`
builds a new one), and clients send their requests again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from nydusd import points
from nydusd.errors import CacheError, ScarceError
from nydusd.ipc.messages import AHEAD, LOST, SYNC, UNREADABLE, SlotRef
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Answer, Job, Priority, Request
from nydusd.storage.cache.spec import NO_COOKIE
from nydusd.supervisor.checkpoints import Checkpoints
from nydusd.supervisor.evictions import Evictions
from nydusd.supervisor.kin import FOLLOW, Kin
from nydusd.supervisor.launch import Launch
from nydusd.supervisor.openings import Openings
from nydusd.supervisor.outages import Outages
from nydusd.supervisor.outcomes import AGAIN, outcomes
from nydusd.supervisor.pool import ATTEMPTS, WorkerPool
from nydusd.supervisor.room import Room
from nydusd.supervisor.slots import SlotTable
from nydusd.supervisor.uncached import note_room, note_unreadable

log = logging.getLogger(__name__)

_ROUNDS = 20
"""How often a request may start over before it fails: a cache folder that is replaced all the time ends here."""

Reply = Callable[[bytes, int, int, SlotRef | None], None]


class Router:
    """`reply(client, number, errno, slot)` answers a front end; `fetch` and `decompress` are the pools.

    `slots` is for chunks on their way to readers, `stage` for stored bytes on their way to a cache file. Readers wait
    `deadline` seconds for a backend that cannot be reached, and a request of it takes as long at most.
    """

    def __init__(
        self,
        factory: BlobFactory,
        fetch: WorkerPool,
        decompress: WorkerPool,
        slots: SlotTable,
        stage: SlotTable,
        prefetch: PrefetchWorker,
        reply: Reply,
        deadline: float,
    ) -> None:
        self._factory = factory
        self._fetch = fetch
        self._decompress = decompress
        self._slots = slots
        slots.beside, stage.beside = stage, slots
        self._stage = stage
        self._prefetch = prefetch
        self._reply = reply
        self._requests: dict[tuple[bytes, int], Request] = {}
        self._kin = Kin(self._filled, lambda job: self._launch.promote(job))
        self._launch = Launch(
            *(fetch, decompress, slots, stage, prefetch, self._filled, self._count, deadline, self._kin)
        )
        self._room = Room(slots, self._launch.cut, self._launch.start_in)
        self.checkpoints = Checkpoints(factory, fetch, self._reopen)
        self.evictions = Evictions(fetch, self._all_again, self._reopen)
        self.outages = Outages(deadline)
        self._openings = Openings(fetch, self.outages, self._serve, self._finish, self._spare)
        self.unknown: Callable[[int], bool] = lambda handle: False
        """Told of a handle that is asked for and that no blob has: it may be one of a killed supervisor's (`restore.py`).

        True: it has nothing to know it with now, and does so when it is asked again.
        """
        self.backend = {"reads": 0, "read_errors": 0, "read_bytes": 0}

    # --- what clients ask -------------------------------------------------------------------------------------

    def request(self, client: bytes, number: int, handle: int, first: int, count: int, flags: int) -> None:
        """A front end wants chunks. Asking again under the same number changes nothing."""
        if (client, number) in self._requests:
            return
        cache = self._factory.get(handle)
        if cache is None:
            if self.unknown(handle):
                return
            cache = self._factory.get(handle)
        if flags & AHEAD:
            if cache is not None and cache.state == "ready" and not cache.uses_slots and first < cache.chunk_map.count:
                self._launch.read_ahead(cache, first, first)
            return
        if cache is None or count <= 0:
            self._reply(client, number, errno.ESTALE if cache is None else errno.EIO, None)  # no image has it any more
            return
        if flags & SYNC:
            self.checkpoints.sync(
                cache, lambda code: self._reply(client, number, code, None), at_once=bool(flags & LOST)
            )
            return
        if flags & LOST and cache.caches and cache.state == "ready":
            self._reopen(cache, "the cache file does not hold what its map promises")
        if flags & UNREADABLE and cache.caches and cache.state == "ready":
            note_unreadable(cache, first, count)
            if cache.segment is not None and cache.segment.is_doubtful:
                # Nothing of it is believed before it is known what is lost.
                self.checkpoints.sync(cache, lambda _code: None, at_once=True)
        request = Request(client, number, cache, first, count)
        self.outages.begin(request)
        self._requests[request.key] = request
        self._serve(request)

    def cancel(self, client: bytes, number: int) -> None:
        """The reader is gone. Its jobs go on: the chunks are wanted by somebody, or will be.

        An answer with shared memory that crosses this on its way is void: nobody may look for it.
        """
        request = self._requests.pop((client, number), None)
        if request is not None:
            self._detach(request)
        self._slots.withdraw(client, number)
        self._retry_slots()

    def drop_client(self, client: bytes) -> None:
        """A front end has died: nobody waits for its requests, nobody holds its slots."""
        for key in [key for key in self._requests if key[0] == client]:
            self._detach(self._requests.pop(key))
        self._slots.drop_client(client)
        self._retry_slots()

    def release(self, lease: int) -> None:
        """A client has copied what it was given in shared memory."""
        self._slots.release(lease)
        self._retry_slots()

    def checkpoint(self) -> int:
        """Have maps stored that have gained chunks; gives how many jobs that matter for it are not done."""
        return self.checkpoints.start()

    def prefetch(self) -> None:
        """Submit jobs for a worker that has nothing else to do, if there is anything to fetch before it is asked for."""
        for cache in self._launch.prefetch():
            if not cache.lost:
                self._openings.open(cache)

    def tick(self) -> None:
        """Serve requests again that were put off until now, and those for which others' jobs have ended."""
        self._kin.settle()
        self.checkpoints.tick(time.monotonic())
        for request in self.outages.due():
            self._serve_if_alive(request)

    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._requests)

    def _serve(self, request: Request) -> None:
        """Answer a request that waits for nothing yet, or have it wait for what it needs."""
        if request.cache.state == "ready":
            self._admit(request)
        else:
            self._openings.wait_for(request)

    def _again(self, request: Request) -> None:
        """Start over: what the request waited for came to nothing. One that has ended meanwhile does not."""
        if self._requests.get(request.key) is not request:
            return
        self._detach(request)
        request.rounds += 1
        if request.rounds < _ROUNDS:
            self._serve(request)
            return
        info = request.cache.spec.info
        log.error("blob %s chunks %d…: given up after %d rounds", info.blob_id, request.first, _ROUNDS)
        self._finish(request, errno.EIO)

    def _all_again(self, requests: Iterable[Request]) -> None:
        """The same for several. What they held of shared memory, others may wait for."""
        for request in requests:
            self._again(request)
        self._retry_slots()

    def _detach(self, request: Request) -> None:
        """Nothing is to be done for this request any more."""
        cache = request.cache
        if request in cache.waiting:
            cache.waiting.remove(request)
        for chunk in request.left:
            waiters = cache.waiters.get(chunk, [])
            if request in waiters:
                waiters.remove(request)
                if not waiters:
                    del cache.waiters[chunk]
        request.left.clear()
        self._room.leave(request)
        self.outages.leave(request)

    # --- blobs come and go ------------------------------------------------------------------------------------

    def open_blob(self, cache: BlobCache) -> None:
        """Have the blob prepared, unless that is done, under way, or failed too recently."""
        self._openings.open(cache)

    def renew(self, cache: BlobCache) -> None:
        """Have a blob opened again whose cache file is not what we opened: deleted, replaced, or not to be used then."""
        if cache.state == "ready":
            self._reopen(cache, "its cache file is not the one that was opened")
        self._openings.open(cache)

    def _reopen(self, cache: BlobCache, why: str) -> None:
        """The cache file was changed under us: void all claims, and serve all who waited from a new one.

        Only a reader has the blob opened again, not a checkpoint or prefetch: a container runtime deletes the cache files
        of an image that it removes before it ends the daemon, and nobody would delete new ones.
        """
        log.warning("blob %s: %s; opening it again", cache.spec.info.blob_id, why)
        self._void(cache)

    def forget(self, cache: BlobCache) -> None:
        """The file of a blob is taken away, in order: what waits for it fails, and it must be opened anew."""
        cache.spec = replace(cache.spec, cookie=NO_COOKIE)
        self._void(cache)
        cache.lost = False

    def _void(self, cache: BlobCache) -> None:
        requests = {request: None for waiters in cache.waiters.values() for request in waiters}
        cache.reopen()
        # In this order: the end of a decompress job may make room for a request, which has the blob prepared again.
        self._launch.cancel(cache)
        for pool in (self._fetch, self._decompress):
            pool.cancel(cache)
        self._all_again(requests)

    def may_close(self, cache: BlobCache) -> bool:
        """Whether nothing of a blob that no image uses is under way any more. Has its map stored before it says so.

        A job that is void counts, too: who opens the file next may do so by a table that contradicts the one it is written by.
        """
        if cache.state == "preparing" or cache.checkpointing or cache.jobs:
            return False
        if any(pool.has(cache) for pool in (self._fetch, self._decompress)):
            return False
        if any(request.cache is cache for request in self._requests.values()):
            return False
        return not self.checkpoints.store(cache)

    def closed(self, cache: BlobCache) -> None:
        """A blob that nobody uses was closed: no worker keeps it open for nothing, and nothing of it is fetched ahead."""
        self._prefetch.cancel(cache)
        for pool in (self._fetch, self._decompress):
            pool.forget(cache)

    def _spare(self) -> None:
        """Something needs memory that arenas only keep."""
        for table in (self._slots, self._stage):
            table.spare(table.size)

    # --- misses -----------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        cache = request.cache
        if request.chunks[-1] >= cache.chunk_map.count:
            self._finish(request, errno.EIO)
            return
        self._kin.take(cache, request.chunks)
        missing = [chunk for chunk in request.chunks if not cache.chunk_map.is_ready(chunk)]
        failure = 0 if request.put_off else next(filter(None, map(cache.failure, missing)), 0)
        if failure or not missing:
            self._finish(request, failure)
        elif cache.uses_slots and cache.pinned:
            self._finish(request, errno.ENOSPC)  # the kernel reads the file by itself: memory is of no use to it
        elif cache.uses_slots or not (cache.pinned or all(map(cache.meta.is_listed, missing))):
            self._admit_by_slot(request, missing)
        else:
            self._wait_for(request, missing)
            self._launch.miss(cache, missing)
            if not cache.outage and not cache.no_room_until:
                self._launch.read_ahead(cache, request.first, request.chunks[-1])

    def _wait_for(self, request: Request, chunks: Iterable[int]) -> None:
        cache = request.cache
        for chunk in chunks:
            request.left.add(chunk)
            cache.waiters.setdefault(chunk, []).append(request)
            job = cache.jobs.get(chunk)
            if job is not None:
                self._launch.promote(job)

    # --- slots ------------------------------------------------------------------------------------------------

    def _admit_by_slot(self, request: Request, missing: list[int]) -> None:
        """Let a request wait for chunks in shared memory, or for its turn to get room there for all of them."""
        try:
            left = self._room.enter(request, missing)
        except CacheError as e:
            if isinstance(e, ScarceError) and self.outages.put_off(request, 0.0, str(e), lacks=True):
                return
            log.error("blob %s: %s", request.cache.spec.info.blob_id, e)
            self._finish(request, errno.ENOMEM)
            return
        if left:
            self._wait_for(request, left)
        elif left is not None:
            self._finish(request, 0)

    def _retry_slots(self) -> None:
        """Somebody may have given up a region: serve those who wait for room."""
        self._launch.retry()
        self._room.call(self._serve_if_alive)

    def _serve_if_alive(self, request: Request) -> None:
        if self._requests.get(request.key) is request:
            self._serve(request)

    # --- results ----------------------------------------------------------------------------------------------

    def _filled(self, job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        points.reach("supervisor: job came back")
        if job.kind != "fetch":
            self._count(job, answer)
        if self._launch.part(job, answer):
            return
        if job.slot is not None:
            self._slots.place(job.slot[0], cache.handle, answer.get("placed", []))
        if not job.cancelled:
            for chunk in job.chunks:
                del cache.jobs[chunk]
                cache.chunk_map.clear_pending(chunk)
                if "retry_after" in answer and chunk in job.payload.get("verify", ()):
                    cache.chunk_map.doubt(chunk)  # nobody has looked whether it is in the file
            if answer.get("type") == "StaleCacheError":
                self._reopen(cache, answer["error"])
            elif "retry_after" in answer:
                self._put_off(job, cache, answer)
            else:
                if job.kind != FOLLOW and "error" not in answer:  # else it says nothing of what is there
                    self.outages.supplied(cache)
                self._settle(job, cache, answer)
        self._retry_slots()

    def _count(self, job: Job, answer: Answer) -> None:
        """Add up what the backend was asked for; a user's reads take from what prefetch may."""
        if job.cache is not None and answer.get("read_bytes"):
            self.outages.over(job.cache)
            job.cache.prefetch_delay = 0.0
        for key in self.backend:
            self.backend[key] += answer.get(key, 0)
        if job.cache is not None and job.priority is not Priority.PREFETCH and not self._prefetch.idle():
            job.cache.pace.limiter.spend(time.monotonic(), answer.get("read_bytes", 0))

    def _settle(self, job: Job, cache: BlobCache, answer: Answer) -> None:
        """Tell all who waited for a job's chunks how it ended."""
        failed = {chunk: code for chunk, code, _why in answer.get("failed", [])}
        poison = answer.get("type") == "WorkerDied"
        if "error" in answer:
            parts = cache.meta.split(job.chunks, 0)
            if poison and len(parts) > 1 and job.slot is None and not cache.remote:
                for part in parts:  # one of them kills workers: find out which
                    self._launch.fill(cache, part, job.priority, ATTEMPTS - 1)
                return
            name, first, last = cache.spec.info.blob_id, job.chunks[0], job.chunks[-1]
            # What nobody has asked for yet may be tried again as soon as somebody does.
            spare = job.kind == "fetch" and job.priority is Priority.PREFETCH
            level = logging.WARNING if spare else logging.ERROR
            log.log(level, "blob %s chunks %d…%d: %s", name, first, last, answer["error"])
            if not spare:
                failed = {chunk: answer["errno"] for chunk in job.chunks if not cache.chunk_map.is_ready(chunk)}
        elif job.slot is None and "why_unstored" in answer:
            note_room(cache, answer["why_unstored"])
        ended = outcomes(job, cache, failed, self._slots.has, poison=poison)
        for request, code in ended.items():
            if code == AGAIN:
                self._again(request)
            else:
                self._finish(request, code)

    def _put_off(self, job: Job, cache: BlobCache, answer: Answer) -> None:
        """The backend could not be reached, or something is lacking: readers wait while they have time, then get the error."""
        name, first, last = cache.spec.info.blob_id, job.chunks[0], job.chunks[-1]
        requests = {request: None for chunk in job.chunks for request in cache.waiters.get(chunk, ())}
        if not requests:  # what nobody has asked for yet may be tried again as soon as somebody does
            log.debug("blob %s chunks %d…%d: %s", name, first, last, answer["error"])
            if job.priority is Priority.PREFETCH and cache.users > 0:
                self._prefetch.put_back(cache, first, last, answer["retry_after"], time.monotonic())
        complained, lacks = False, answer.get("type") == ScarceError.__name__
        for request in requests:
            wanted = request.left.intersection(job.chunks)
            self._detach(request)
            if self.outages.put_off(request, answer["retry_after"], answer["error"], lacks=lacks):
                continue
            if not complained:
                log.error("blob %s chunks %d…%d: %s; readers have no more time", name, first, last, answer["error"])
                complained = True
            for chunk in wanted:
                cache.failed(chunk, answer["errno"], outage=True)
            self._finish(request, answer["errno"])

    def _finish(self, request: Request, code: int) -> None:
        """Answer a request: all its chunks are there, or one of them cannot be had."""
        slot = None
        if not code:
            cache = request.cache
            self.outages.supplied(cache)
            absent = [chunk for chunk in request.chunks if not cache.chunk_map.is_ready(chunk)]
            if not all(self._slots.has(cache.handle, chunk) for chunk in absent):
                self._again(request)  # came in shared memory, not held for this one, and was given up meanwhile
                return
            if absent:
                slot = self._slots.lease(request.client, cache.handle, absent, request.number)
                points.reach("supervisor: slot leased")
        del self._requests[request.key]
        self._detach(request)
        points.reach("supervisor: before a reply")
        self._reply(request.client, request.number, code, slot)
        points.reach("supervisor: replied")
