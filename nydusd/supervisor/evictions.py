"""Evictions: chunks that are being taken out of cache files, to make room. The supervisor's side; no I/O.

The order of steps is that of `storage/state/eviction.py`. While it lasts, the chunks are claimed, as for a fill, for all who
use the file, whether a chunk is ready for them or not: who asks for one of them waits, and is served when it is over. If
one could fill meanwhile what it does not have, that would be punched behind its back. No checkpoint of the blob runs
meanwhile: it could store as ready what is being taken away.

What holds after SIGKILL of the supervisor: claims die with the segment; the worker finishes its job, or finds that another
segment has taken the place of its own and does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nydusd import points
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority, Request
from nydusd.storage.state.segment import Segment
from nydusd.storage.state.sharing import is_same_place
from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)


class _User(NamedTuple):
    """A cache from which chunks are taken out, and the segment that it had when they were claimed: by `claim_ready`."""

    cache: BlobCache
    segment: Segment
    doubts: int = 0


class Evictions:
    """`again(requests)` starts requests over, `reopen(cache, why)` is called when a cache file turns out to be another."""

    def __init__(
        self, fetch: WorkerPool, again: Callable[[Iterable[Request]], None], reopen: Callable[[BlobCache, str], None]
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
        users = [_User(user, user.segment) for user in (cache, *cache.others()) if user.segment is not None]
        if any(
            user.checkpointing or user.pinned or user.chunk_map.count != cache.chunk_map.count for user, _, _ in users
        ):
            return 0
        chosen = [c for c in chunks if c < cache.chunk_map.count and cache.chunk_map.is_ready(c) and _is_free(users, c)]
        if not chosen:
            return 0
        for place, (user, segment, _) in enumerate(users):
            user.checkpointing = True
            doubts = user.chunk_map.claim_ready([chunk for chunk in chosen if user.chunk_map.is_ready(chunk)])
            users[place] = _User(user, segment, doubts)
            points.reach("evict: claimed")
        covered = {}
        for _, segment, _ in users:
            segment.epoch[0] += 1
            covered[segment.name] = segment.inode
            points.reach("evict: epoch raised")

        def ended(job: Job, answer: Answer) -> None:
            self._ended(job, answer, users)
            done(answer)

        job = Job("evict", cache, Priority.AHEAD, payload | {"covered": covered}, ended, chosen)
        for user, _, _ in users:
            user.jobs.update(dict.fromkeys(chosen, job))
        self._fetch.submit(job)
        return len(chosen)

    def _ended(self, job: Job, answer: Answer, users: Sequence[_User]) -> None:
        cache = job.cache
        assert cache is not None
        points.reach("evict: reported")
        # Where nothing was done because others use the file, its bytes are good still; unless a worker died over the job,
        # which may have punched holes before the others came.
        untouched = "kept" in answer and not job.attempts and not job.kills
        requests: dict[Request, None] = {}
        for user, segment, doubts in users:
            user.checkpointing = False
            if user.segment is not segment:
                continue  # it was opened anew, and knows from the file and its map what is there
            for chunk in job.chunks:
                if user.jobs.get(chunk) is job:
                    del user.jobs[chunk]
                    if untouched:
                        user.chunk_map.keep_claimed(chunk, doubts)
                    else:
                        user.chunk_map.taken_out(chunk)
                    requests.update(dict.fromkeys(user.waiters.pop(chunk, ())))
            if not untouched:
                user.stored = answer.get("stored", -1) if user is cache else -1
        name = cache.spec.info.blob_id
        if "kept" in answer:
            log.info("blob %s: nothing is taken out because of %s", name, answer["kept"])
        if "error" in answer:
            log.warning("blob %s: making room: %s", name, answer["error"])
        if answer.get("type") == "StaleCacheError" and not job.cancelled:
            self._reopen(cache, answer["error"])
        if requests:
            self._again(requests)


def _is_free(users: Sequence[_User], chunk: int) -> bool:
    """Whether nobody works on a chunk, and it has the same place for all who know it as ready."""
    first = users[0].segment
    return not any(
        chunk in user.jobs or (user.chunk_map.is_ready(chunk) and not is_same_place(first, segment, chunk))
        for user, segment, _ in users
    )
