"""Evictions: chunks that are being taken out of cache files, to make room. The supervisor's side; no I/O.

The order of steps is that of `storage/state/eviction.py`. While it lasts, the chunks are claimed, as for a fill: who asks for
one of them waits, and is served when it is over. No checkpoint of the blob runs meanwhile: it could store as ready what is
being taken away.

What holds after SIGKILL of the supervisor: claims die with the segment; the worker finishes its job, or finds that another
segment has taken the place of its own and does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from nydusd import points
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority, Request
from nydusd.storage.state.segment import EMPTY, READY
from nydusd.storage.state.sharing import is_same_place
from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)


class _Claim:
    """Chunks that were claimed in the segment that a cache had then."""

    def __init__(self, cache: BlobCache, chunks: list[int]) -> None:
        assert cache.segment is not None
        self.cache = cache
        self.segment = cache.segment
        self.chunks = chunks


class Evictions:
    """`again(request)` starts a request over, `reopen(cache, why)` is called when a cache file turns out to be another."""

    def __init__(
        self, fetch: WorkerPool, again: Callable[[Request], None], reopen: Callable[[BlobCache, str], None]
    ) -> None:
        self._fetch = fetch
        self._again = again
        self._reopen = reopen

    def start(self, cache: BlobCache, chunks: Iterable[int], payload: Answer, done: Callable[[Answer], None]) -> int:
        """Have chunks taken out; gives how many: those that are ready and that nobody works on.

        Other images and configurations that have them in the same file lose them, too: they are claimed for all.
        """
        if cache.state != "ready" or cache.segment is None:
            return 0
        users = [cache, *cache.others()]
        if any(user.checkpointing or user.pinned or user.chunk_map.count != cache.chunk_map.count for user in users):
            return 0
        chosen = [c for c in chunks if c < cache.chunk_map.count and cache.chunk_map.is_ready(c) and _is_free(users, c)]
        if not chosen:
            return 0
        claims = []
        for user in users:
            claims.append(_Claim(user, [c for c in chosen if user.chunk_map.is_ready(c)]))
            user.checkpointing = True
            user.chunk_map.claim_ready(claims[-1].chunks)
            points.reach("evict: claimed")
        covered = {}
        for claim in claims:
            claim.segment.epoch[0] += 1
            covered[claim.segment.name] = claim.segment.inode
            points.reach("evict: epoch raised")

        def ended(job: Job, answer: Answer) -> None:
            self._ended(job, answer, claims)
            done(answer)

        job = Job("evict", cache, Priority.AHEAD, payload | {"covered": covered}, ended, chosen)
        for claim in claims:
            claim.cache.jobs.update(dict.fromkeys(claim.chunks, job))
        self._fetch.submit(job)
        return len(chosen)

    def _ended(self, job: Job, answer: Answer, claims: Sequence[_Claim]) -> None:
        cache = job.cache
        assert cache is not None
        points.reach("evict: reported")
        # Where nothing was done because others use the file, its bytes are good still; unless a worker died over the job,
        # which may have punched holes before the others came.
        untouched = "kept" in answer and not job.attempts and not job.kills
        requests: dict[Request, None] = {}
        for claim in claims:
            claim.cache.checkpointing = False
            if claim.cache.segment is not claim.segment:
                continue  # it was opened anew, and knows from the file and its map what is there
            for chunk in claim.chunks:
                if claim.cache.jobs.get(chunk) is job:
                    del claim.cache.jobs[chunk]
                    claim.cache.chunk_map.clear_pending(chunk, READY if untouched else EMPTY)
                    requests.update(dict.fromkeys(claim.cache.waiters.pop(chunk, ())))
            if not untouched:
                claim.cache.stored = answer.get("stored", -1) if claim.cache is cache else -1
        name = cache.spec.info.blob_id
        if "kept" in answer:
            log.info("blob %s: nothing is taken out: %s uses it, too", name, answer["kept"])
        if "error" in answer:
            log.warning("blob %s: making room: %s", name, answer["error"])
        if answer.get("type") == "StaleCacheError" and not job.cancelled:
            self._reopen(cache, answer["error"])
        for request in requests:
            self._again(request)


def _is_free(users: Sequence[BlobCache], chunk: int) -> bool:
    """Whether nobody works on a chunk, and it has the same place for all who know it as ready."""
    first = users[0].segment
    assert first is not None
    return not any(
        chunk in user.jobs
        or (
            user.segment is not None
            and user.chunk_map.is_ready(chunk)
            and not is_same_place(first, user.segment, chunk)
        )
        for user in users
    )
