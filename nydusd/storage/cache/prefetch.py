"""PrefetchWorker: what to fetch before anybody asks, in which order, and how fast.

It runs nothing itself: the supervisor takes a batch from it when a worker would be idle, so prefetch is always behind user
reads. Order: the files of a list, then, if asked for, all chunks of all blobs in the order of the blob. Blobs that cannot
be filled now (not open, no room) are set aside, so that looking for work costs nothing while there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from nydusd.formats.model import ChunkFlag
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.state.segment import EMPTY, VERIFY

_BURST = 16 << 20
_TINY = 1e-3
"""Seconds that are not worth waiting: without that, who waited as told may be told, by rounding, to wait on."""
_PAUSE_FIRST, _PAUSE_MOST = 1.0, 60.0
_GROUPED = int(ChunkFlag.BATCH | ChunkFlag.ZRAN)


class Limiter:
    """A leaky bucket in bytes per second; 0 = no limit. User reads add to its debt and never wait."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._debt = 0.0
        self._at = 0.0

    def _leak(self, now: float) -> None:
        self._debt = max(0.0, self._debt - (now - self._at) * self._rate)
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until more may be fetched."""
        if not self._rate:
            return 0.0
        self._leak(now)
        # The capacity is a tenth of a second's worth, at most the burst: a higher one would make a low limit no limit.
        over = self._debt - min(self._rate / 10, _BURST)
        wait = over / self._rate
        return wait if wait > _TINY else 0.0

    def spend(self, now: float, size: int) -> None:
        if self._rate:
            self._leak(now)
            self._debt += size


class PrefetchWorker:
    """The queue of one daemon. Sizes are plain bytes for a batch, compressed bytes for the limiter."""

    def __init__(self, batch_size: int, bandwidth: int) -> None:
        self.batch_size = max(batch_size, 128 << 10)
        self.limiter = Limiter(bandwidth)
        self._runs: deque[tuple[BlobCache, int, int]] = deque()
        self._aside: dict[BlobCache, deque[tuple[BlobCache, int, int]]] = {}
        self.requests = 0
        self.bytes = 0

    def want(self, cache: BlobCache, first: int, count: int) -> None:
        """Queue chunks; count < 0 means to the end of the blob."""
        self._runs.append((cache, first, count))

    def put_back(self, cache: BlobCache, first: int, last: int, retry_after: float, now: float) -> None:
        """A batch could not be had from the backend: leave that alone for `retry_after` seconds (1 s, doubling to 60 s)."""
        cache.prefetch_delay = min(max(cache.prefetch_delay * 2, _PAUSE_FIRST), _PAUSE_MOST)
        cache.prefetch_at = now + max(cache.prefetch_delay, retry_after)
        self._aside.setdefault(cache, deque()).appendleft((cache, first, last + 1 - first))

    def cancel(self, cache: BlobCache) -> None:
        """Forget what is queued of a blob."""
        self._runs = deque(run for run in self._runs if run[0] is not cache)
        self._aside.pop(cache, None)

    def idle(self) -> bool:
        return not self._runs and not self._aside

    def aside(self) -> Collection[BlobCache]:
        """Blobs with chunks queued that cannot be filled now."""
        return self._aside.keys()

    def wait(self, now: float) -> float | None:
        """Seconds until `take` may give more by the passing of time alone; None if only an event can bring that."""
        until = [now + wait] if self._runs and (wait := self.limiter.wait(now)) else []
        until += [cache.retry_at for cache in self._aside if cache.state == "failed"]
        until += [max(cache.no_room_until, cache.prefetch_at) for cache in self._aside if cache.state == "ready"]
        return max(0.0, min(until) - now) if until else None

    def take(
        self, now: float, may: Callable[[BlobCache], bool] = lambda _: True
    ) -> tuple[BlobCache, Sequence[int]] | None:
        """The next batch: chunks of one blob that nobody has or fetches; None if there is nothing to do now.

        `may` says whether chunks of this blob may be prefetched now; those behind them wait with them.
        """
        if self.limiter.wait(now) > 0:
            return None
        for cache in [cache for cache in self._aside if _can_be_filled(cache, now)]:
            self._runs.extendleft(reversed(self._aside.pop(cache)))
        while self._runs:
            if not may(self._runs[0][0]):
                return None
            run = self._runs.popleft()
            if not _can_be_filled(run[0], now):
                self._aside.setdefault(run[0], deque()).append(run)
                continue
            batch = self._batch(run, now)
            if batch:
                return run[0], batch
        return None

    def _batch(self, run: tuple[BlobCache, int, int], now: float) -> list[int]:
        """The first chunks of a run that are missing; what is left of the run goes back to the front of the queue."""
        cache, chunk, count = run
        end = cache.meta.count if count < 0 else min(chunk + count, cache.meta.count)
        batch: list[int] = []
        size = stored = 0
        state = cache.chunk_map.states()
        while chunk < end and size < self.batch_size:
            if state[chunk] in (EMPTY, VERIFY) and cache.meta.is_listed(chunk):
                record = cache.meta.record(chunk)
                batch.append(chunk)
                size += record.usize
                # A grouped chunk's csize is its whole group's.
                stored += record.usize if record.flags & _GROUPED else record.csize
            chunk += 1
        if chunk < end:
            self._runs.appendleft((cache, chunk, end - chunk))
        if batch:
            cache.prefetch.requests += 1
            cache.prefetch.chunks += len(batch)
            cache.prefetch.bytes += size
            self.requests += 1
            self.bytes += size
            self.limiter.spend(now, stored)
        return batch


def _can_be_filled(cache: BlobCache, now: float) -> bool:
    """Open, with room, and with a backend that is worth asking.

    A failed blob can be when it has been opened, by a reader or after its back-off.
    """
    return cache.state == "ready" and not cache.uses_slots and now >= cache.prefetch_at
