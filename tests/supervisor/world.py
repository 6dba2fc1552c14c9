"""A router with real pools, slots and segments, whose workers, clients and clock a test plays.

Nothing is fetched: a worker's job ends as the test says, by setting state bytes of the segment that the job's generation
speaks of, or by placing chunks in the arena, as a real worker does.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest

from nydusd.formats.model import ChunkFlag
from nydusd.ipc.messages import Json, SlotRef
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache import blob_cache
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.manager import CacheConfig, Former
from nydusd.storage.cache.pace import Pace
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Job, Priority, Request
from nydusd.storage.state.names import names, remove
from nydusd.storage.state.segment import EMPTY, PENDING, READY, RECORD, VERIFY, Identity, Segment
from nydusd.supervisor import checkpoints, launch, openings, outages, transfers, uncached
from nydusd.supervisor import pool as pool_module
from nydusd.supervisor import router as router_module
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.router import Router
from nydusd.supervisor.slots import SlotTable
from tests.support.blobs import blob_info

CHUNKS = 24
ANSWERED_WITH = {0, errno.EIO, errno.ENOMEM, errno.ENOSPC}
_worlds = count(1)


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class World:
    """`plain` and `batch` store their chunks in a cache file, `dummy` does not; of `batch`, three chunks make a unit.

    `far` and `far_batch` are the same of a remote backend, `far_dummy` is remote and stores nothing. Chunks are 8 to 20 KiB,
    half of that stored; a job has 32 KiB or one unit, an arena 64 KiB: so few requests already compete for it.
    """

    def __init__(self, patch: pytest.MonkeyPatch, amplify: int = 40_000, bandwidth: int = 0) -> None:
        self.clock = Clock()
        patch.setattr(blob_cache, "time", self.clock)
        patch.setattr(checkpoints, "time", self.clock)
        patch.setattr(router_module, "time", self.clock)
        patch.setattr(launch, "time", self.clock)
        patch.setattr(openings, "time", self.clock)
        patch.setattr(outages, "time", self.clock)
        patch.setattr(uncached, "time", self.clock)
        patch.setattr(transfers, "time", self.clock)
        patch.setattr(pool_module, "time", self.clock)
        patch.setattr(launch, "_JOB_BYTES", 32 << 10)
        patch.setattr(transfers, "_FILL_BYTES", 32 << 10)
        patch.setattr(transfers, "MIN_REQUEST", 8 << 10)
        self.memory = 1 << 30
        """Bytes that both arenas can have, as if /dev/shm was no larger."""
        patch.setattr(os, "posix_fallocate", self._back)
        self.instance = f"world-{time.monotonic_ns()}-{next(_worlds)}"
        self.pace = Pace(0, bandwidth, amplify)
        """Of all images here."""
        self.blobs: list[BlobCache] = []
        self.sent: dict[bytes, Json] = {}
        self.retired: set[bytes] = set()
        self.open: dict[tuple[bytes, int], BlobCache] = {}
        self._asked: dict[tuple[bytes, int], tuple[int, int, int]] = {}
        self.answers: list[tuple[bytes, int, int, SlotRef | None]] = []
        self.leases: list[int] = []
        self.dispatched: list[Json] = []
        self._begin(0)

    def _begin(self, term: int) -> None:
        """The tables of a supervisor that has had so many before it, as `Runtime` names them."""
        self._term = term
        first = (term << 32) + 1
        self.factory = BlobFactory(self.instance, "/nonexistent")
        self.factory.begin(first)
        self.slots = SlotTable(f"/nydusd.{self.instance}.{term}.arena", 64 << 10, first)
        self.stage = SlotTable(f"/nydusd.{self.instance}.{term}.stage", 64 << 10)
        self.prefetch = PrefetchWorker()
        self.fetch = WorkerPool("fetch", self._sender("fetch"), lambda: None)
        self.decompress = WorkerPool("decompress", self._sender("decompress"), lambda: self.router.prefetch())
        self.router = Router(
            self.factory,
            self.fetch,
            self.decompress,
            self.slots,
            self.stage,
            self.prefetch,
            self._reply,
            deadline=30.0,
        )
        self.transfers = self.router._launch.transfers
        former = {(cache.spec.info.blob_id, cache.spec.bootstrap): cache for cache in self.blobs}
        self.plain = self._blob(former, "plain", "/cache")
        self.batch = self._blob(former, "batch", "/cache")
        self.dummy = self._blob(former, "dummy", None)
        self.far = self._blob(former, "far", "/cache", "s3")
        self.far_batch = self._blob(former, "far-batch", "/cache", "s3")
        self.far_dummy = self._blob(former, "far-dummy", None, "s3")
        self.blobs = [self.plain, self.batch, self.dummy, self.far, self.far_batch, self.far_dummy]

    def _back(
        self, fd: int, offset: int, size: int, real: Callable[[int, int, int], None] = os.posix_fallocate
    ) -> None:
        arenas = [table._arena._fd for table in (self.slots, self.stage) if table._arena is not None]
        if fd in arenas and sum(os.fstat(arena).st_blocks * 512 for arena in arenas) + size > self.memory:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    def _blob(
        self,
        former: Mapping[tuple[str, str], BlobCache],
        name: str,
        work_dir: str | None,
        backend: str = "localfs",
        boot: str = "/boot",
    ) -> BlobCache:
        config = CacheConfig(backend, {"secret": "of the test"}, work_dir, False)
        info = replace(blob_info(), blob_id=name)
        known = former.get((name, boot))
        names_of = None if known is None else Former(known.handle, known.spec.segment)
        cache = self.factory.new_blob_cache(config, info, f"image of {boot}", boot, "", False, names_of)
        cache.paces.append(self.pace)
        if known is None:
            return cache
        cache.take_over()
        return cache

    def succeed(self) -> None:
        """The supervisor is killed and all workers with it; the next one takes over, and clients ask it again."""
        self.sent.clear()
        self.retired.clear()
        self.slots.close()
        self.stage.close()
        for cache in self.blobs:  # the mappings end with the process, the names stay
            if cache.segment is not None:
                cache.segment.close()
        for name in names(f"nydusd.{self.instance}."):
            if name.endswith((".arena", ".stage")):
                remove(name)
        self._begin(self._term + 1)
        by_handle = {cache.handle: cache for cache in self.blobs}
        self.open = {key: by_handle[cache.handle] for key, cache in self.open.items()}
        for key, cache in list(self.open.items()):
            self.router.request(*key, cache.handle, *self._asked[key])

    def open_all(self) -> None:
        """Have all blobs prepared, by a worker that is gone then."""
        self.worker("fetch", b"first")
        for cache in self.blobs:
            self.router.open_blob(cache)
            self.pump()
            self.prepared(b"first")
        self.kill(b"first")
        self.dispatched.clear()

    def close(self) -> None:
        self.factory.close()
        self.slots.close()
        self.stage.close()
        for name in names(f"nydusd.{self.instance}."):
            remove(name)

    # --- the other processes ---------------------------------------------------------------------------------

    def _sender(self, role: str) -> Callable[[bytes, Json], None]:
        def send(identity: bytes, message: Json) -> None:
            pool = self.pool(role)
            job = pool._busy[identity]
            assert identity not in self.sent, "a worker got a second job"
            assert identity not in self.retired, "a worker that is to leave got another job"
            assert role == "fetch" or "s3" not in str(message) or "secret" not in str(message), (
                "a secret was given away"
            )
            if job.priority is not Priority.USER and pool._queues[Priority.USER]:
                upkeep = [other for other in pool._busy.values() if other.kind in pool_module._UPKEEP]
                overdue = upkeep == [job] and self.clock.now - job.queued > pool_module._PATIENCE
                assert overdue, "a user's job waits behind another"
            self.sent[identity] = message
            self.dispatched.append(message)

        return send

    def pool(self, role: str) -> WorkerPool:
        return self.fetch if role == "fetch" else self.decompress

    def role_of(self, identity: bytes) -> str:
        return "decompress" if self.sent[identity]["kind"] == "fill" else "fetch"

    def pump(self) -> None:
        self.decompress.pump()
        self.fetch.pump()

    def _reply(self, client: bytes, number: int, code: int, slot: SlotRef | None) -> None:
        cache = self.open.pop((client, number), None)
        assert cache is not None, f"request {number} of {client!r} was answered, and nobody waits for it"
        assert code in ANSWERED_WITH
        assert slot is None or not code
        self.answers.append((client, number, code, slot))
        if slot is not None:
            self.leases.append(slot.lease)

    def ask(self, client: bytes, number: int, cache: BlobCache, first: int, size: int, flags: int = 0) -> None:
        if (client, number) not in self.open:
            self.open[client, number] = cache
            self._asked[client, number] = (first, size, flags)
        self.router.request(client, number, cache.handle, first, size, flags)

    def worker(self, role: str, identity: bytes) -> None:
        self.pool(role).worker_ready(identity)

    def kill(self, identity: bytes) -> None:
        self.sent.pop(identity, None)
        self.retired.discard(identity)
        for pool in (self.fetch, self.decompress):
            pool.worker_died(identity)

    def retire(self, role: str, identity: bytes) -> None:
        self.pool(role).retire(identity)
        self.retired.add(identity)

    def done(self, identity: bytes, answer: Json) -> None:
        pool = self.pool(self.role_of(identity))
        message = self.sent.pop(identity)
        pool.worker_done(identity, answer | {"id": message["id"]})

    def prepared(self, identity: bytes, ready: Collection[int] = ()) -> None:
        """The worker has prepared a blob; these chunks are in its cache file (of a remote blob, perhaps)."""
        cache = self.cache_of(identity)
        records = b""
        uoff = coff = 0
        for chunk in range(CHUNKS):
            usize = 8192 + chunk % 4 * 4096
            grouped = int(ChunkFlag.BATCH) if cache in (self.batch, self.far_batch) else 0
            records += RECORD.pack(coff, uoff, usize // 2, usize, grouped, chunk // 3 if grouped else 0, 0, 0)
            uoff += usize
            coff += usize // 2 if not grouped or chunk % 3 == 2 else 0
        state = self._found(cache, ready)
        Segment.create(
            cache.spec.segment,
            generation=cache.spec.generation,
            identity=Identity(1, self._inode(cache), uoff),
            records=records,
            digests=bytes(32 * CHUNKS),
            contexts=b"",
            dict_offset=0,
            dict_size=0,
            state=state,
        ).close()
        self.done(identity, {"count": CHUNKS, "size": uoff, "ready": state.count(READY)})

    def _found(self, cache: BlobCache, ready: Collection[int]) -> bytes:
        """The states of a blob that was prepared just now."""
        value = VERIFY if cache.remote else READY
        return bytes(value if chunk in ready and cache.caches else EMPTY for chunk in range(CHUNKS))

    def _inode(self, _cache: BlobCache) -> int:
        """Of its cache file."""
        return 2

    def cache_of(self, identity: bytes) -> BlobCache:
        cache = self.factory.get(self.sent[identity]["handle"])
        assert cache is not None
        return cache

    def store(self, identity: bytes, chunks: Collection[int]) -> list[tuple[int, int, int]]:
        """The worker stores some chunks of its job, as it does before it reports; gives what it placed in its slot."""
        message = self.sent[identity]
        cache = self.cache_of(identity)
        if message["slot"] is None:
            job = self.decompress._busy[identity]
            # A job of an earlier generation writes to the segment of that generation, which nobody sees any more.
            if not job.cancelled:
                for chunk in chunks:
                    cache.chunk_map.set_ready(chunk)
            return []
        at, placed = message["slot"]["offset"], []
        for chunk in chunks:
            usize = cache.meta.record(chunk).usize
            placed.append((chunk, at, usize))
            at += usize
        assert at <= message["slot"]["offset"] + message["slot"]["length"]
        return placed

    def fetched(self, identity: bytes, milliseconds: float = 10.0) -> None:
        """The worker has put the stored bytes of its job into shared memory, in so much time."""
        size = self.sent[identity]["slot"]["length"]
        self.done(identity, {"reads": 1, "read_errors": 0, "read_bytes": size, "timed": [(size, milliseconds)]})

    def filled(self, identity: bytes, failed: Collection[int] = (), unstored: Collection[int] = ()) -> None:
        """The worker has filled its chunks, all but these."""
        message = self.sent[identity]
        chunks = message["chunks"]
        placed = self.store(identity, [c for c in chunks if c not in failed and c not in unstored])
        bad = [chunk for chunk in chunks if chunk in failed]
        corrupt = []
        if self.cache_of(identity).remote:
            # Looked at in the cache file only, or to be fetched once more, or damaged for the second time.
            once_more = message["source"] is None or not message["source"]["final"]
            corrupt = bad if once_more and message["source"] is not None else []
            bad = [] if once_more else bad
        answer: Json = {
            "failed": [[chunk, errno.EIO, "corrupt"] for chunk in bad],
            "corrupt": corrupt,
            "unstored": [chunk for chunk in chunks if chunk in unstored],
            "why_unstored": "No space left on device" if unstored else "",
            "placed": placed,
            "reads": 1,
            "read_errors": 0,
            "read_bytes": 4096 * len(chunks),
        }
        self.done(identity, answer)

    def fill_next(self, failed: Collection[int] = (), unstored: Collection[int] = ()) -> list[int]:
        """The one worker with a job fills its chunks, all but these; gives the job's chunks."""
        self.pump()
        (identity,) = self.sent
        chunks: list[int] = self.sent[identity]["chunks"]
        self.filled(identity, failed, unstored)
        return chunks

    def finish(self, identity: bytes) -> None:
        """The worker's job ends well, whatever it is."""
        kind = self.sent[identity]["kind"]
        if kind == "prepare":
            self.prepared(identity)
        elif kind == "checkpoint":
            self.done(identity, {"stored": self.cache_of(identity).chunk_map.ready_count()})
        elif kind == "evict":
            self.done(identity, {"stored": 0, "evicted": len(self.sent[identity]["chunks"]), "bytes": 1})
        elif kind == "fetch":
            self.fetched(identity)
        else:
            self.filled(identity)

    def stale(self, identity: bytes) -> None:
        self.done(identity, {"error": "the cache file was replaced", "errno": errno.EIO, "type": "StaleCacheError"})

    def fail(self, identity: bytes) -> None:
        self.done(identity, {"error": "no such blob", "errno": errno.EIO, "type": "NoSuchBlobError"})

    def out(self, identity: bytes, retry_after: float = 0.0) -> None:
        """The worker's job ends because the backend is not there."""
        error: Json = {"error": "is down", "errno": errno.EIO, "type": "BackendUnavailableError"}
        self.done(identity, error | {"retry_after": retry_after, "reads": 1, "read_errors": 1, "read_bytes": 0})

    def lack(self, identity: bytes) -> None:
        """The worker's job ends for want of file descriptors."""
        error: Json = {"error": "Too many open files", "errno": errno.EIO, "type": "ScarceError", "retry_after": 0.0}
        self.done(identity, error)

    def settle(self) -> None:
        """Let healthy workers finish all that is asked for, while clients give back what they get and time passes."""
        for number in range(2):
            for role in ("fetch", "decompress"):
                self.worker(role, b"healthy-%d" % number + role.encode())
        for _ in range(10_000):
            while self.leases:
                self.router.release(self.leases.pop())
            self.pump()
            self.router.tick()
            wait = self.router.outages.wait(self.clock.now)
            if not self.sent and wait is not None:
                self.clock.now += wait
                self.router.tick()
                continue
            if not self.sent:
                break
            self.finish(next(iter(self.sent)))
        assert not self.sent, "the work does not end"

    # --- what must hold at any time --------------------------------------------------------------------------

    def jobs(self) -> Iterator[tuple[Job, bool]]:
        """All jobs, and whether they are with a worker, or wait for one that is."""
        yield from ((job, False) for job in self.transfers._line)
        yield from ((job, True) for t in self.transfers._open for job in _to_come(t))
        for pool in (self.fetch, self.decompress):
            yield from ((job, True) for job in pool._busy.values())
            yield from ((job, False) for queue in pool._queues.values() for job in queue)

    def check(self) -> None:
        claims: dict[BlobCache, dict[int, Job]] = {cache: {} for cache in self.blobs}
        holders: dict[int, int] = {}
        for job, busy in self.jobs():
            assert busy or not job.cancelled, "a void job is queued"
            if job.slot is not None:
                holders[job.slot[0]] = holders.get(job.slot[0], 0) + 1
            if job.kind not in ("fill", "fetch") or job.cancelled or job.cache is None:
                continue
            for chunk in job.chunks:
                assert chunk not in claims[job.cache], f"chunk {chunk} is fetched by two jobs"
                claims[job.cache][chunk] = job
        for cache, claimed in claims.items():
            void = [t for t in self.transfers._open if t.cache is cache and t.generation != cache.spec.generation]
            again = {chunk for t in void for job in _to_come(t) for chunk in job.chunks}
            filling = {chunk: job for chunk, job in cache.jobs.items() if job.kind in ("fill", "fetch")}
            assert filling == {chunk: job for chunk, job in claimed.items() if chunk not in again}
            self._check_waiters(cache)
        assert not self.router._room._line or self.slots.held(), "a request waits for room that nobody will give up"
        requests = self.router._requests
        assert requests.keys() == self.open.keys()
        for request in requests.values():
            self._check_request(request)
            for held in request.held:
                holders[held] = holders.get(held, 0) + 1
        for _, _, regions in self.slots._leases.values():
            for leased in regions:
                holders[leased.offset] = holders.get(leased.offset, 0) + 1
        for offset, region in self.slots._regions.items():
            assert region.holders == holders.pop(offset, 0), "a region is held by nobody, or by too few"
            assert region.holders or region.chunks, "a region is kept for nothing"
        assert not holders
        staged = {t.offset: t.size for t in self.transfers._open if t.staged}
        assert staged == {region.offset: region.length for region in self.stage._regions.values()}
        assert all(region.holders == 1 for region in self.stage._regions.values())
        under_way = self.transfers._fetching - self.transfers._line.keys()
        assert not self.transfers._line or staged or under_way, "a transfer waits for room that nobody will give up"
        used = sum(-(-region.length // 4096) * 4096 for region in self.slots._regions.values())
        assert self.slots.in_use() == used

    def _check_waiters(self, cache: BlobCache) -> None:
        if cache.state == "ready":
            pending = {c for c, value in enumerate(bytes(cache.chunk_map.states())) if value == PENDING}
            assert pending <= cache.jobs.keys(), "a chunk is pending and nobody fetches it"
        for chunk, waiters in cache.waiters.items():
            assert waiters, "an empty list is kept"
            assert len(set(waiters)) == len(waiters)
            for request in waiters:
                assert self.router._requests.get(request.key) is request, "a request that has ended is kept"
                assert chunk in request.left

    def _check_request(self, request: Request) -> None:
        cache = request.cache
        waits = [request in cache.waiting, bool(request.left), request in self.router._room._line]
        waits.append(self.router.outages.waits(request))
        assert waits.count(True) == 1, f"a request waits for {waits.count(True)} things"
        if request in cache.waiting:
            assert cache.state == "preparing", "nobody prepares the blob that a request waits for"
        for chunk in request.left:
            assert request in cache.waiters[chunk]
            job = cache.jobs.get(chunk)
            assert job is not None, "a request waits for a chunk that nobody fetches"
            assert job.priority is Priority.USER, "a user waits for a job that is not a user's"

    def check_nothing_left(self) -> None:
        """After `settle`: no queue, no claim, no hold."""
        self.check()
        assert not self.open, f"never answered: {sorted(self.open)}"
        assert not self.fetch.queued()
        assert not self.decompress.queued()
        assert not self.slots.held()
        assert not self.transfers._line
        assert not self.transfers._open
        assert not self.transfers._fetching
        assert not self.stage.in_use()
        for cache in self.blobs:
            assert not cache.jobs
            assert not cache.waiters
            assert not cache.waiting


def _to_come(transfer: transfers._Transfer) -> list[Job]:
    """The jobs of a transfer that wait for the one that is with a worker."""
    return [job for job in (transfer.again, *(transfer.parts or ())) if job is not None]


@contextmanager
def opened(patch: pytest.MonkeyPatch, amplify: int = 40_000) -> Iterator[World]:
    """A world with all blobs open and no worker, consistent at the end."""
    made = World(patch, amplify)
    try:
        made.open_all()
        yield made
        made.check()
    finally:
        made.close()
