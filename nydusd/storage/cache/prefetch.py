"""PrefetchWorker: what to fetch before anybody asks, in which order, and how fast.

It runs nothing itself: the supervisor takes a batch from it when a worker would be idle, so prefetch is always behind user
reads. Order: the files of a list, then, if asked for, all chunks of all blobs in the order of the blob.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.state.segment import EMPTY, VERIFY

_BURST = 16 << 20


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
        return max(0.0, over / self._rate)

    def spend(self, now: float, size: int) -> None:
        if self._rate:
            self._leak(now)
            self._debt += size


class PrefetchWorker:
    """The queue of one daemon. Byte counts are compressed bytes for the limiter, chunk ids for the rest."""

    def __init__(self, batch_size: int, bandwidth: int) -> None:
        self._batch_size = max(batch_size, 128 << 10)
        self.limiter = Limiter(bandwidth)
        self._runs: deque[tuple[BlobCache, int, int]] = deque()
        self.requests = 0
        self.bytes = 0

    def want(self, cache: BlobCache, first: int, count: int) -> None:
        """Queue chunks; count < 0 means to the end of the blob."""
        self._runs.append((cache, first, count))

    def cancel(self, cache: BlobCache) -> None:
        """Forget what is queued of a blob."""
        self._runs = deque(run for run in self._runs if run[0] is not cache)

    def idle(self) -> bool:
        return not self._runs

    def take(self, now: float) -> tuple[BlobCache, Sequence[int]] | None:
        """The next batch: chunks of one blob that nobody has or fetches; None if there is nothing to do now."""
        if self.limiter.wait(now) > 0:
            return None
        for _ in range(len(self._runs)):
            cache, first, count = self._runs.popleft()
            if cache.state != "ready" or cache.uses_slots:
                # Not open yet, or no room: later. A failed blob comes back when a reader has opened it.
                self._runs.append((cache, first, count))
                continue
            end = cache.meta.count if count < 0 else min(first + count, cache.meta.count)
            batch: list[int] = []
            size = 0
            state = cache.chunk_map.states()
            chunk = first
            while chunk < end and size < self._batch_size:
                if state[chunk] in (EMPTY, VERIFY):
                    batch.append(chunk)
                    size += cache.meta.record(chunk).usize
                chunk += 1
            if chunk < end:
                self._runs.appendleft((cache, chunk, end - chunk))
            if batch:
                self.requests += 1
                self.bytes += size
                self.limiter.spend(now, size)
                return cache, batch
        return None
