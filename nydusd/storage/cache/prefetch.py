"""PrefetchWorker: what to fetch before anybody asks, and in which order; how fast, the mount of each image says (`pace.py`).

It runs nothing itself: the supervisor takes a batch from it when a worker would be idle, so prefetch is always behind user
reads. Order: the files of a list, then, if asked for, all chunks of all blobs in the order of the blob. Blobs that cannot
be filled now (not open, no room) are set aside, so that looking for work costs nothing while there is none. Each image has
a queue of its own, so that one whose limit is reached holds up no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from nydusd.formats.model import ChunkFlag
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.pace import Pace
from nydusd.storage.state.segment import EMPTY, VERIFY

_PAUSE_FIRST, _PAUSE_MOST = 1.0, 60.0
_ANY_LENGTH = 1 << 63
_GROUPED = int(ChunkFlag.BATCH | ChunkFlag.ZRAN)
_LOOK_MOST = 8192
"""Chunks that are looked at before others have their turn: of millions, none may be there to be fetched."""


_Run = tuple[BlobCache, int, int]
"""A blob, a chunk, and how many from there on; < 0 means to the end of the blob."""


class PrefetchWorker:
    """The queues of one daemon."""

    def __init__(self) -> None:
        self._queues: dict[Pace, deque[_Run]] = {}
        self._aside: dict[BlobCache, deque[_Run]] = {}
        self._looks_on = False
        self.requests = 0
        self.bytes = 0

    def want(self, cache: BlobCache, first: int, count: int) -> None:
        """Queue chunks; count < 0 means to the end of the blob."""
        self._queue(cache).append((cache, first, count))

    def _queue(self, cache: BlobCache) -> deque[_Run]:
        return self._queues.setdefault(cache.pace, deque())

    def put_back(self, cache: BlobCache, first: int, last: int, retry_after: float, now: float) -> None:
        """A batch could not be had from the backend: leave that alone for `retry_after` seconds (1 s, doubling to 60 s)."""
        cache.prefetch_delay = min(max(cache.prefetch_delay * 2, _PAUSE_FIRST), _PAUSE_MOST)
        cache.prefetch_at = now + max(cache.prefetch_delay, retry_after)
        self._aside.setdefault(cache, deque()).appendleft((cache, first, last + 1 - first))

    def cancel(self, cache: BlobCache) -> None:
        """Forget what is queued of a blob."""
        self._queues = {pace: deque(run for run in runs if run[0] is not cache) for pace, runs in self._queues.items()}
        self._aside.pop(cache, None)

    def idle(self) -> bool:
        return not any(self._queues.values()) and not self._aside

    def aside(self) -> Collection[BlobCache]:
        """Blobs with chunks queued that cannot be filled now."""
        return self._aside.keys()

    def wait(self, now: float) -> float | None:
        """Seconds until `take` may give more by the passing of time alone; None if only an event can bring that."""
        if self._looks_on:
            return 0.0
        until = [now + wait for runs in self._queues.values() if runs and (wait := _limit(runs, now))]
        until += [cache.retry_at for cache in self._aside if cache.state == "failed"]
        until += [max(cache.no_room_until, cache.prefetch_at) for cache in self._aside if cache.state == "ready"]
        return max(0.0, min(until) - now) if until else None

    def take(
        self, now: float, may: Callable[[BlobCache], bool] = lambda _: True
    ) -> tuple[BlobCache, Sequence[int]] | None:
        """The next batch: chunks of one blob that nobody has or fetches; None if there is nothing to do now, or not known yet.

        `may` says whether chunks of this blob may be prefetched now; those of the same image behind them wait with them.
        """
        self._looks_on, left = False, _LOOK_MOST
        for cache in [cache for cache in self._aside if _can_be_filled(cache, now)]:
            self._queue(cache).extendleft(reversed(self._aside.pop(cache)))
        for pace, runs in list(self._queues.items()):
            while runs and not _limit(runs, now):
                if not may(runs[0][0]):
                    break
                run = runs.popleft()
                if not _can_be_filled(run[0], now):
                    self._aside.setdefault(run[0], deque()).append(run)
                    continue
                batch, looked = self._batch(run, runs, now, left)
                if batch:
                    return run[0], batch
                left -= max(looked, 1)
                if left <= 0:
                    self._looks_on = True
                    return None
            if not runs:
                del self._queues[pace]
        return None

    def _batch(self, run: _Run, runs: deque[_Run], now: float, most: int) -> tuple[list[int], int]:
        """The first chunks of a run that are missing; what is left of the run goes back to the front of its queue.

        And how many were looked at, `most` or fewer.
        """
        cache, chunk, count = run
        end = cache.meta.count if count < 0 else min(chunk + count, cache.meta.count)
        begin, stop = chunk, min(end, chunk + most)
        batch: list[int] = []
        size = stored = 0
        state = cache.chunk_map.states()
        while chunk < stop and size < cache.pace.batch_size:
            if state[chunk] in (EMPTY, VERIFY) and cache.meta.is_listed(chunk):
                record = cache.meta.record(chunk)
                batch.append(chunk)
                size += record.usize
                # A grouped chunk's csize is its whole group's.
                stored += record.usize if record.flags & _GROUPED else record.csize
            chunk += 1
        if chunk < end:
            runs.appendleft((cache, chunk, end - chunk))
        if batch:
            cache.prefetch.requests += 1
            cache.prefetch.chunks += len(batch)
            cache.prefetch.bytes += sum(cache.meta.span(part)[1] for part in cache.meta.ranges(batch, _ANY_LENGTH, 0))
            self.requests += 1
            self.bytes += size
            cache.pace.limiter.spend(now, stored)
        return batch, chunk - begin


def _limit(runs: deque[_Run], now: float) -> float:
    """Seconds until the next one may begin: as the image says now, which may have been remounted since it was queued."""
    return runs[0][0].pace.limiter.wait(now)


def _can_be_filled(cache: BlobCache, now: float) -> bool:
    """Open, with room, and with a backend that is worth asking.

    A failed blob can be when it has been opened, by a reader or after its back-off.
    """
    return cache.state == "ready" and not cache.uses_slots and now >= cache.prefetch_at
