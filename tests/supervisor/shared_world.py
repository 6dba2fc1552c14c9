"""A world in which two images have a blob in common, one local and one remote, and chunks are taken out of the cache files.

It knows what is in the files: chunk by chunk, also in those that somebody has replaced. A chunk that is ready for anybody and
is not in the file would be read as zeros.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import closing

import pytest

from nydusd.ipc.messages import Json
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Priority
from nydusd.storage.state.segment import READY, Segment
from nydusd.supervisor.kin import FOLLOW
from tests.supervisor.world import World

_STALE = {"error": "the cache file was replaced", "errno": errno.EIO, "type": "StaleCacheError"}


class SharedWorld(World):
    """`twin` is the blob of `plain` as another image has it, `far_twin` that of `far`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._inodes: dict[str, int] = {}
        self._files: dict[tuple[str, int], set[int]] = {}
        self._worked: dict[bytes, Json] = {}
        super().__init__(patch)

    def _begin(self, term: int) -> None:
        former = {(cache.spec.info.blob_id, cache.spec.bootstrap): cache for cache in self.blobs}
        super()._begin(term)
        self.twin = self._blob(former, "plain", "/cache", boot="/boot2")
        self.far_twin = self._blob(former, "far", "/cache", "s3", boot="/boot2")
        self.blobs += [self.twin, self.far_twin]

    def _inode(self, cache: BlobCache) -> int:
        return self._inodes.setdefault(cache.spec.info.blob_id, 2)

    def _file(self, cache: BlobCache, inode: int) -> set[int]:
        return self._files.setdefault((cache.spec.info.blob_id, inode), set())

    def _found(self, cache: BlobCache, ready: Collection[int]) -> bytes:
        """Chunks that are `ready` are in the file, whoever stored them; what others know as ready is so here, too."""
        if cache.caches:
            self._file(cache, self._inode(cache)).update(ready)
        state = bytearray(super()._found(cache, ready))
        for segment in self._segments(cache):
            for chunk, value in enumerate(bytes(segment.state)):
                if value == READY and segment.identity.ino == self._inode(cache) and cache.caches:
                    state[chunk] = READY
        return bytes(state)

    @staticmethod
    def _segments(cache: BlobCache) -> Iterator[Segment]:
        for user in cache.kin:
            segment = Segment.open(user.spec.segment)
            if segment is not None:
                with closing(segment):
                    yield segment

    def store(self, identity: bytes, chunks: Collection[int]) -> list[tuple[int, int, int]]:
        message, cache = self.sent[identity], self.cache_of(identity)
        if message["slot"] is None and not self.decompress._busy[identity].cancelled:
            assert cache.segment is not None
            file = self._file(cache, cache.segment.identity.ino)
            if cache.remote and message["source"] is None:
                chunks = [chunk for chunk in chunks if chunk in file]  # it only looks what is there
            file.update(chunks)
        return super().store(identity, chunks)

    def stale(self, identity: bytes) -> None:
        """Somebody has replaced the cache file, or had before."""
        cache = self.cache_of(identity)
        if cache.segment is not None and cache.segment.identity.ino == self._inode(cache):
            self._inodes[cache.spec.info.blob_id] += 1
        super().stale(identity)

    def evict(self, cache: BlobCache, chunks: Collection[int]) -> int:
        """Have chunks taken out."""
        return self.router.evictions.start(cache, sorted(chunks), {}, lambda _: None)

    def take_out(self, identity: bytes) -> None:
        """The worker of an eviction does all that it has to do, under the data file's lock, but has not reported yet."""
        if identity in self._worked:
            return
        message, cache = self.sent[identity], self.cache_of(identity)
        covered = message["covered"]
        answer: Json = {"stored": 0, "evicted": len(message["chunks"]), "bytes": 1}
        for segment in self._segments(cache):
            own = segment.name == cache.spec.segment
            if own and (covered.get(segment.name) != segment.inode or segment.identity.ino != self._inode(cache)):
                answer = _STALE
            elif segment.identity.ino == self._inode(cache) and covered.get(segment.name) != segment.inode:
                answer = answer if answer is _STALE else {"kept": segment.name}
        if "evicted" in answer:
            self._file(cache, self._inode(cache)).difference_update(message["chunks"])
        self._worked[identity] = answer

    def finish(self, identity: bytes) -> None:
        if self.sent[identity]["kind"] == "evict":
            self.take_out(identity)
            self.done(identity, self._worked.pop(identity))
        else:
            super().finish(identity)

    def done(self, identity: bytes, answer: Json) -> None:
        self._worked.pop(identity, None)
        super().done(identity, answer)

    def kill(self, identity: bytes) -> None:
        self._worked.pop(identity, None)
        super().kill(identity)

    def succeed(self) -> None:
        """Workers may have come to the end of their jobs when they are killed."""
        for identity, message in self.sent.items():
            if message["kind"] == "evict":
                self.take_out(identity)
        self._worked.clear()
        super().succeed()

    def check(self) -> None:
        super().check()
        live = {job for job, _ in self.jobs()}
        for cache in self.blobs:
            for chunk, job in cache.jobs.items():
                assert chunk in job.chunks
                if job.kind == FOLLOW:
                    assert job in job.payload["leader"].followers[chunk], "a job that is waited for tells nobody"
                elif job.kind == "evict":
                    assert job in live, "a chunk is claimed for an eviction that is over"
            if cache.state == "ready" and cache.caches and cache.segment is not None:
                there = self._file(cache, cache.segment.identity.ino)
                ready = {chunk for chunk, value in enumerate(bytes(cache.segment.state)) if value == READY}
                assert ready <= there, f"ready, and not in the file: {sorted(ready - there)}"

    def check_urgent(self) -> None:
        """After a turn of the loop: what a reader waits for is urgent, for whatever image it is fetched."""
        for cache in self.blobs:
            for chunk in cache.waiters:
                job = cache.jobs[chunk]
                leader = job.payload["leader"].jobs.get(chunk) if job.kind == FOLLOW else None
                assert leader is None or leader.priority is Priority.USER, "a reader waits behind what nobody waits for"

    def check_nothing_left(self) -> None:
        super().check_nothing_left()
        assert not any(cache.followers for cache in self.blobs)
        assert not any(cache.checkpointing for cache in self.blobs)
