"""Kin: caches of one file, of several images or configurations. What is fetched for one of them, the others need not fetch.

Used by the router; tables of the supervisor, no I/O. Only chunks of which both say the same, digest included, are taken
over (`storage/state/sharing.py`). One that is ready for another is ready; who wants digests checked of what is found on disk
believes that only of another who does, and has it checked else. One that is being fetched for another is waited for, by a
job that no worker gets.
What holds after SIGKILL of the supervisor: each segment's state bytes are true; who waited asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.state.sharing import vouches

FOLLOW = "follow"
"""The kind of a job that waits for the job of another cache."""


class Kin:
    """`ended(job, answer)` is called when a chunk that was waited for has come, or has not, `promote(job)` when a reader waits
    for the job."""

    def __init__(self, ended: Callable[[Job, Answer], None], promote: Callable[[Job], None]) -> None:
        self._ended = ended
        self._promote = promote
        self._leaders: dict[BlobCache, None] = {}

    def take(self, cache: BlobCache, chunks: Iterable[int]) -> None:
        """Mark those chunks ready that others have in the file, or to be looked for there."""
        others = cache.others()
        if others:
            for chunk in chunks:
                if chunk not in cache.jobs and not cache.chunk_map.is_ready(chunk):
                    for other in others:
                        _take(cache, other, chunk)

    def follow(self, cache: BlobCache, chunks: Iterable[int], priority: Priority) -> None:
        """Have those chunks waited for that are on their way into the file for others."""
        others = [other for other in cache.others() if other.jobs]
        if others:
            for chunk in chunks:
                if chunk not in cache.jobs and not cache.chunk_map.is_ready(chunk):
                    for other in others:
                        job = other.jobs.get(chunk)
                        if job is not None and _stores(job) and _vouches(other, cache, chunk):
                            self._wait(cache, other, chunk, priority)
                            break

    def _wait(self, cache: BlobCache, leader: BlobCache, chunk: int, priority: Priority) -> None:
        job = Job(FOLLOW, cache, priority, {"leader": leader}, self._ended, [chunk])
        cache.jobs[chunk] = job
        leader.followers.setdefault(chunk, []).append(job)
        self._leaders[leader] = None
        if chunk in cache.waiters:
            self._promote(job)

    def leader(self, job: Job) -> Job | None:
        """The job that a job of kind FOLLOW waits for."""
        leader: BlobCache = job.payload["leader"]
        return leader.jobs.get(job.chunks[0])

    def settle(self) -> None:
        """End those waits that are over. To be called after whatever may have ended a job, or replaced it by others."""
        for leader in list(self._leaders):
            for chunk in list(leader.followers):
                job = leader.jobs.get(chunk)
                if job is None:
                    for follower in leader.followers.pop(chunk):
                        self._end(follower, leader, chunk)
                elif job.priority is not Priority.USER and any(map(_has_reader, leader.followers[chunk])):
                    self._promote(job)
            if not leader.followers:
                del self._leaders[leader]

    def _end(self, job: Job, leader: BlobCache, chunk: int) -> None:
        cache = job.cache
        assert cache is not None
        if cache.jobs.get(chunk) is not job:
            return  # its blob was opened anew
        if leader in cache.others():
            _take(cache, leader, chunk)
        self._ended(job, {})


def _has_reader(job: Job) -> bool:
    return job.cache is not None and job.chunks[0] in job.cache.waiters


def _stores(job: Job) -> bool:
    """Whether a job brings chunks into the cache file."""
    return job.kind in ("fetch", "fill") and job.slot is None


def _take(cache: BlobCache, other: BlobCache, chunk: int) -> None:
    """What another has in the file is there for this one, or at least to be looked for there.

    That, too, if somebody has heard, or may have, that some of it is lost: he doubts one after the other.
    """
    there, here = other.segment, cache.segment
    assert there is not None and here is not None
    doubts = there.doubts[0], here.doubts[0]
    if not other.chunk_map.is_ready(chunk) or not _vouches(other, cache, chunk):
        return
    if (other.spec.always_verify or not cache.spec.always_verify) and not (there.is_doubtful or here.is_doubtful):
        cache.chunk_map.set_ready(chunk)
        if (there.doubts[0], here.doubts[0]) == doubts:
            return
        cache.chunk_map.forget(chunk)
    if cache.meta.is_checkable(chunk):
        cache.chunk_map.doubt(chunk)


def _vouches(other: BlobCache, cache: BlobCache, chunk: int) -> bool:
    assert cache.segment is not None and other.segment is not None
    return vouches(other.segment, cache.segment, chunk)
