"""Evictions: chunks that are being taken out of cache files, to make room. The supervisor's side; no I/O.

The order of steps is that of `storage/state/eviction.py`. While it lasts, the chunks are claimed, as for a fill: who asks for
one of them waits, and is served when it is over. No checkpoint of the blob runs meanwhile: it could store as ready what is
being taken away.

What holds after SIGKILL of the supervisor: claims die with the segment; the worker finishes its job, or finds that another
segment has taken the place of its own and does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from nydusd import points
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority, Request
from nydusd.storage.state.segment import EMPTY, READY
from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)


class Evictions:
    """`again(request)` starts a request over, `reopen(cache, why)` is called when a cache file turns out to be another."""

    def __init__(
        self, fetch: WorkerPool, again: Callable[[Request], None], reopen: Callable[[BlobCache, str], None]
    ) -> None:
        self._fetch = fetch
        self._again = again
        self._reopen = reopen

    def start(self, cache: BlobCache, chunks: Iterable[int], payload: Answer, done: Callable[[Answer], None]) -> int:
        """Have chunks taken out; gives how many: those that are ready and that nobody works on."""
        if cache.state != "ready" or cache.segment is None or cache.checkpointing or cache.pinned:
            return 0
        states = cache.chunk_map.states()
        chosen = [c for c in chunks if c < cache.chunk_map.count and states[c] == READY and c not in cache.jobs]
        if not chosen:
            return 0
        cache.checkpointing = True
        cache.chunk_map.claim_ready(chosen)
        points.reach("evict: claimed")
        cache.segment.epoch[0] += 1
        points.reach("evict: epoch raised")

        def ended(job: Job, answer: Answer) -> None:
            self._ended(job, answer)
            done(answer)

        job = Job("evict", cache, Priority.AHEAD, payload, ended, chosen)
        cache.jobs.update(dict.fromkeys(chosen, job))
        self._fetch.submit(job)
        return len(chosen)

    def _ended(self, job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        cache.checkpointing = False
        if job.cancelled:
            return
        points.reach("evict: reported")
        name = cache.spec.info.blob_id
        # Where nothing was done because others use the file, its bytes are good still; unless a worker died over the job,
        # which may have punched holes before the others came.
        untouched = "kept" in answer and not job.attempts and not job.kills
        requests: dict[Request, None] = {}
        for chunk in job.chunks:
            del cache.jobs[chunk]
            cache.chunk_map.clear_pending(chunk, READY if untouched else EMPTY)
            requests.update(dict.fromkeys(cache.waiters.pop(chunk, ())))
        if "kept" in answer:
            log.info("blob %s: nothing is taken out: %s uses it, too", name, answer["kept"])
        if not untouched:
            cache.stored = answer.get("stored", -1)
        if "error" in answer:
            log.warning("blob %s: making room: %s", name, answer["error"])
        if answer.get("type") == "StaleCacheError":
            self._reopen(cache, answer["error"])
        for request in requests:
            self._again(request)
